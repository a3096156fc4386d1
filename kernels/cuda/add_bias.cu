#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packed.cuh"

namespace longfill {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    AddBiasKernel(float* out, int64_t out_stride, const T* bias, int64_t width, uint32_t blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t i = int64_t{blockIdx.x % blocks_per_row} * kThreads + threadIdx.x;
  if (i < width) out[row * out_stride + i] += ToFloat(bias[i]);
}

}  // namespace
}  // namespace cuda

absl::Status AddBias(float* out, int64_t out_stride, const void* bias, DType bias_dtype, int64_t num_rows,
                     int64_t width, cudaStream_t stream) {
  return cuda::WithComputeType(bias_dtype, [&]<typename T>() {
    const int64_t blocks_per_row = CeilDiv(width, cuda::kThreads);
    return Launch("AddBiasKernel", cuda::AddBiasKernel<T>,
                  {.grid_x = num_rows * blocks_per_row, .block = cuda::kThreads}, stream, out, out_stride,
                  static_cast<const T*>(bias), width, static_cast<uint32_t>(blocks_per_row));
  });
}

}  // namespace longfill
