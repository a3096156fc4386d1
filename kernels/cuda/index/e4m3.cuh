#ifndef LONGFILL_KERNELS_CUDA_INDEX_E4M3_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_E4M3_CUH_

// Numbers that are rounded to E4M3 together (head_pattern.h, BlockShare::fp8). Devices before sm_89 convert
// in software.

#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/sparse/head_pattern.h"

namespace longfill::cuda::share_selection {

// A power of two and its inverse, both normal numbers.
struct E4m3Scale {
  float scale;    // brings the largest magnitude into [128, 256), at most 2^kMostFp8Power
  float inverse;  // takes it out of products

  // `largest` is not negative. With kMostFp8Power what is added for samples stays finite, divided by the
  // scales of queries and of a block that are all zeros.
  __device__ __forceinline__ static E4m3Scale Of(float largest) {
    const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23) - 127, 7 - kMostFp8Power);
    return {__uint_as_float(static_cast<uint32_t>(127 + 7 - exponent) << 23),
            __uint_as_float(static_cast<uint32_t>(127 - 7 + exponent) << 23)};
  }
};

// The first in the low byte.
__device__ __forceinline__ uint32_t PairToE4m3(float2 pair, float scale) {
  return __nv_cvt_float2_to_fp8x2({pair.x * scale, pair.y * scale}, __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ float2 FromE4m3(uint32_t pair, float inverse) {
  const __half2 values = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  const float2 wide = __half22float2(values);
  return {wide.x * inverse, wide.y * inverse};
}

// As 16-bit elements, which hold what E4M3 does; but for fp16 what would be rounded to 65536 is the largest
// number that it has.
template <typename Element>
__device__ __forceinline__ uint32_t NarrowE4m3(float2 pair) {
  if constexpr (std::is_same_v<Element, __half>) {
    constexpr float kMost = 65504;
    pair = {fminf(fmaxf(pair.x, -kMost), kMost), fminf(fmaxf(pair.y, -kMost), kMost)};
  }
  return NarrowPair<Element>(pair.x, pair.y);
}

__device__ __forceinline__ float LargestMagnitude(float2 pair) { return fmaxf(fabsf(pair.x), fabsf(pair.y)); }
// Of all lanes of a warp.
__device__ __forceinline__ float WarpMax(float value) {
  for (int step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(attention::kAllLanes, value, step));
  }
  return value;
}

}  // namespace longfill::cuda::share_selection

#endif  // LONGFILL_KERNELS_CUDA_INDEX_E4M3_CUH_
