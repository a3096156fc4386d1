#include "kernels/cuda/check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packed.cuh"

namespace longfill {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// One block for each row.
template <typename T, typename Table, int kCount>
__global__ void __launch_bounds__(kThreads)
    EmbedKernel(const int32_t* ids, const Table* table, int64_t width, T* out) {
  const int64_t row = blockIdx.x;
  const Table* from = table + int64_t{ids[row]} * width;
  T* to = out + row * width;
  for (int64_t i = int64_t{threadIdx.x} * kCount; i < width; i += int64_t{kThreads} * kCount) {
    float values[kCount];
    Packed<Table, kCount>::Load(from + i).Widen(values);
    Packed<T, kCount>::Narrow(values).Store(to + i);
  }
}

}  // namespace
}  // namespace cuda

absl::Status CudaEmbed(const EmbedParams& params, DType compute_dtype, const DeviceLimits& /*limits*/,
                       cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("embed", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("embed", "width", params.width, 0));
  LF_RETURN_IF_ERROR(cuda::CheckFloat("embed", "a table", params.table_dtype));
  if (params.width == 0) return absl::OkStatus();
  const bool aligned = params.width % cuda::kPackedCount == 0 && cuda::AlignedTo16(params.table, params.out);
  return cuda::WithComputeType(compute_dtype, [&]<typename T>() {
    return cuda::WithFloatType(params.table_dtype, [&]<typename Table>() {
      return cuda::WithPackedCount(aligned, [&]<int kCount>() {
        return Launch("EmbedKernel", cuda::EmbedKernel<T, Table, kCount>,
                      {.grid_x = params.num_rows, .block = cuda::kThreads}, stream, params.ids,
                      static_cast<const Table*>(params.table), params.width, static_cast<T*>(params.out));
      });
    });
  });
}

}  // namespace longfill
