#ifndef LONGFILL_KERNELS_CUDA_HOPPER_LAUNCH_ATTENTION_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_LAUNCH_ATTENTION_CUH_

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/hopper/attention_kernel.cuh"
#include "kernels/cuda/hopper/launch_attention.h"
#include "kernels/cuda/launch.h"

namespace longfill::cuda::hopper {

template <DType kDType, int kHeadDim>
absl::Status LaunchAttention(const attention::Args& args, int cta_limit, const DeviceLimits& limits,
                             cudaStream_t stream) {
  using Element = std::conditional_t<kDType == DType::kBFloat16, __nv_bfloat16, __half>;
  using ShapeOf = Shape<kHeadDim>;
  constexpr int64_t kSharedBytes = sizeof(SharedMemory<ShapeOf>);
  static_assert(kSharedBytes <= 227 << 10);  // of a thread block on sm_90
  // An SM holds one thread block.
  int64_t blocks = std::min<int64_t>(args.num_items, limits.num_sms);
  if (cta_limit > 0) blocks = std::min<int64_t>(blocks, cta_limit);
  return Launch("AttentionKernel of Hopper", AttentionKernel<Element, ShapeOf>,
                {.grid_x = blocks, .block = kThreads, .shared_bytes = kSharedBytes}, stream, args);
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_LAUNCH_ATTENTION_CUH_
