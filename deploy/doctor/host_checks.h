#ifndef LONGFILL_DEPLOY_DOCTOR_HOST_CHECKS_H_
#define LONGFILL_DEPLOY_DOCTOR_HOST_CHECKS_H_

// From what was read of a host to findings. Pure: no file, no clock, no system call.

#include <cstdint>
#include <string>
#include <vector>

#include "deploy/doctor/finding.h"
#include "deploy/doctor/host_probe.h"

namespace longfill {

// host.system: never bad, for whoever reads the report elsewhere.
Finding JudgeSystem(const HostFacts& facts);
// cpu.simd
Finding JudgeInstructionSet(const std::string& instruction_set);

// cpu.cores: `usable_cores` is how many different ones the ranks of the host may run on together.
Finding JudgeCores(const HostFacts& facts, int usable_cores, int ranks_on_host);
// cpu.binding, of one rank.
Finding JudgeBinding(const std::vector<int>& allowed, int cores, int ranks_on_host);

// memory.available: what AvailableMemoryBytes gives for one of `ranks_on_host` ranks, and what its weights
// take of it; 0: no model was named.
Finding JudgeMemory(int64_t available_bytes, int64_t weights_bytes, int ranks_on_host);
// memory.locked. Page-locked buffers of CUDA do not count against ulimit -l, what RDMA devices register does.
Finding JudgeLockedMemory(int64_t limit_bytes, bool infiniband);
// memory.shm: Open MPI, and between GPUs NCCL, have their shared memory there.
Finding JudgeSharedMemory(int64_t total_bytes, int64_t free_bytes, int ranks_on_host, bool gpus);
// limits.files
Finding JudgeOpenFiles(int64_t limit);

// host.name: machines that have one name are taken for one host. Both by rank.
Finding JudgeHostNames(const std::vector<std::string>& hosts, const std::vector<std::string>& boot_ids);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_DOCTOR_HOST_CHECKS_H_
