// Row sums from what the first pass left of each block of keys, and the start of row maxima.

#include <cmath>

#include "kernels/cuda/index/last_query_args.h"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace {

constexpr int kRows = static_cast<int>(kMaxSelectingQueries);
constexpr int kThreads = 4 * kRows;
constexpr int64_t kBlocksOfThreadBlock = 64;

__global__ void FillLowestKernel(float* values, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) values[i] = -INFINITY;
}

// A term is the block's sum in units of 2^-40 and depends on the block and row_max alone; the sum of integers
// does not depend on the order.
__global__ __launch_bounds__(kThreads) void LastQuerySumKernel(const BlockStatistics* statistics,
                                                               int64_t num_blocks, int num_queries,
                                                               const float* row_max, uint64_t* row_sum) {
  __shared__ uint64_t shared[kThreads];
  const int row = static_cast<int>(threadIdx.x) % kRows;
  const int query = num_queries - 1 - row;
  const int64_t list = blockIdx.y;
  uint64_t sum = 0;
  if (query >= 0) {
    const float max = row_max[list * kRows + query];
    const BlockStatistics* of_list = statistics + list * num_blocks * kRows;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBlocksOfThreadBlock;
    const int64_t end = min(begin + kBlocksOfThreadBlock, num_blocks);
#pragma unroll 4
    for (int64_t block = begin + static_cast<int>(threadIdx.x) / kRows; block < end;
         block += kThreads / kRows) {
      const BlockStatistics of_block = of_list[block * kRows + row];
      if (of_block.y == 0.0F) continue;  // no visible key
      const double factor = 0x1p40 * static_cast<double>(expf(of_block.x - max));
      sum += __double2ull_rn(static_cast<double>(of_block.y) * factor);
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= kRows || query < 0) return;
  for (int i = 1; i < kThreads / kRows; ++i) sum += shared[threadIdx.x + i * kRows];
  atomicAdd(reinterpret_cast<unsigned long long*>(row_sum + list * kRows + query),
            static_cast<unsigned long long>(sum));
}

}  // namespace

absl::Status LaunchLastQueryMaxStart(float* row_max, int64_t count, cudaStream_t stream) {
  return Launch("FillLowestKernel", FillLowestKernel, {.grid_x = CeilDiv(count, kThreads), .block = kThreads},
                stream, row_max, count);
}

absl::Status LaunchLastQuerySum(const BlockStatistics* statistics, int64_t num_lists, int64_t num_blocks,
                                int num_queries, const float* row_max, uint64_t* row_sum,
                                cudaStream_t stream) {
  return Launch("LastQuerySumKernel", LastQuerySumKernel,
                {.grid_x = CeilDiv(num_blocks, kBlocksOfThreadBlock), .grid_y = num_lists, .block = kThreads},
                stream, statistics, num_blocks, num_queries, row_max, row_sum);
}

}  // namespace longfill
