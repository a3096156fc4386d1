#ifndef LONGFILL_KERNELS_CUDA_HOPPER_WGMMA_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_WGMMA_CUH_

// Matrix products of a warpgroup (PTX ISA: wgmma), A and C in registers, B in shared memory. Lane l of warp w
// (of the four) has group g = l / 4 and place t = l % 4:
//   A [64, 16], 4 registers: rows 16 w + g and 16 w + g + 8 of columns 2t, 2t + 1, then the same of columns
//   2t + 8, 2t + 9
//   A [64, 32] of E4M3: the same of columns 4t .. 4t + 3, then of 4t + 16 .. 4t + 19
//   C [64, N], N / 2 floats: for each 8 columns row 16 w + g, columns 2t, 2t + 1; row 16 w + g + 8, the same
// Products run on their own once issued: between StartProducts and the wait that ends them nobody touches the
// registers of A and C.

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/attention/tile_rows.cuh"

namespace longfill::cuda::hopper {

// B in shared memory as blocks of kBlockBytes (the width of the swizzle, 32, 64 or 128) x 64 keys. The low
// half of a descriptor is the address and the leading offset, the high one the stride and the swizzle, all
// offsets in units of 16 bytes.
//   K [64 keys, 16 dims, or 32 of E4M3], K-major: the stride leads from 8 keys to the next 8; the next dims
//   are 32 bytes on; the leading offset is not read.
//   V [16 keys, N dims], N-major: the leading offset leads from block to block, the stride from 8 keys to the
//   next 8.
template <int kBlockBytes>
struct BDescriptor {
  static_assert(kBlockBytes == 32 || kBlockBytes == 64 || kBlockBytes == 128);
  static constexpr uint32_t kStride = 8 * kBlockBytes / 16;
  static constexpr uint32_t kSwizzle = kBlockBytes == 128 ? 1 : kBlockBytes == 64 ? 2 : 3;
  static constexpr uint32_t kHigh = kStride | kSwizzle << 30;
  static constexpr uint32_t kLeading = 64 * kBlockBytes / 16;

  // `address` in shared memory, below 256 KB.
  __device__ __forceinline__ static uint32_t Low(uint32_t address) { return address >> 4 | kLeading << 16; }
  __device__ __forceinline__ static uint64_t Of(uint32_t low) { return uint64_t{kHigh} << 32 | low; }
};

// As the type of elements: both factors are E4M3. The tensor cores add their products with about 13 bits.
struct E4m3 {};

// Orders what this warp did with registers of A and C before products that follow.
__device__ __forceinline__ void StartProducts() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
// Ends a group of products.
__device__ __forceinline__ void EndProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Until at most kGroups of the groups are under way.
template <int kGroups>
__device__ __forceinline__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroups) : "memory");
}
// Keeps the compiler from moving other uses of registers over this place.
template <int kCount>
__device__ __forceinline__ void Pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kRows, int kCount>
__device__ __forceinline__ void Pin(uint32_t (&registers)[kRows][kCount]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
  }
}

// Ends a stretch of code only when `value`, which is never negative, is there. ptxas knows nothing of Pin and
// would move what `value` is made of beyond a wait for products that comes next, so that they do not run side
// by side.
__device__ __forceinline__ void ComputeBeforeHere(float value) {
  if (__any_sync(attention::kAllLanes, value < 0)) asm volatile("trap;\n");
}

// Of a condition that is the same in all lanes, in a form that the compiler knows to be so: products in a
// branch that lanes might take differently are waited for one by one.
__device__ __forceinline__ bool InAllLanes(bool condition) {
  return __any_sync(attention::kAllLanes, condition) != 0;
}

// The operands of 16 columns of C, eight registers.
#define LF_C8(c, i)                                                                               \
  "+f"((c)[(i)]), "+f"((c)[(i) + 1]), "+f"((c)[(i) + 2]), "+f"((c)[(i) + 3]), "+f"((c)[(i) + 4]), \
      "+f"((c)[(i) + 5]), "+f"((c)[(i) + 6]), "+f"((c)[(i) + 7])
#define LF_C32(c) LF_C8(c, 0), LF_C8(c, 8), LF_C8(c, 16), LF_C8(c, 24)
#define LF_C48(c) LF_C32(c), LF_C8(c, 32), LF_C8(c, 40)
#define LF_C64(c) LF_C48(c), LF_C8(c, 48), LF_C8(c, 56)
#define LF_LIST32                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LF_LIST48 LF_LIST32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LF_LIST64 LF_LIST48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// a0 .. a3, the descriptor, whether C's old value counts; then the signs of A and B, and B's majorness.
#define LF_WGMMA(shape, type, list, a0, a1, a2, a3, b, keep, transposed)                                \
  "{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #keep                                                      \
  ", 0;\n"                                                                                              \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" list "}, {%" #a0 ", %" #a1 ", %" #a2 \
  ", %" #a3 "}, %" #b ", keep, 1, 1, " #transposed ";\n}\n"
#define LF_A(a) "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3])

// c = a * K^T + (keep ? c : 0) for 64 keys.
template <typename Element, bool kKeep>
__device__ __forceinline__ void MultiplyKeys(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm volatile(LF_WGMMA("m64n64k16", "bf16", LF_LIST32, 32, 33, 34, 35, 36, 37, 0)
                 : LF_C32(c)
                 : LF_A(a), "l"(b), "n"(kKeep ? 1 : 0));
  } else if constexpr (std::is_same_v<Element, E4m3>) {
    asm volatile(  // B is K-major, which is not said
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" LF_LIST32
        "}, {%32, %33, %34, %35}, %36, keep, 1, 1;\n}\n"
        : LF_C32(c)
        : LF_A(a), "l"(b), "n"(kKeep ? 1 : 0));
  } else {
    asm volatile(LF_WGMMA("m64n64k16", "f16", LF_LIST32, 32, 33, 34, 35, 36, 37, 0)
                 : LF_C32(c)
                 : LF_A(a), "l"(b), "n"(kKeep ? 1 : 0));
  }
}

// c += a * V for 16 keys; of 64, 96 or 128 dims.
template <typename Element>
__device__ __forceinline__ void MultiplyValues(float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm volatile(LF_WGMMA("m64n64k16", "bf16", LF_LIST32, 32, 33, 34, 35, 36, 37, 1)
                 : LF_C32(c)
                 : LF_A(a), "l"(b), "n"(1));
  } else {
    asm volatile(LF_WGMMA("m64n64k16", "f16", LF_LIST32, 32, 33, 34, 35, 36, 37, 1)
                 : LF_C32(c)
                 : LF_A(a), "l"(b), "n"(1));
  }
}
template <typename Element>
__device__ __forceinline__ void MultiplyValues(float (&c)[48], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm volatile(LF_WGMMA("m64n96k16", "bf16", LF_LIST48, 48, 49, 50, 51, 52, 53, 1)
                 : LF_C48(c)
                 : LF_A(a), "l"(b), "n"(1));
  } else {
    asm volatile(LF_WGMMA("m64n96k16", "f16", LF_LIST48, 48, 49, 50, 51, 52, 53, 1)
                 : LF_C48(c)
                 : LF_A(a), "l"(b), "n"(1));
  }
}
template <typename Element>
__device__ __forceinline__ void MultiplyValues(float (&c)[64], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm volatile(LF_WGMMA("m64n128k16", "bf16", LF_LIST64, 64, 65, 66, 67, 68, 69, 1)
                 : LF_C64(c)
                 : LF_A(a), "l"(b), "n"(1));
  } else {
    asm volatile(LF_WGMMA("m64n128k16", "f16", LF_LIST64, 64, 65, 66, 67, 68, 69, 1)
                 : LF_C64(c)
                 : LF_A(a), "l"(b), "n"(1));
  }
}

#undef LF_A
#undef LF_WGMMA
#undef LF_LIST64
#undef LF_LIST48
#undef LF_LIST32
#undef LF_C64
#undef LF_C48
#undef LF_C32
#undef LF_C8

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_WGMMA_CUH_
