#ifndef LONGFILL_KERNELS_CUDA_ELEMENTWISE_H_
#define LONGFILL_KERNELS_CUDA_ELEMENTWISE_H_

// KernelSet's operations of the same names, in bfloat16 or float16 with fp32 arithmetic: one rounding, at the
// end. Accesses are 16 bytes wide where widths, strides and pointers are multiples of that, else one element.

#include <cuda_runtime_api.h>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

absl::Status CudaFillRandom(const FillRandomParams& params, const DeviceLimits& limits, cudaStream_t stream);
absl::Status CudaEmbed(const EmbedParams& params, DType compute_dtype, const DeviceLimits& limits,
                       cudaStream_t stream);
absl::Status CudaRmsNorm(const RmsNormParams& params, DType compute_dtype, const DeviceLimits& limits,
                         cudaStream_t stream);
absl::Status CudaGatedActivation(const GatedActivationParams& params, DType compute_dtype,
                                 const DeviceLimits& limits, cudaStream_t stream);
absl::Status CudaRotary(const RotaryParams& params, DType compute_dtype, const DeviceLimits& limits,
                        cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_ELEMENTWISE_H_
