#ifndef LONGFILL_KERNELS_CUDA_CUDA_KERNEL_SET_H_
#define LONGFILL_KERNELS_CUDA_CUDA_KERNEL_SET_H_

#include <memory>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

// Kernels of the device of `limits`; `memory` is its memory and outlives the result. compute_dtype is
// bfloat16 or float16. Any thread may call, one at a time.
absl::StatusOr<std::unique_ptr<KernelSet>> CreateCudaKernelSet(const DeviceLimits& limits,
                                                               DType compute_dtype, MemoryResource& memory);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_CUDA_KERNEL_SET_H_
