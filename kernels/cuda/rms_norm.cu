#include "kernels/cuda/check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packed.cuh"

namespace longfill {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kSmallBlock = 128;  // where a warp or less takes a row

// Sum over the kGroup threads of a row, in all of them and in the same order for every row. kGroup is a power
// of 2: part of a warp, or the block.
template <int kGroup>
__device__ float GroupSum(float value) {
#pragma unroll
  for (int step = (kGroup < kWarp ? kGroup : kWarp) / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFF, value, step);
  }
  if constexpr (kGroup > kWarp) {
    __shared__ float sums[kGroup / kWarp];
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = 0;
#pragma unroll
    for (int warp = 0; warp < kGroup / kWarp; ++warp) value += sums[warp];
  }
  return value;
}

struct RmsNormArguments {
  const void* x;
  const float* weight;
  float epsilon;
  int64_t num_rows;
  int64_t width;
  void* out;
};

template <typename T, int kCount>
__device__ float SumOfSquares(const Packed<T, kCount>& packed) {
  float values[kCount];
  packed.Widen(values);
  float sum = 0;
#pragma unroll
  for (int e = 0; e < kCount; ++e) sum += values[e] * values[e];
  return sum;
}

template <typename T, int kCount>
__device__ void ScaleAndStore(const Packed<T, kCount>& packed, float scale, const float* weight, T* out) {
  float values[kCount];
  float weights[kCount];
  packed.Widen(values);
  Packed<float, kCount>::Load(weight).Widen(weights);
#pragma unroll
  for (int e = 0; e < kCount; ++e) values[e] *= scale * weights[e];
  Packed<T, kCount>::Narrow(values).Store(out);
}

// kGroup threads take a row, which stays in their registers between the sum and the scaling up to kHeld
// accesses of each thread; what a longer row has beyond that is read again. x may be out: a row is read whole
// by its group before it is written.
template <typename T, int kCount, int kGroup, int kHeld>
__global__ void __launch_bounds__(kGroup > kWarp ? kGroup : kSmallBlock)
    RmsNormKernel(const RmsNormArguments arguments) {
  constexpr int kRowsOfBlock = kGroup > kWarp ? 1 : kSmallBlock / kGroup;
  constexpr int64_t kStep = int64_t{kGroup} * kCount;
  const int64_t row = int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.x / kGroup;
  const bool exists = row < arguments.num_rows;  // a group that has no row takes part in the warp's sums
  const int64_t width = exists ? arguments.width : 0;
  const T* x = static_cast<const T*>(arguments.x) + row * arguments.width;
  T* out = static_cast<T*>(arguments.out) + row * arguments.width;
  const int64_t first = int64_t{threadIdx.x % kGroup} * kCount;

  Packed<T, kCount> held[kHeld];
  float sum = 0;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (first + h * kStep < width) held[h] = Packed<T, kCount>::Load(x + first + h * kStep);
  }
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (first + h * kStep < width) sum += SumOfSquares(held[h]);
  }
  for (int64_t i = first + kHeld * kStep; i < width; i += kStep) {
    sum += SumOfSquares(Packed<T, kCount>::Load(x + i));
  }
  sum = GroupSum<kGroup>(sum);
  const float scale = 1.0F / sqrtf(sum / static_cast<float>(arguments.width) + arguments.epsilon);
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int64_t i = first + h * kStep;
    if (i < width) ScaleAndStore(held[h], scale, arguments.weight + i, out + i);
  }
  for (int64_t i = first + kHeld * kStep; i < width; i += kStep) {
    ScaleAndStore(Packed<T, kCount>::Load(x + i), scale, arguments.weight + i, out + i);
  }
}

template <typename T, int kCount, int kGroup, int kHeld>
absl::Status RunVariant(const RmsNormArguments& arguments, cudaStream_t stream) {
  const int block = kGroup > kWarp ? kGroup : kSmallBlock;
  return Launch("RmsNormKernel", RmsNormKernel<T, kCount, kGroup, kHeld>,
                {.grid_x = CeilDiv(arguments.num_rows, block / kGroup), .block = block}, stream, arguments);
}

template <typename T>
absl::Status Run(const RmsNormArguments& arguments, cudaStream_t stream) {
  const int64_t width = arguments.width;
  if (width % kPackedCount != 0 || !AlignedTo16(arguments.x, arguments.weight, arguments.out)) {
    if (width <= 1024) return RunVariant<T, 1, 32, 8>(arguments, stream);
    return RunVariant<T, 1, 512, 8>(arguments, stream);
  }
  if (width <= 64) return RunVariant<T, kPackedCount, 8, 1>(arguments, stream);
  if (width <= 128) return RunVariant<T, kPackedCount, 16, 1>(arguments, stream);
  if (width <= 256) return RunVariant<T, kPackedCount, 32, 1>(arguments, stream);
  if (width <= 1024) return RunVariant<T, kPackedCount, 32, 4>(arguments, stream);
  if (width <= 4096) return RunVariant<T, kPackedCount, 128, 4>(arguments, stream);
  if (width <= 16384) return RunVariant<T, kPackedCount, 512, 4>(arguments, stream);
  return RunVariant<T, kPackedCount, 512, 8>(arguments, stream);  // 32768 in registers
}

}  // namespace
}  // namespace cuda

absl::Status CudaRmsNorm(const RmsNormParams& params, DType compute_dtype, const DeviceLimits& /*limits*/,
                         cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("rms norm", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("rms norm", "width", params.width, 1));
  const cuda::RmsNormArguments arguments = {params.x,        params.weight, params.epsilon,
                                            params.num_rows, params.width,  params.out};
  return cuda::WithComputeType(compute_dtype, [&]<typename T>() { return cuda::Run<T>(arguments, stream); });
}

}  // namespace longfill
