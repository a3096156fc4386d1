#ifndef LONGFILL_DEPLOY_DOCTOR_GPU_CHECKS_H_
#define LONGFILL_DEPLOY_DOCTOR_GPU_CHECKS_H_

// From what was read or measured of GPUs to findings. Pure.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "deploy/doctor/finding.h"
#include "deploy/doctor/gpu_probe.h"
#include "kernels/api/cuda_devices.h"
#include "runtime/engine/device_communicator.h"

namespace longfill {

// cuda.driver
Finding JudgeDriver(const CudaVersions& versions);
// cuda.device, of one rank: the GPU that it takes.
Finding JudgeDevice(int ordinal, const CudaDeviceFacts& device);
// cuda.sharing, of the ranks of a host: the GPU of each (DeviceFacts::id), and how many the host's first rank
// sees.
Finding JudgeSharing(const std::vector<std::string>& ids, int visible);
// cuda.memory, of one rank: free bytes of its GPU, the ranks that share it and what the weights of each take
// (0: no model was named).
Finding JudgeDeviceMemory(int64_t free_bytes, int ranks_on_device, int64_t weights_bytes);
// cuda.host_copy, of one rank, while all ranks copy.
Finding JudgeHostCopy(const HostCopyRates& rates);
// cuda.peer_copy, between the GPUs that one rank sees.
Finding JudgePeers(const std::vector<PeerRate>& peers);

// nccl.version: 0 for a header: a build without NCCL; for a library: of one that is not there.
Finding JudgeNccl(int header_version, int library_version);
// exchange.device: how the ranks' GPUs exchange, how fast at the slowest rank, and what came out wrong.
Finding JudgeDeviceExchange(const CommunicatorChoice& choice, double bytes_per_second,
                            std::string_view wrong);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_DOCTOR_GPU_CHECKS_H_
