#include "runtime/engine/device_communicator.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "parallel/staged_communicator.h"

namespace longfill {
namespace {

// Why these ranks cannot use NCCL; empty: they can.
std::string ObstacleToNccl(const NcclOptions& nccl, std::span<const RankDevice> ranks) {
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (ranks[rank].id.empty()) return absl::StrCat("rank ", rank, " computes on the CPU");
    if (ranks[rank].nccl_version == 0) {
      return absl::StrCat("the longfill of rank ", rank,
                          " was built without it (CMake option LONGFILL_NCCL)");
    }
    if (ranks[rank].nccl_version != ranks[0].nccl_version) {
      return absl::StrCat("rank 0 has NCCL ", NcclVersionText(ranks[0].nccl_version), ", rank ", rank,
                          " has ", NcclVersionText(ranks[rank].nccl_version));
    }
  }
  if (nccl.ranks_share_gpus && ranks[0].nccl_version >= kFirstNcclWithSharedGpus) return "";
  for (size_t a = 0; a < ranks.size(); ++a) {
    for (size_t b = a + 1; b < ranks.size(); ++b) {
      if (ranks[a].id == ranks[b].id)
        return absl::StrCat("ranks ", a, " and ", b, " share GPU ", ranks[a].id);
    }
  }
  return "";
}

bool OnTheCpu(std::span<const RankDevice> ranks) {
  for (const RankDevice& rank : ranks) {
    if (!rank.id.empty()) return false;
  }
  return true;
}

}  // namespace

absl::StatusOr<CommunicatorChoice> ChooseCommunicator(const DeviceCommunicatorOptions& options,
                                                      std::span<const RankDevice> ranks) {
  if (options.kind == CommunicatorKind::kStaged) {
    return CommunicatorChoice{CommunicatorKind::kStaged, "as asked for"};
  }
  const std::string obstacle = ObstacleToNccl(options.nccl, ranks);
  if (options.kind == CommunicatorKind::kNccl) {
    if (!obstacle.empty())
      return absl::FailedPreconditionError(absl::StrCat("NCCL cannot be used: ", obstacle));
    return CommunicatorChoice{CommunicatorKind::kNccl, "as asked for"};
  }
  if (ranks.size() == 1 || OnTheCpu(ranks))
    return CommunicatorChoice{CommunicatorKind::kStaged, "there is no other GPU"};
  // Ranks that share a GPU may use NCCL, but only where that was asked for.
  const std::string shared = obstacle.empty() ? ObstacleToNccl({}, ranks) : obstacle;
  if (!shared.empty()) return CommunicatorChoice{CommunicatorKind::kStaged, shared};
  return CommunicatorChoice{CommunicatorKind::kNccl, "every rank has a GPU of its own"};
}

int CtasBesideNccl(const Backend& backend, const NcclOptions& nccl) {
  return std::max(1, backend.facts().num_multiprocessors - nccl.max_ctas);
}

absl::StatusOr<std::unique_ptr<Communicator>> CreateDeviceCommunicator(const CommunicatorChoice& choice,
                                                                       const NcclOptions& nccl,
                                                                       Communicator& world,
                                                                       Backend& backend) {
  if (choice.kind == CommunicatorKind::kNccl) return CreateNcclCommunicator(world, backend, nccl);
  absl::StatusOr<std::unique_ptr<Communicator>> staged = CreateStagedCommunicator(world, backend);
  CpuStream stream;
  LF_RETURN_IF_ERROR(AgreeOnStatus(world, staged.status(), stream));
  return staged;
}

}  // namespace longfill
