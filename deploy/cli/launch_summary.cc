#include "deploy/cli/launch_summary.h"

#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "deploy/doctor/finding.h"
#include "deploy/doctor/host_probe.h"
#include "runtime/observe/log.h"

namespace longfill {
namespace {

// "GPU 1, NVIDIA H100 80GB HBM3 (sm_90)"
std::string NameOf(const Backend& backend, const DeviceOptions& device) {
  if (device.kind == DeviceKind::kCpu) return backend.facts().name;
  const absl::StatusOr<int> count = CudaDeviceCount();
  return count.ok() ? absl::StrCat("GPU ", DeviceOrdinal(device, *count), ", ", backend.facts().name)
                    : backend.facts().name;
}

}  // namespace

absl::StatusOr<LaunchSummary> SummarizeLaunch(World& world, const Backend& backend,
                                              const DeviceOptions& device) {
  CpuStream stream;
  const auto by_rank = [&](const std::string& mine) -> absl::StatusOr<std::string> {
    LF_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                        AllGatherStrings(world.communicator(), mine, stream));
    return ByRank(all);
  };
  LaunchSummary summary;
  summary.launcher = world.launcher().empty() ? "none" : world.launcher();
  std::vector<int> ranks(static_cast<size_t>(world.size()));
  std::iota(ranks.begin(), ranks.end(), 0);
  summary.ranks = ByHost(world.hosts(), ranks);
  LF_ASSIGN_OR_RETURN(summary.ranks_per_host, by_rank(absl::StrCat(world.ranks_on_host())));
  LF_ASSIGN_OR_RETURN(summary.devices, by_rank(NameOf(backend, device)));
  LF_ASSIGN_OR_RETURN(summary.threads, by_rank(absl::StrCat(device.num_threads)));
  LF_ASSIGN_OR_RETURN(summary.cores, by_rank(RankList(AllowedCores())));
  if (device.kind == DeviceKind::kCuda) summary.nccl = NcclVariables();
  return summary;
}

void LogLaunch(const LaunchSummary& summary) {
  Log(LogLevel::kInfo, "launch",
      {{"launcher", summary.launcher},
       {"ranks", summary.ranks},
       {"ranks_per_host", summary.ranks_per_host},
       {"devices", summary.devices},
       {"threads", summary.threads},
       {"cores", summary.cores},
       {"nccl", summary.nccl}});
}

std::string LaunchText(const LaunchSummary& summary) {
  return absl::StrCat("ranks by ", summary.launcher, ": ", summary.ranks, "; devices: ", summary.devices,
                      "; threads of each: ", summary.threads, "; cores: ", summary.cores,
                      summary.nccl.empty() ? "" : absl::StrCat("; ", summary.nccl));
}

}  // namespace longfill
