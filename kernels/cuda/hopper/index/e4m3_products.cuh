#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_E4M3_PRODUCTS_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_E4M3_PRODUCTS_CUH_

// Products of a warpgroup with both factors in E4M3 (PTX ISA: wgmma, m64n64k32), beside wgmma.cuh. A [64, 32]
// has 4 registers: with group g and place t of a lane, rows 16 w + g and 16 w + g + 8 of columns 4t .. 4t +
// 3, then the same of columns 4t + 16 .. 4t + 19. C lies as for 16-bit factors. The tensor cores add products
// with about 13 bits.

#include <cstdint>

#include "kernels/cuda/hopper/index/share_memory.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"
#include "kernels/cuda/index/e4m3.cuh"

namespace longfill::cuda::hopper::share {

using share_selection::E4m3Scale;

// Of BDescriptor (wgmma.cuh), for rows of 32, 64 or 128 bytes.
template <int kRowBytes>
struct E4m3Descriptor {
  static constexpr uint32_t kStride = 8 * kRowBytes / 16;
  static constexpr uint32_t kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  static constexpr uint32_t kHigh = kStride | kSwizzle << 30;

  __device__ __forceinline__ static uint32_t Low(uint32_t address) { return address >> 4 | 1U << 16; }
  __device__ __forceinline__ static uint64_t Of(uint32_t low) { return uint64_t{kHigh} << 32 | low; }
};

// c = a * B^T + (keep ? c : 0) for 64 columns and 32 dims.
template <bool kKeep>
__device__ __forceinline__ void MultiplyE4m3(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
#define LF_C8(i)                                                                                          \
  "+f"(c[(i)]), "+f"(c[(i) + 1]), "+f"(c[(i) + 2]), "+f"(c[(i) + 3]), "+f"(c[(i) + 4]), "+f"(c[(i) + 5]), \
      "+f"(c[(i) + 6]), "+f"(c[(i) + 7])
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, keep, 1, 1;\n}\n"
      : LF_C8(0), LF_C8(8), LF_C8(16), LF_C8(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kKeep ? 1 : 0));
#undef LF_C8
}

// scores = q B^T for the 64 rows of a stage. One warpgroup, between StartProducts and EndProducts.
template <typename ShapeOf>
__device__ __forceinline__ void MultiplyStage(const uint32_t (&q)[ShapeOf::kSteps][4], uint32_t stage,
                                              float (&scores)[32]) {
  using Descriptor = E4m3Descriptor<ShapeOf::kRowBytes>;
  constexpr int kStepsOfBlock = ShapeOf::kRowBytes / 32;
  const uint32_t low = Descriptor::Low(stage);
#pragma unroll
  for (int i = 0; i < ShapeOf::kSteps; ++i) {
    const uint32_t at = low + (i / kStepsOfBlock * ShapeOf::kBlockBytes + i % kStepsOfBlock * 32) / 16;
    if (i == 0) {
      MultiplyE4m3<false>(scores, q[i], Descriptor::Of(at));
    } else {
      MultiplyE4m3<true>(scores, q[i], Descriptor::Of(at));
    }
  }
}

// The 64 queries of a warpgroup, of 16-bit Elements, as A.
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

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_E4M3_PRODUCTS_CUH_
