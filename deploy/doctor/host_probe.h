#ifndef LONGFILL_DEPLOY_DOCTOR_HOST_PROBE_H_
#define LONGFILL_DEPLOY_DOCTOR_HOST_PROBE_H_

// What the kernel says about this process and its host. No judgement.

#include <cstdint>
#include <string>
#include <vector>

namespace longfill {

inline constexpr int64_t kUnlimited = -1;
inline constexpr int64_t kUnknown = -2;

struct HostFacts {
  std::string kernel;                      // "Linux 6.1.0"
  std::string boot_id;                     // differs between machines and boots; empty: not known
  int cores = 0;                           // of the host that are online
  double quota_cores = 0;                  // that the control group allows in the mean; 0: no limit
  std::string instruction_set;             // of the CPU kernels: "AVX2"
  int64_t memory_bytes = kUnknown;         // of the host
  int64_t locked_limit_bytes = kUnknown;   // ulimit -l, or kUnlimited
  int64_t open_files_limit = kUnknown;     // ulimit -n, or kUnlimited
  int64_t shared_memory_bytes = kUnknown;  // of /dev/shm
  int64_t shared_memory_free = kUnknown;
  bool infiniband = false;  // the host has RDMA devices
};

HostFacts ReadHostFacts();

// Cores that the calling thread may run on, ascending; empty: not known.
std::vector<int> AllowedCores();

// Cores of "50000 100000", the form of cpu.max; 0 for "max 100000" and for what is no such text.
double QuotaOf(const std::string& cpu_max);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_DOCTOR_HOST_PROBE_H_
