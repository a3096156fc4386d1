#include "tests/multirank/rank_backend.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "parallel/staged_communicator.h"
#include "tests/multirank/nccl_ranks.h"
#include "tests/testing/guarded_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

// Never destroyed: at the end of the program the driver may be gone before them.
struct SharedBackends {
  std::mutex mutex;
  std::map<int, absl::StatusOr<std::shared_ptr<Backend>>> of_rank;
};

absl::StatusOr<std::shared_ptr<Backend>> GpuBackend(int rank) {
  static SharedBackends& shared = *new SharedBackends;
  const std::lock_guard<std::mutex> lock(shared.mutex);
  if (const auto known = shared.of_rank.find(rank); known != shared.of_rank.end()) return known->second;
  absl::StatusOr<std::unique_ptr<Backend>> created = CreateCudaBackend({.compute_dtype = DType::kBFloat16});
  const auto backend = created.ok() ? absl::StatusOr<std::shared_ptr<Backend>>(*std::move(created))
                                    : absl::StatusOr<std::shared_ptr<Backend>>(created.status());
  return shared.of_rank.emplace(rank, backend).first->second;
}

template <typename T>
std::vector<T> Download(Backend& backend, const T* from, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  LF_EXPECT_OK(backend.kernels().CopyOut(values.data(), from, count * static_cast<int64_t>(sizeof(T)),
                                         backend.stream()));
  LF_EXPECT_OK(backend.stream().Sync());
  return values;
}

SparseIndex DownloadBlocks(Backend& backend, const IndexView& view, int64_t num_row_blocks) {
  BlockListIndex index{.row_offsets = {0}};
  if (view.row_offsets != nullptr) {
    index.row_offsets = Download(backend, view.row_offsets, num_row_blocks + 1);
    const int64_t first = index.row_offsets.front();  // lists of several heads may lie in one array
    index.key_blocks = Download(backend, view.key_blocks + first, index.row_offsets.back() - first);
    for (int64_t& offset : index.row_offsets) offset -= first;
    return index;
  }
  const auto padded = Download(backend, view.key_blocks, num_row_blocks * view.row_length);
  for (int64_t m = 0; m < num_row_blocks; ++m) {
    const auto row = padded.begin() + m * view.row_length;
    index.key_blocks.insert(index.key_blocks.end(), row, row + std::min(view.row_length, m + 1));
    index.row_offsets.push_back(static_cast<int64_t>(index.key_blocks.size()));
  }
  return index;
}

}  // namespace

absl::StatusOr<std::shared_ptr<Backend>> RankBackend(const std::string& name, int rank, int64_t limit_bytes) {
  if (name == "cuda_bfloat16") return GpuBackend(rank);
  if (name == "nccl") return NcclRankBackend(rank);
  return std::shared_ptr<Backend>(name == "guarded" ? CreateGuardedBackend({.limit_bytes = limit_bytes})
                                                    : CreateLimitedCpuBackend(limit_bytes));
}

absl::StatusOr<std::unique_ptr<Communicator>> DeviceWorld(const std::string& name, Communicator& host,
                                                          Backend& backend, int64_t slice_bytes) {
  if (name == "nccl") return CreateNcclCommunicator(host, backend, NcclTestOptions());
  return CreateStagedCommunicator(host, backend, slice_bytes);
}

SparseIndex DownloadIndex(Backend& backend, const IndexView& view, int64_t num_tokens) {
  if (view.form == IndexView::Form::kBlockList) {
    return DownloadBlocks(backend, view, (num_tokens + kRowBlock - 1) / kRowBlock);
  }
  const IndexCounts counts = Download(backend, view.counts, 1)[0];
  EXPECT_EQ(counts.overflow, 0);
  DiagonalColumnIndex index;
  index.coverage = view.coverage;
  index.columns = Download(backend, view.columns, counts.columns);
  index.distances = Download(backend, view.distances, counts.distances);
  index.runs = Download(backend, view.runs, counts.runs);
  return index;
}

void RankBackendTest::SetUp() {
  if (const auto backend = RankBackend(GetParam(), 0); !backend.ok()) {
    GTEST_SKIP() << GetParam() << ": " << backend.status().message();
  }
  if (over_nccl()) {
    // Several in-process sizes can be played where two ranks can; the one size of mpirun has to be.
    const std::vector<int> sizes = GroupSizes();
    const absl::Status status = CheckNcclRanks(sizes.size() == 1 ? sizes[0] : 2);
    if (!status.ok()) GTEST_SKIP() << GetParam() << ": " << status.message();
  }
}

std::vector<int> RankBackendTest::Sizes() const {
  std::vector<int> sizes;
  for (const int size : GroupSizes()) {
    const bool playable = over_nccl() ? CheckNcclRanks(size).ok() : on_cpu() || size <= 4;
    if (playable) sizes.push_back(size);
  }
  return sizes;
}

}  // namespace longfill
