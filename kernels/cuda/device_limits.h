#ifndef LONGFILL_KERNELS_CUDA_DEVICE_LIMITS_H_
#define LONGFILL_KERNELS_CUDA_DEVICE_LIMITS_H_

#include <cstdint>

namespace longfill {

// What launches are sized by; read once from the device when its backend is made.
struct DeviceLimits {
  int device = 0;              // ordinal
  int compute_capability = 0;  // 10 * major + minor: 80, 90
  int num_sms = 0;
  int shared_bytes_per_block = 0;  // with the opt-in attribute set on the kernel
  int shared_bytes_per_sm = 0;
  int64_t l2_bytes = 0;
  bool generic_kernels = false;  // CudaBackendOptions
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_DEVICE_LIMITS_H_
