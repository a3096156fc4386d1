#ifndef LONGFILL_DEPLOY_DOCTOR_GPU_PROBE_H_
#define LONGFILL_DEPLOY_DOCTOR_GPU_PROBE_H_

// Measures the GPU of a rank, and the exchange between GPUs.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/api/cuda_devices.h"
#include "kernels/base/status.h"
#include "parallel/communicator.h"

namespace longfill {

// Bytes per second between page-locked host memory and the device, best of several.
struct HostCopyRates {
  double to_device = 0;
  double to_host = 0;
  bool intact = true;  // what came back was what went there
};
absl::StatusOr<HostCopyRates> MeasureHostCopy(Backend& backend, int64_t bytes);

struct PeerRate {
  int from = 0;  // ordinals
  int to = 0;
  bool direct = false;  // without a way through the host
  double bytes_per_second = 0;
};
// All ordered pairs of the devices that this process sees.
absl::StatusOr<std::vector<PeerRate>> MeasurePeers(const std::vector<CudaDeviceFacts>& devices,
                                                   int64_t bytes);

// Collective over `communicator`, which exchanges memory of `backend`.
struct DeviceExchange {
  double bytes_per_second = 0;  // that a rank receives in an all-gather, of the slowest one
  std::string wrong;            // here; empty: all was right
};
absl::StatusOr<DeviceExchange> MeasureDeviceExchange(Communicator& communicator, Backend& backend,
                                                     int64_t bytes);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_DOCTOR_GPU_PROBE_H_
