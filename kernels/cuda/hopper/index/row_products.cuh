#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_ROW_PRODUCTS_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_ROW_PRODUCTS_CUH_

// Products of a warpgroup with both factors in shared memory (PTX ISA: wgmma): C [64, 128] = A [64, 16] *
// B [128, 16]^T. Both lie as rows of 64 elements (128 bytes, 1024 bytes aligned for each 8 rows) with the
// swizzle of 128 bytes. C is as in wgmma.cuh.

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>

#include "kernels/cuda/hopper/wgmma.cuh"

namespace longfill::cuda::hopper {

inline constexpr int kSwizzledRowBytes = 128;
inline constexpr int kEightRowsBytes = 8 * kSwizzledRowBytes;

// The low half of a descriptor of 16 elements of each of the rows from `address` on. Elements further on in
// the rows, and rows in multiples of eight, are an offset in units of 16 bytes, which is added.
inline constexpr int kRowsUnit = 16;
__device__ __forceinline__ uint32_t RowsFrom(uint32_t address) {
  constexpr uint32_t kLeading = 1;  // of no meaning with rows of a whole swizzle
  return address / kRowsUnit | kLeading << 16;
}
// The whole: groups of eight rows lie kStride bytes apart.
template <int kStride>
__device__ __forceinline__ uint64_t RowsDescriptor(uint32_t rows) {
  constexpr uint32_t kSwizzle128 = 1;
  constexpr uint32_t kHigh = kStride / kRowsUnit | kSwizzle128 << 30;
  return uint64_t{kHigh} << 32 | rows;
}

#define LF_C8(c, i)                                                                               \
  "+f"((c)[(i)]), "+f"((c)[(i) + 1]), "+f"((c)[(i) + 2]), "+f"((c)[(i) + 3]), "+f"((c)[(i) + 4]), \
      "+f"((c)[(i) + 5]), "+f"((c)[(i) + 6]), "+f"((c)[(i) + 7])
#define LF_C64(c) \
  LF_C8(c, 0), LF_C8(c, 8), LF_C8(c, 16), LF_C8(c, 24), LF_C8(c, 32), LF_C8(c, 40), LF_C8(c, 48), LF_C8(c, 56)
#define LF_WGMMA(type)                                                                                     \
  "{\n.reg .pred keep;\nsetp.ne.b32 keep, %66, 0;\n"                                                       \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                             \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "   \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "   \
  "%62, %63}, %64, %65, keep, 1, 1, 0, 0;\n}\n"

// c = a * b^T + (keep ? c : 0), of rows in groups of eight that lie so many bytes apart.
template <typename Element, int kStrideOfA, int kStrideOfB>
__device__ __forceinline__ void MultiplyRows(float (&c)[64], uint32_t a_rows, uint32_t b_rows, bool keep) {
  const uint64_t a = RowsDescriptor<kStrideOfA>(a_rows);
  const uint64_t b = RowsDescriptor<kStrideOfB>(b_rows);
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm volatile(LF_WGMMA("bf16") : LF_C64(c) : "l"(a), "l"(b), "r"(keep ? 1 : 0));
  } else {
    asm volatile(LF_WGMMA("f16") : LF_C64(c) : "l"(a), "l"(b), "r"(keep ? 1 : 0));
  }
}

#undef LF_WGMMA
#undef LF_C64
#undef LF_C8

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_ROW_PRODUCTS_CUH_
