#include "kernels/base/random_weights.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packed.cuh"

namespace longfill {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads)
    FillRandomKernel(T* out, int64_t count, int64_t first, uint64_t start, float stddev) {
  const int64_t pieces = count / kCount;
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t piece = thread; piece < pieces; piece += threads) {
    float values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = random_weights::Element(start, first + piece * kCount + i, stddev);
    }
    Packed<T, kCount>::Narrow(values).Store(out + piece * kCount);
  }
  const int64_t rest = pieces * kCount + thread;
  if (rest < count) out[rest] = FromFloat<T>(random_weights::Element(start, first + rest, stddev));
}

}  // namespace
}  // namespace cuda

absl::Status CudaFillRandom(const FillRandomParams& params, const DeviceLimits& limits, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("fill random", "count", params.count, 0));
  LF_RETURN_IF_ERROR(cuda::CheckFloat("fill random", "an array", params.dtype));
  return cuda::WithFloatType(params.dtype, [&]<typename T>() {
    return cuda::WithPackedCount(cuda::AlignedTo16(params.out), [&]<int kCount>() {
      const int64_t blocks = CeilDiv(params.count, int64_t{cuda::kThreads} * kCount);
      return Launch("FillRandomKernel", cuda::FillRandomKernel<T, kCount>,
                    {.grid_x = LoopGrid(blocks, limits.num_sms, 8), .block = cuda::kThreads}, stream,
                    static_cast<T*>(params.out), params.count, params.first,
                    random_weights::Start(params.seed), params.stddev);
    });
  });
}

}  // namespace longfill
