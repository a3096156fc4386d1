#ifndef LONGFILL_KERNELS_CUDA_PACKED_CUH_
#define LONGFILL_KERNELS_CUDA_PACKED_CUH_

// Elements of a storage type as one memory access brings them, and their way to fp32 and back.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

namespace longfill::cuda {

inline constexpr int kPackedCount = 8;  // 16 bytes of a 16-bit type

__device__ inline float ToFloat(float value) { return value; }
__device__ inline float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float ToFloat(__half value) { return __half2float(value); }

template <typename T>
__device__ inline T FromFloat(float value) {  // to nearest even
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// Two 16-bit numbers of one register, the first in the low half.
template <typename T>
__device__ inline float2 WidenPair(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  } else {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000)};
  }
}
template <typename T>
__device__ inline uint32_t NarrowPair(float first, float second) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// kCount elements of T: 1, or kPackedCount at an address that is a multiple of 16.
template <typename T, int kCount>
struct Packed {
  static_assert(kCount == 1);
  T element;

  __device__ static Packed Load(const T* from) { return {*from}; }
  __device__ void Store(T* to) const { *to = element; }
  __device__ void Widen(float (&to)[1]) const { to[0] = ToFloat(element); }
  __device__ static Packed Narrow(const float (&from)[1]) { return {FromFloat<T>(from[0])}; }
};

template <typename T>
struct Packed<T, kPackedCount> {
  static_assert(sizeof(T) == 2);
  uint4 words;

  __device__ static Packed Load(const T* from) { return {*reinterpret_cast<const uint4*>(from)}; }
  // As an assignment the compiler makes four stores of it where it finds the words apart.
  __device__ void Store(T* to) const { __stwb(reinterpret_cast<uint4*>(to), words); }
  __device__ void Widen(float (&to)[kPackedCount]) const {
    const float2 pairs[] = {WidenPair<T>(words.x), WidenPair<T>(words.y), WidenPair<T>(words.z),
                            WidenPair<T>(words.w)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = pairs[i].x;
      to[2 * i + 1] = pairs[i].y;
    }
  }
  __device__ static Packed Narrow(const float (&from)[kPackedCount]) {
    return {{NarrowPair<T>(from[0], from[1]), NarrowPair<T>(from[2], from[3]),
             NarrowPair<T>(from[4], from[5]), NarrowPair<T>(from[6], from[7])}};
  }
};

template <>
struct Packed<float, kPackedCount> {
  float4 low, high;

  __device__ static Packed Load(const float* from) {
    const auto* words = reinterpret_cast<const float4*>(from);
    return {words[0], words[1]};
  }
  __device__ void Store(float* to) const {
    auto* words = reinterpret_cast<float4*>(to);
    words[0] = low;
    words[1] = high;
  }
  __device__ void Widen(float (&to)[kPackedCount]) const {
    const float all[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kPackedCount; ++i) to[i] = all[i];
  }
  __device__ static Packed Narrow(const float (&from)[kPackedCount]) {
    return {{from[0], from[1], from[2], from[3]}, {from[4], from[5], from[6], from[7]}};
  }
};

// Calls run.template operator()<T>() with the device type of a 16-bit float (a backend has no other compute
// dtype), or of any float.
template <typename Run>
absl::Status WithComputeType(DType dtype, const Run& run) {
  return dtype == DType::kFloat16 ? run.template operator()<__half>()
                                  : run.template operator()<__nv_bfloat16>();
}
template <typename Run>
absl::Status WithFloatType(DType dtype, const Run& run) {
  return dtype == DType::kFloat32 ? run.template operator()<float>() : WithComputeType(dtype, run);
}
// Calls run.template operator()<kCount>() with the elements of an access.
template <typename Run>
absl::Status WithPackedCount(bool aligned, const Run& run) {
  return aligned ? run.template operator()<kPackedCount>() : run.template operator()<1>();
}

}  // namespace longfill::cuda

#endif  // LONGFILL_KERNELS_CUDA_PACKED_CUH_
