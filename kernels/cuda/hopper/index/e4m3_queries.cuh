#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_E4M3_QUERIES_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_E4M3_QUERIES_CUH_

#include <cstdint>

#include "kernels/cuda/index/e4m3.cuh"

namespace longfill::cuda::hopper::share {

using share_selection::E4m3Scale;

// The 64 queries of a warpgroup, of 16-bit Elements, as A of products of E4M3 (wgmma.cuh).
template <typename Element, typename ShapeOf>
class E4m3Queries {
 public:
  // Row 8 * half of a lane's two, as it is. `data` is where the row begins, aligned to 16 bytes; one that
  // does not exist is zeros.
  __device__ __forceinline__ void Load(const char* data, bool exists, int half) {
    const int place = attention::Lane() % 4;
#pragma unroll
    for (int i = 0; i < ShapeOf::kSteps; ++i) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint2 words = {0, 0};
        if (exists) words = *reinterpret_cast<const uint2*>(data + 64 * i + 32 * part + 8 * place);
        pairs_[i][2 * part + half] = words;
      }
    }
  }
  // Of the lane's elements.
  __device__ __forceinline__ float Largest() const {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < ShapeOf::kSteps; ++i) {
#pragma unroll
      for (const uint2 words : pairs_[i]) {
        largest = fmaxf(largest, share_selection::LargestMagnitude(WidenPair<Element>(words.x)));
        largest = fmaxf(largest, share_selection::LargestMagnitude(WidenPair<Element>(words.y)));
      }
    }
    return largest;
  }
  __device__ __forceinline__ void Round(float scale, uint32_t (*q)[ShapeOf::kSteps][4]) const {
#pragma unroll
    for (int i = 0; i < ShapeOf::kSteps; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = share_selection::PairToE4m3(WidenPair<Element>(pairs_[i][j].x), scale);
        const uint32_t high = share_selection::PairToE4m3(WidenPair<Element>(pairs_[i][j].y), scale);
        (*q)[i][j] = low | high << 16;
      }
    }
  }

 private:
  uint2 pairs_[ShapeOf::kSteps][4];  // four elements of each word of A
};

}  // namespace longfill::cuda::hopper::share

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_E4M3_QUERIES_CUH_
