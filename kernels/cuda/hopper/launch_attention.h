#ifndef LONGFILL_KERNELS_CUDA_HOPPER_LAUNCH_ATTENTION_H_
#define LONGFILL_KERNELS_CUDA_HOPPER_LAUNCH_ATTENTION_H_

#include <cuda_runtime_api.h>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/device_limits.h"

namespace longfill::cuda::hopper {

// One launch over all items, which are tiles of 128 rows. Instantiated for bfloat16 and float16, head dims
// 64, 96 and 128.
template <DType kDType, int kHeadDim>
absl::Status LaunchAttention(const attention::Args& args, int cta_limit, const DeviceLimits& limits,
                             cudaStream_t stream);

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_LAUNCH_ATTENTION_H_
