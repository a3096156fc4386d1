#ifndef LONGFILL_KERNELS_CUDA_HOPPER_KEY_PRODUCTS_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_KEY_PRODUCTS_CUH_

#include <cstdint>

#include "kernels/cuda/hopper/wgmma.cuh"

namespace longfill::cuda::hopper {

// scores = q K^T for the 64 keys of a slot at `keys` in shared memory, which lie as ShapeOf says. One
// warpgroup, between StartProducts and EndProducts.
template <typename Element, typename ShapeOf>
__device__ __forceinline__ void MultiplySlotKeys(const uint32_t (&q)[ShapeOf::kSteps][4], uint32_t keys,
                                                 float (&scores)[32]) {
  using Descriptor = BDescriptor<ShapeOf::kRowBytes>;
  constexpr int kStepsOfBlock = ShapeOf::kRowBytes / 32;
  const uint32_t low = Descriptor::Low(keys);
#pragma unroll
  for (int i = 0; i < ShapeOf::kSteps; ++i) {
    const uint32_t at = low + (i / kStepsOfBlock * ShapeOf::kBlockBytes + i % kStepsOfBlock * 32) / 16;
    if (i == 0) {
      MultiplyKeys<Element, false>(scores, q[i], Descriptor::Of(at));
    } else {
      MultiplyKeys<Element, true>(scores, q[i], Descriptor::Of(at));
    }
  }
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_KEY_PRODUCTS_CUH_
