#include "kernels/cuda/index/pool.h"

#include "absl/strings/str_cat.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packed.cuh"

namespace longfill {
namespace {

constexpr int kThreads = 256;
constexpr int kPacked = cuda::kPackedCount;

// A thread block for each 64 rows of a head. `lanes` threads lie side by side over a row, eight elements
// each, and `groups` of them take turns with the rows.
template <typename Element>
__global__ __launch_bounds__(kThreads) void PoolKernel(const __grid_constant__ PoolParams params, int lanes,
                                                       int groups) {
  __shared__ float partial[kThreads * kPacked];  // [groups][head_dim]
  const int64_t block = blockIdx.x;
  const int64_t head = blockIdx.y;
  const int64_t first = block * kRowBlock;
  const int num_rows = static_cast<int>(min(params.num_rows - first, kRowBlock));
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  if (group < groups) {
    const Element* x = static_cast<const Element*>(params.x.data) + head * params.x.head_stride +
                       first * params.x.row_stride + lane * kPacked;
    float sums[kPacked] = {};
#pragma unroll 4
    for (int row = group; row < num_rows; row += groups) {
      float values[kPacked];
      cuda::Packed<Element, kPacked>::Load(x + row * params.x.row_stride).Widen(values);
#pragma unroll
      for (int i = 0; i < kPacked; ++i) sums[i] += values[i];
    }
#pragma unroll
    for (int i = 0; i < kPacked; ++i) partial[(group * lanes + lane) * kPacked + i] = sums[i];
  }
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i >= params.head_dim) return;
  float sum = partial[i];
  for (int other = 1; other < groups; ++other) sum += partial[other * lanes * kPacked + i];
  params.out[(head * gridDim.x + block) * params.head_dim + i] = sum / static_cast<float>(num_rows);
}

}  // namespace

absl::Status CudaPool(const PoolParams& params, DType compute_dtype, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("pool", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("pool", "num_rows", params.num_rows, 0));
  if (params.head_dim < kPacked || params.head_dim > kThreads || params.head_dim % kPacked != 0) {
    return absl::UnimplementedError(absl::StrCat("pool: no variant for head_dim ", params.head_dim,
                                                 ", only for multiples of ", kPacked, " up to ", kThreads));
  }
  if (!cuda::AlignedTo16(params.x.data, 2 * params.x.head_stride, 2 * params.x.row_stride)) {
    return absl::InvalidArgumentError(
        absl::StrCat("pool: rows must be aligned to 16 bytes, the row stride is ", params.x.row_stride,
                     ", the head stride ", params.x.head_stride));
  }
  const int lanes = static_cast<int>(params.head_dim) / kPacked;
  const int groups = std::min(kThreads / lanes, static_cast<int>(kRowBlock));
  return cuda::WithComputeType(compute_dtype, [&]<typename Element>() {
    return Launch(
        "PoolKernel", PoolKernel<Element>,
        {.grid_x = CeilDiv(params.num_rows, kRowBlock), .grid_y = params.num_heads, .block = kThreads},
        stream, params, lanes, groups);
  });
}

}  // namespace longfill
