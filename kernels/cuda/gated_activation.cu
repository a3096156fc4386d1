#include "kernels/cuda/check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packed.cuh"

namespace longfill {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 2;  // accesses of each input in flight

// silu(x) is x over 1 + exp(-x). So is the tanh form of gelu, with exp(-2u), u = sqrt(2 / pi) (x + 0.044715
// x^3): (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)). The fast exponential and quotient are exact to 2^-18 where
// the result is not below 2^-100: nothing of that shows in 16 bits.
template <Activation kActivation>
__device__ float Activate(float x) {
  constexpr float kTwoRootTwoOverPi = 1.5957691216057308F;
  const float exponent =
      kActivation == Activation::kSilu ? x : kTwoRootTwoOverPi * (x + 0.044715F * x * x * x);
  return __fdividef(x, 1.0F + __expf(-exponent));
}

// A block takes kThreads * kPerThread accesses of one row. No pointer is restricted: out may be gate.
template <typename T, int kCount, Activation kActivation>
__global__ void __launch_bounds__(kThreads)
    GatedActivationKernel(const T* gate, const T* up, int64_t in_stride, int64_t width,
                          uint32_t blocks_per_row, T* out) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t begin = int64_t{blockIdx.x % blocks_per_row} * kThreads * kPerThread * kCount;
  gate += row * in_stride;
  up += row * in_stride;
  out += row * width;
  Packed<T, kCount> gates[kPerThread];
  Packed<T, kCount> ups[kPerThread];
#pragma unroll
  for (int p = 0; p < kPerThread; ++p) {
    const int64_t i = begin + (int64_t{p} * kThreads + threadIdx.x) * kCount;
    if (i < width) {
      gates[p] = Packed<T, kCount>::Load(gate + i);
      ups[p] = Packed<T, kCount>::Load(up + i);
    }
  }
#pragma unroll
  for (int p = 0; p < kPerThread; ++p) {
    const int64_t i = begin + (int64_t{p} * kThreads + threadIdx.x) * kCount;
    if (i >= width) break;
    float a[kCount];
    float b[kCount];
    gates[p].Widen(a);
    ups[p].Widen(b);
#pragma unroll
    for (int e = 0; e < kCount; ++e) a[e] = Activate<kActivation>(a[e]) * b[e];
    Packed<T, kCount>::Narrow(a).Store(out + i);
  }
}

template <Activation kActivation>
absl::Status Run(const GatedActivationParams& params, DType compute_dtype, cudaStream_t stream) {
  const bool aligned = params.width % kPackedCount == 0 && params.in_stride % kPackedCount == 0 &&
                       AlignedTo16(params.gate, params.up, params.out);
  return WithComputeType(compute_dtype, [&]<typename T>() {
    return WithPackedCount(aligned, [&]<int kCount>() {
      const int64_t blocks_per_row = CeilDiv(params.width, int64_t{kThreads} * kPerThread * kCount);
      return Launch("GatedActivationKernel", GatedActivationKernel<T, kCount, kActivation>,
                    {.grid_x = params.num_rows * blocks_per_row, .block = kThreads}, stream,
                    static_cast<const T*>(params.gate), static_cast<const T*>(params.up), params.in_stride,
                    params.width, static_cast<uint32_t>(blocks_per_row), static_cast<T*>(params.out));
    });
  });
}

}  // namespace
}  // namespace cuda

absl::Status CudaGatedActivation(const GatedActivationParams& params, DType compute_dtype,
                                 const DeviceLimits& /*limits*/, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("gated activation", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("gated activation", "width", params.width, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("gated activation", "in_stride", params.in_stride, params.width));
  switch (params.activation) {
    case Activation::kSilu:
      return cuda::Run<Activation::kSilu>(params, compute_dtype, stream);
    case Activation::kGeluTanh:
      return cuda::Run<Activation::kGeluTanh>(params, compute_dtype, stream);
  }
  return absl::UnimplementedError(
      absl::StrCat("gated activation: no variant ", static_cast<int>(params.activation)));
}

}  // namespace longfill
