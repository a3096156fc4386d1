#ifndef LONGFILL_KERNELS_CUDA_HOPPER_HEAD_DIMS_H_
#define LONGFILL_KERNELS_CUDA_HOPPER_HEAD_DIMS_H_

#include <cstdint>

#include "kernels/cuda/device_limits.h"

namespace longfill::cuda::hopper {

// Whether the kernels of this folder serve heads of such a dim on the device.
inline bool ServesHeadDim(int64_t head_dim, const DeviceLimits& limits) {
  return limits.compute_capability == 90 && !limits.generic_kernels &&
         (head_dim == 64 || head_dim == 96 || head_dim == 128);
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_HEAD_DIMS_H_
