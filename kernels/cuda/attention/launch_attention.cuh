#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_LAUNCH_ATTENTION_CUH_
#define LONGFILL_KERNELS_CUDA_ATTENTION_LAUNCH_ATTENTION_CUH_

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attention/attention_kernel.cuh"
#include "kernels/cuda/attention/launch_attention.h"
#include "kernels/cuda/launch.h"

namespace longfill::cuda::attention {

inline constexpr int64_t kSharedBytesOfBlock = 1024;        // that the system keeps for each thread block
inline constexpr int64_t kSharedBytesOfHopper = 228 << 10;  // of an SM

inline constexpr int64_t kLeastSharedBytes = 99 << 10;  // of a thread block, on sm_86, sm_89 and sm_12x

template <DType kDType, int kHeadDim, int kTileRows>
int64_t SharedBytes() {
  return sizeof(SharedMemory<TileShape<kHeadDim, kTileRows>>);
}

template <DType kDType, int kHeadDim, int kTileRows>
absl::Status LaunchAttention(const Args& args, int cta_limit, const DeviceLimits& limits,
                             cudaStream_t stream) {
  using Element = std::conditional_t<kDType == DType::kBFloat16, __nv_bfloat16, __half>;
  using Shape = TileShape<kHeadDim, kTileRows>;
  constexpr int64_t kSharedBytes = sizeof(SharedMemory<Shape>);
  static_assert(Shape::kBlocksPerSm * (kSharedBytes + kSharedBytesOfBlock) <= kSharedBytesOfHopper);
  static_assert(kTileRows > 64 || kSharedBytes <= kLeastSharedBytes);
  const auto kernel = AttentionKernel<Element, Shape>;
  LF_RETURN_IF_CUDA_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                               cudaSharedmemCarveoutMaxShared));
  const int64_t blocks_per_sm = std::clamp<int64_t>(
      limits.shared_bytes_per_sm / (kSharedBytes + kSharedBytesOfBlock), 1, Shape::kBlocksPerSm);
  int64_t blocks = std::min<int64_t>(args.num_items, limits.num_sms * blocks_per_sm);
  if (cta_limit > 0) blocks = std::min<int64_t>(blocks, cta_limit);
  return Launch("AttentionKernel", kernel,
                {.grid_x = blocks, .block = Shape::kThreads, .shared_bytes = kSharedBytes}, stream, args);
}

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_LAUNCH_ATTENTION_CUH_
