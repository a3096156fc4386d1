#include "kernels/cuda/index/round_to_e4m3.h"

#include "kernels/cuda/index/e4m3.cuh"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kPacked = cuda::kPackedCount;

// A thread block for each group.
template <typename Element>
__global__ void __launch_bounds__(kThreads) RoundToE4m3Kernel(const RoundedRows groups) {
  using cuda::share_selection::E4m3Scale;
  using cuda::share_selection::FromE4m3;
  using cuda::share_selection::PairToE4m3;
  using Piece = cuda::Packed<Element, kPacked>;
  __shared__ float largest_of_warp[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t group = blockIdx.x;
  const int64_t num_rows = min(groups.rows_of_group, groups.num_rows - group * groups.rows_of_group);
  const int pieces_of_row = static_cast<int>(groups.head_dim) / kPacked;
  const int num_pieces = static_cast<int>(num_rows) * pieces_of_row;
  const auto* const from = static_cast<const Element*>(groups.rows) + group * groups.group_stride;
  const auto load = [&](int i, float(&values)[kPacked]) {
    Piece::Load(from + i / pieces_of_row * groups.row_stride + i % pieces_of_row * kPacked).Widen(values);
  };

  float largest = 0;
  for (int i = thread; i < num_pieces; i += kThreads) {
    float values[kPacked];
    load(i, values);
#pragma unroll
    for (const float value : values) largest = fmaxf(largest, fabsf(value));
  }
  largest = cuda::share_selection::WarpMax(largest);
  if (thread % 32 == 0) largest_of_warp[thread / 32] = largest;
  __syncthreads();
#pragma unroll
  for (const float other : largest_of_warp) largest = fmaxf(largest, other);
  const E4m3Scale scale = E4m3Scale::Of(largest);
  if (groups.scales != nullptr && thread == 0) groups.scales[group] = scale.inverse;

  for (int i = thread; i < num_pieces; i += kThreads) {
    float values[kPacked];
    load(i, values);
    uint32_t pairs[kPacked / 2];
#pragma unroll
    for (int j = 0; j < kPacked / 2; ++j) {
      pairs[j] = PairToE4m3({values[2 * j], values[2 * j + 1]}, scale.scale);
    }
    const int64_t to = group * groups.out_group_stride + i / pieces_of_row * groups.out_row_stride +
                       i % pieces_of_row * kPacked;
    if (groups.scales != nullptr) {
      *reinterpret_cast<uint2*>(static_cast<char*>(groups.out) + to) = {pairs[0] | pairs[1] << 16,
                                                                        pairs[2] | pairs[3] << 16};
      continue;
    }
#pragma unroll
    for (uint32_t& pair : pairs) {
      pair = cuda::share_selection::NarrowE4m3<Element>(FromE4m3(pair, scale.inverse));
    }
    Piece{{pairs[0], pairs[1], pairs[2], pairs[3]}}.Store(static_cast<Element*>(groups.out) + to);
  }
}

}  // namespace

absl::Status LaunchRoundToE4m3(const RoundedRows& rows, DType dtype, cudaStream_t stream) {
  return cuda::WithComputeType(dtype, [&]<typename Element>() {
    return Launch("RoundToE4m3Kernel", RoundToE4m3Kernel<Element>,
                  {.grid_x = rows.num_groups, .block = kThreads}, stream, rows);
  });
}

}  // namespace longfill
