#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_LAUNCH_SHARE_SELECTION_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_LAUNCH_SHARE_SELECTION_CUH_

#include <type_traits>

#include "kernels/cuda/hopper/index/launch_share_selection.h"
#include "kernels/cuda/hopper/index/share_consumer.cuh"
#include "kernels/cuda/hopper/index/share_producer.cuh"
#include "kernels/cuda/hopper/index/share_selection.h"
#include "kernels/cuda/launch.h"

namespace longfill::cuda::hopper {
namespace share {

static_assert(kTileRows == kHopperShareRows);

// A thread block does one tile of one head.
template <typename Element, typename ShapeOf>
__global__ void __launch_bounds__(kThreads, 1)
    HopperShareSelectionKernel(const __grid_constant__ ShareSelectionArgs args,
                               const __grid_constant__ ShareMaps maps) {
  extern __shared__ __align__(1024) char shared[];
  auto* memory = reinterpret_cast<Memory<ShapeOf>*>(shared);
  if (threadIdx.x == 0) Init(args, memory);
  __syncthreads();
  // In a form that the compiler knows to be the same in all lanes of a warp.
  const int warpgroup =
      __shfl_sync(attention::kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == kRowBlocks) {
    GiveRegisters<kProducerRegisters<Memory<ShapeOf>::kFp8>>();
    Producer<ShapeOf>(args, maps, memory).Run();
  } else {
    TakeRegisters<kConsumerRegisters<Memory<ShapeOf>::kFp8>>();
    Consumer<Element, ShapeOf>(args, warpgroup, memory).Run();
  }
}

}  // namespace share

template <DType kDType, int kHeadDim, bool kFp8>
absl::Status LaunchShareSelection(const ShareSelectionArgs& args, int64_t num_tiles, const ShareMaps& maps,
                                  cudaStream_t stream) {
  using Element = std::conditional_t<kDType == DType::kBFloat16, __nv_bfloat16, __half>;
  using ShapeOf = Shape<kHeadDim, kFp8 ? 1 : 2>;
  static_assert(sizeof(share::Memory<ShapeOf>) <= 227 << 10);  // of a thread block on sm_90
  return Launch("HopperShareSelectionKernel", share::HopperShareSelectionKernel<Element, ShapeOf>,
                {.grid_x = num_tiles * args.num_heads,
                 .block = share::kThreads,
                 .shared_bytes = sizeof(share::Memory<ShapeOf>)},
                stream, args, maps);
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_LAUNCH_SHARE_SELECTION_CUH_
