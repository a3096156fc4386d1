#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "tests/multirank/nccl_ranks.h"

namespace longfill {
namespace {

constexpr int kMostRanksOnAGpu = 4;

struct SharedBackends {
  std::mutex mutex;
  std::map<int, absl::StatusOr<std::shared_ptr<Backend>>> of_rank;
};

absl::StatusOr<std::shared_ptr<Backend>> Create(int rank) {
  // Ranks of these tests may be threads of one process, whose memory the other GPUs cannot reach.
  setenv("NCCL_P2P_DIRECT_DISABLE", "1", /*overwrite=*/0);
  setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
  LF_ASSIGN_OR_RETURN(const int devices, CudaDeviceCount());
  LF_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, CreateCudaBackend({.device = rank % devices}));
  return std::shared_ptr<Backend>(std::move(backend));
}

bool RanksMayShareGpus() {
  const char* value = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  return value != nullptr && std::string_view(value) == "1";
}

}  // namespace

absl::StatusOr<std::shared_ptr<Backend>> NcclRankBackend(int rank) {
  static SharedBackends& shared = *new SharedBackends;
  const std::lock_guard<std::mutex> lock(shared.mutex);
  if (const auto known = shared.of_rank.find(rank); known != shared.of_rank.end()) return known->second;
  return shared.of_rank.emplace(rank, Create(rank)).first->second;
}

absl::Status CheckNcclRanks(int size) {
  LF_ASSIGN_OR_RETURN(const int devices, CudaDeviceCount());
  LF_ASSIGN_OR_RETURN(const auto backend, NcclRankBackend(0));
  LF_ASSIGN_OR_RETURN(const int version, NcclVersionCode(*backend));
  if (size <= devices) return absl::OkStatus();
  if (RanksMayShareGpus() && version >= kFirstNcclWithSharedGpus && size <= kMostRanksOnAGpu * devices) {
    return absl::OkStatus();
  }
  return absl::UnavailableError(
      absl::StrCat(size, " ranks need so many GPUs, or NCCL ", NcclVersionText(kFirstNcclWithSharedGpus),
                   " with NCCL_MULTI_RANK_GPU_ENABLE=1 for up to ", kMostRanksOnAGpu,
                   " ranks on each; GPUs here: ", devices, ", NCCL ", NcclVersionText(version)));
}

NcclOptions NcclTestOptions() {
  return {.timeout = std::chrono::seconds(60), .max_ctas = 4, .ranks_share_gpus = RanksMayShareGpus()};
}

}  // namespace longfill
