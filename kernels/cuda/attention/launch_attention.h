#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_LAUNCH_ATTENTION_H_
#define LONGFILL_KERNELS_CUDA_ATTENTION_LAUNCH_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/device_limits.h"

namespace longfill::cuda::attention {

// One launch over all items whose index wants tiles of kTileRows rows (IsWide in key_ranges.cuh), which only
// the device knows, or with args.wide_tiles off over all items. SharedBytes are of a thread block; those of
// 64 rows fit any device, those of 128 not every one. Both instantiated for bfloat16 and float16, head dims
// 64, 96, 128 and 256, tiles of 64 and 128 rows.
template <DType kDType, int kHeadDim, int kTileRows>
absl::Status LaunchAttention(const Args& args, int cta_limit, const DeviceLimits& limits,
                             cudaStream_t stream);
template <DType kDType, int kHeadDim, int kTileRows>
int64_t SharedBytes();

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_LAUNCH_ATTENTION_H_
