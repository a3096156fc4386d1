#include "kernels/cuda/attention/attention.h"

#include <array>
#include <cstring>
#include <iterator>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention/attention_check.h"
#include "kernels/cuda/attention/attention_tables.h"
#include "kernels/cuda/attention/launch_attention.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/upload.h"

namespace longfill::cuda::attention {
namespace {

constexpr int64_t kAlignment = 16;

// Tiles of these rows, in a launch each.
constexpr int kTileRows[] = {64, 128};
constexpr size_t kNumTileRows = std::size(kTileRows);

// The tables of a call as they lie in the workspace, each aligned.
struct TableLayout {
  TableLayout(int64_t num_sequences, int64_t num_q_heads) {
    const auto place = [&](int64_t bytes) {
      const int64_t at = size_bytes;
      size_bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return at;
    };
    for (size_t i = 0; i < kNumTileRows; ++i) {
      items_taken[i] = place(sizeof(int32_t));
      sequences[i] = place(num_sequences * static_cast<int64_t>(sizeof(SequenceEntry)));
    }
    heads = place(num_q_heads * static_cast<int64_t>(sizeof(HeadEntry)));
    indices = place(num_sequences * num_q_heads * static_cast<int64_t>(sizeof(IndexView)));
  }
  // Byte offsets.
  int64_t items_taken[kNumTileRows] = {};
  int64_t sequences[kNumTileRows] = {};
  int64_t heads = 0, indices = 0;
  int64_t size_bytes = 0;
};

struct LaunchFunction {
  absl::Status (*launch)(const Args&, int, const DeviceLimits&, cudaStream_t) = nullptr;
  int64_t (*shared_bytes)() = nullptr;
};

using LaunchFunctions = std::array<LaunchFunction, kNumTileRows>;

template <DType kDType, int kHeadDim>
constexpr LaunchFunctions kLaunches = {LaunchFunction{LaunchAttention<kDType, kHeadDim, kTileRows[0]>,
                                                      SharedBytes<kDType, kHeadDim, kTileRows[0]>},
                                       LaunchFunction{LaunchAttention<kDType, kHeadDim, kTileRows[1]>,
                                                      SharedBytes<kDType, kHeadDim, kTileRows[1]>}};

template <DType kDType>
LaunchFunctions PickHeadDim(int64_t head_dim) {
  switch (head_dim) {
    case 64:
      return kLaunches<kDType, 64>;
    case 96:
      return kLaunches<kDType, 96>;
    case 128:
      return kLaunches<kDType, 128>;
    case 256:
      return kLaunches<kDType, 256>;
    default:
      return {};
  }
}

absl::StatusOr<LaunchFunctions> Pick(DType dtype, int64_t head_dim) {
  LaunchFunctions launches = {};
  if (dtype == DType::kBFloat16) launches = PickHeadDim<DType::kBFloat16>(head_dim);
  if (dtype == DType::kFloat16) launches = PickHeadDim<DType::kFloat16>(head_dim);
  if (launches[0].launch != nullptr) return launches;
  return absl::UnimplementedError(
      absl::StrCat("attention: no variant for head_dim ", head_dim, " in ",
                   absl::string_view(DTypeName(dtype).data(), DTypeName(dtype).size()),
                   "; there are 64, 96, 128 and 256 in bfloat16 and float16"));
}

}  // namespace
}  // namespace longfill::cuda::attention

namespace longfill {

int64_t CudaAttentionWorkspaceBytes(const AttentionBounds& bounds) {
  return cuda::attention::TableLayout(bounds.num_sequences, bounds.num_q_heads).size_bytes;
}

absl::Status CudaAttention(const AttentionParams& params, std::span<const int32_t> heads, Workspace workspace,
                           DType compute_dtype, const DeviceLimits& limits, cudaStream_t stream) {
  using namespace cuda;             // NOLINT(google-build-using-namespace)
  using namespace cuda::attention;  // NOLINT(google-build-using-namespace)
  LF_RETURN_IF_ERROR(CheckAtLeast("attention", "num_q_heads", params.num_q_heads, 0));
  if (heads.empty() || params.sequences.empty()) return absl::OkStatus();
  LF_ASSIGN_OR_RETURN(const LaunchFunctions launches, Pick(compute_dtype, params.head_dim));
  LF_RETURN_IF_ERROR(CheckAttention(params));
  std::array<SequenceTable, kNumTileRows> sequences;
  for (size_t i = 0; i < kNumTileRows; ++i) {
    sequences[i] = SequencesOf(params, static_cast<int64_t>(heads.size()), kTileRows[i]);
  }
  const int64_t num_sequences = static_cast<int64_t>(sequences[0].entries.size());
  if (num_sequences == 0) return absl::OkStatus();
  if (sequences[0].num_items > kMaxItems) {
    return absl::InvalidArgumentError(absl::StrCat("attention: ", sequences[0].num_items,
                                                   " tiles of 64 rows of a query head exceed ", kMaxItems));
  }
  const TableLayout layout(num_sequences, params.num_q_heads);
  LF_RETURN_IF_ERROR(CheckWorkspace("attention", workspace, layout.size_bytes));
  if (!AlignedTo16(workspace.data)) {
    return absl::InvalidArgumentError("attention: the workspace is not aligned to 16 bytes");
  }

  std::vector<char> tables(static_cast<size_t>(layout.size_bytes), 0);
  const auto put = [&](int64_t at, const auto& table) {
    std::memcpy(tables.data() + at, table.data(), table.size() * sizeof(table[0]));
  };
  for (size_t i = 0; i < kNumTileRows; ++i) put(layout.sequences[i], sequences[i].entries);
  put(layout.heads, HeadsByKvHead(params, heads));
  put(layout.indices, IndicesOf(params));
  LF_RETURN_IF_ERROR(Upload(workspace.data, tables.data(), layout.size_bytes, stream));

  const char* base = static_cast<const char*>(workspace.data);
  Args args = ArgsOf(params);
  args.num_sequences = static_cast<int32_t>(num_sequences);
  args.heads = reinterpret_cast<const HeadEntry*>(base + layout.heads);
  args.indices = reinterpret_cast<const IndexView*>(base + layout.indices);
  args.wide_tiles = launches[1].shared_bytes() <= limits.shared_bytes_per_block;
  for (size_t i = 0; i < (args.wide_tiles ? kNumTileRows : 1); ++i) {
    args.sequences = reinterpret_cast<const SequenceEntry*>(base + layout.sequences[i]);
    args.items_taken = reinterpret_cast<int32_t*>(static_cast<char*>(workspace.data) + layout.items_taken[i]);
    args.num_items = static_cast<int32_t>(sequences[i].num_items);
    LF_RETURN_IF_ERROR(launches[i].launch(args, params.cta_limit, limits, stream));
  }
  return absl::OkStatus();
}

}  // namespace longfill
