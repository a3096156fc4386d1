#ifndef LONGFILL_KERNELS_API_CUDA_DEVICES_H_
#define LONGFILL_KERNELS_API_CUDA_DEVICES_H_

// What the CUDA runtime says of the GPUs that a process sees, for reports. Unimplemented in a build without
// CUDA, everywhere.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"

namespace longfill {

// The least that the kernels are built for: 10 * major + minor.
inline constexpr int kMinComputeCapability = 80;

// As CUDA counts: 13000 for 13.0.
struct CudaVersions {
  int driver = 0;   // the newest runtime that the driver serves; 0: there is no driver
  int runtime = 0;  // that longfill was built with
};
absl::StatusOr<CudaVersions> ReadCudaVersions();

struct CudaDeviceFacts {
  std::string name;            // "NVIDIA H100 80GB HBM3"
  std::string id;              // DeviceFacts::id
  int compute_capability = 0;  // 10 * major + minor
  int64_t memory_bytes = 0;
  bool ecc = false;
  std::vector<bool> reaches;  // by ordinal: whether it can read and write that GPU's memory itself
};
// By ordinal. Makes no context. Unavailable where there is no driver or no device.
absl::StatusOr<std::vector<CudaDeviceFacts>> ListCudaDevices();

// Bytes per second of a copy of `bytes` from one GPU's memory to another's, the best of several, directly
// where they reach each other, else as the driver does it. Makes contexts on both, which stay.
absl::StatusOr<double> MeasurePeerCopy(int from, int to, int64_t bytes);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_API_CUDA_DEVICES_H_
