#include "deploy/doctor/host_checks.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace longfill {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
// A rank without a prompt holds some hundred MB; below this not even a small model has room.
constexpr int64_t kLeastMemoryBytes = 1024 * kMiB;
// Of each rank in /dev/shm: Open MPI's segment (btl_vader_segment_size, 4 MiB) and its book-keeping; NCCL's
// buffers for the peers of one host, some 10 MB a channel and peer.
constexpr int64_t kMpiSharedBytes = 8 * kMiB;
constexpr int64_t kNcclSharedBytes = 64 * kMiB;
// A connection, a KV file and a peer take one each; the usual default is 1024.
constexpr int64_t kWantedFiles = 4096;
constexpr int64_t kLeastFiles = 256;

std::string Bytes(int64_t bytes) { return Scaled(static_cast<double>(bytes), "B"); }

std::string Cores(const std::vector<int>& cores) {
  return absl::StrCat(cores.size() == 1 ? "core " : "cores ", RankList(cores));
}

std::string Count(int64_t count, const char* noun) {
  return absl::StrCat(count, " ", noun, count == 1 ? "" : "s");
}

}  // namespace

Finding JudgeSystem(const HostFacts& facts) {
  return Ok("host.system",
            absl::StrCat(facts.kernel, ", ", Count(facts.cores, "core"), ", ",
                         facts.memory_bytes >= 0 ? Bytes(facts.memory_bytes) : "unknown", " of memory"));
}

Finding JudgeInstructionSet(const std::string& instruction_set) {
  const auto starts = [&](const char* prefix) { return instruction_set.rfind(prefix, 0) == 0; };
  if (starts("EMU") || starts("SCALAR") || starts("SSE") || starts("SSSE")) {
    return Warning("cpu.simd", instruction_set,
                   "the CPU has no AVX2, or a virtual machine hides it: choose a CPU model such as host");
  }
  return Ok("cpu.simd", instruction_set);
}

Finding JudgeCores(const HostFacts& facts, int usable_cores, int ranks_on_host) {
  std::string value = absl::StrCat(Count(ranks_on_host, "rank"), " on ", Count(usable_cores, "core"));
  if (usable_cores < facts.cores) absl::StrAppend(&value, " of ", facts.cores);
  const bool limited = facts.quota_cores > 0 && facts.quota_cores < usable_cores;
  if (limited) {
    absl::StrAppendFormat(&value, ", of which the control group allows the time of %.1f", facts.quota_cores);
  }
  const double cores = limited ? facts.quota_cores : usable_cores;
  if (cores < ranks_on_host) {
    const int fitting = std::max(1, static_cast<int>(cores));
    return Warning("cpu.cores", value,
                   usable_cores < std::min(facts.cores, ranks_on_host)
                       ? absl::StrCat("ranks share cores while others idle: mpirun --bind-to none, or "
                                      "srun --cpus-per-task=",
                                      std::max(1, facts.cores / ranks_on_host))
                       : absl::StrCat("ranks wait for each other in every exchange: start at most ", fitting,
                                      " on this host"));
  }
  if (limited) {
    return Warning("cpu.cores", value,
                   absl::StrCat("threads beyond the limit stop each other: raise it, or give --threads ",
                                std::max(1, static_cast<int>(cores) / ranks_on_host)));
  }
  return Ok("cpu.cores", value);
}

Finding JudgeBinding(const std::vector<int>& allowed, int cores, int ranks_on_host) {
  if (allowed.empty()) return Skipped("cpu.binding", "the affinity mask cannot be read");
  const int share = std::max(1, cores / std::max(1, ranks_on_host));
  const int own = static_cast<int>(allowed.size());
  if (own >= cores) return Ok("cpu.binding", "not bound");
  const std::string value = absl::StrCat("bound to ", Cores(allowed), " of ", cores);
  if (own < share) {
    return Warning("cpu.binding", value,
                   absl::StrCat("the rank's share of the host is ", share,
                                ": mpirun --bind-to none, or --map-by "
                                "slot:PE=",
                                share, "; srun --cpus-per-task=", share));
  }
  return Ok("cpu.binding", value);
}

Finding JudgeMemory(int64_t available_bytes, int64_t weights_bytes, int ranks_on_host) {
  std::string value = absl::StrCat(Bytes(available_bytes), " for each of ", Count(ranks_on_host, "rank"));
  if (weights_bytes > 0) absl::StrAppend(&value, ", weights take ", Bytes(weights_bytes));
  if (weights_bytes > available_bytes) {
    return Failed(
        "memory.available", value,
        "the model does not fit: fewer ranks on this host, more hosts, --weights sharded, or a higher "
        "limit of the container");
  }
  if (available_bytes - weights_bytes < kLeastMemoryBytes) {
    return Warning("memory.available", value,
                   "little is left for prompts: longfill inspect --tokens N shows what one takes");
  }
  return Ok("memory.available", value);
}

Finding JudgeLockedMemory(int64_t limit_bytes, bool infiniband) {
  if (limit_bytes == kUnknown) return Skipped("memory.locked", "the limit cannot be read");
  const std::string value = limit_bytes == kUnlimited ? "unlimited" : Bytes(limit_bytes);
  if (limit_bytes == kUnlimited || !infiniband) {
    return Ok("memory.locked",
              infiniband ? value : absl::StrCat(value, ", and no RDMA device counts against it"));
  }
  return Warning(
      "memory.locked", value,
      "RDMA devices register memory under this limit: ulimit -l unlimited (LimitMEMLOCK=infinity of "
      "systemd and slurmd, docker --ulimit memlock=-1)");
}

Finding JudgeSharedMemory(int64_t total_bytes, int64_t free_bytes, int ranks_on_host, bool gpus) {
  constexpr char kRaise[] =
      "docker --shm-size=1g (--ipc=host), a larger emptyDir of medium Memory at /dev/shm in "
      "Kubernetes, or mount -o remount,size=1G /dev/shm";
  if (total_bytes == kUnknown) {
    return Failed("memory.shm", "there is no /dev/shm", absl::StrCat("mount a tmpfs there: ", kRaise));
  }
  const int64_t needed = ranks_on_host * (kMpiSharedBytes + (gpus ? kNcclSharedBytes : 0));
  const std::string value =
      absl::StrCat("/dev/shm: ", Bytes(free_bytes), " free of ", Bytes(total_bytes), ", ",
                   ranks_on_host == 1 ? std::string("one rank")
                                      : absl::StrCat(ranks_on_host, " ranks take up to ", Bytes(needed)));
  if (ranks_on_host == 1) return Ok("memory.shm", value);
  if (free_bytes < needed) {
    return Failed(
        "memory.shm", value,
        total_bytes < needed ? kRaise : "remove what ended processes have left in /dev/shm, or enlarge it");
  }
  // What containers get unless they ask for more: enough today, not with more ranks.
  if (total_bytes <= 64 * kMiB) return Warning("memory.shm", value, kRaise);
  return Ok("memory.shm", value);
}

Finding JudgeOpenFiles(int64_t limit) {
  if (limit == kUnknown) return Skipped("limits.files", "the limit cannot be read");
  if (limit == kUnlimited) return Ok("limits.files", "unlimited");
  const std::string value = absl::StrCat(limit);
  const std::string advice =
      absl::StrCat("connections of clients, peers and KV files take one each: ulimit -n ", kWantedFiles,
                   " or more (LimitNOFILE, docker --ulimit nofile)");
  if (limit < kLeastFiles) return Failed("limits.files", value, advice);
  if (limit < kWantedFiles) return Warning("limits.files", value, advice);
  return Ok("limits.files", value);
}

Finding JudgeHostNames(const std::vector<std::string>& hosts, const std::vector<std::string>& boot_ids) {
  std::map<std::string, std::string> first;
  std::vector<int> doubtful;
  std::string shared;
  for (size_t rank = 0; rank < hosts.size(); ++rank) {
    const auto [entry, added] = first.emplace(hosts[rank], boot_ids[rank]);
    if (added || entry->second == boot_ids[rank]) continue;
    doubtful.push_back(static_cast<int>(rank));
    shared = hosts[rank];
  }
  if (doubtful.empty()) {
    return Ok("host.name", Count(static_cast<int64_t>(first.size()), "host"));
  }
  Finding finding =
      Failed("host.name",
             absl::StrCat("another machine, of ", NameRanks(doubtful), ", is called ", shared, " as well"),
             "give each machine a name of its own that the others can resolve: ranks of one name "
             "are taken to share a host, its cores and its GPUs");
  return finding;
}

}  // namespace longfill
