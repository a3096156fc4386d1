#ifndef LONGFILL_KERNELS_CUDA_INDEX_COUNT_PAIRS_ARGS_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_COUNT_PAIRS_ARGS_CUH_

// What the kernels that count pairs share.

#include <cstdint>

#include "kernels/api/kernel_set.h"

namespace longfill::cuda::count_pairs {

struct Prompt {
  int64_t num_tokens = 0;
  int64_t num_row_blocks = 0;

  __device__ int64_t RowEnd(int64_t row_block) const { return min((row_block + 1) * kRowBlock, num_tokens); }
  __device__ int64_t Rows(int64_t row_block) const { return RowEnd(row_block) - row_block * kRowBlock; }
};

struct Indices {
  static constexpr int kMost = 48;  // of a launch: kernel parameters are limited
  IndexView of_head[kMost];
};

// Heads with distances have the published walk; without them (dense, A-shape) what is covered is published.
__device__ inline bool HasWalk(const IndexView& index) {
  return index.form == IndexView::Form::kDiagonalColumn && index.counts->distances > 0;
}

// Number of leading entries below `value`, given that at most `count` are. Doubling steps: the cost is the
// log of the way down from `count`.
__device__ inline int64_t CountBelow(const int32_t* values, int64_t count, int64_t value) {
  int64_t step = 1;
  int64_t high = count;
  while (high >= step && values[high - step] >= value) {
    high -= step;
    step *= 2;
  }
  int64_t low = high >= step ? high - step : 0;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Causal pairs of the rows of a row block with the keys [begin, end), of which those before 0 and beyond the
// block's last row do not count.
__device__ inline int64_t CausalPairsOf(const Prompt& prompt, int64_t row_block, int64_t begin, int64_t end) {
  const int64_t first_row = row_block * kRowBlock;
  const int64_t row_end = prompt.RowEnd(row_block);
  begin = max(begin, int64_t{0});
  end = min(end, row_end);
  if (begin >= end) return 0;
  const int64_t whole_end = min(max(first_row, begin), end);  // keys before it are seen by all rows
  const int64_t part = end - whole_end;  // key whole_end + i by row_end - whole_end - i rows
  return (whole_end - begin) * (row_end - first_row) + part * (row_end - whole_end) - part * (part - 1) / 2;
}

// Adds the values of a warp's lanes. Integers: the order does not matter.
__device__ inline void AddPairs(int64_t pairs, int64_t* total) {
  for (int step = 16; step > 0; step /= 2) pairs += __shfl_xor_sync(0xFFFFFFFFU, pairs, step);
  if (threadIdx.x % 32 == 0 && pairs != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(pairs));
  }
}

// Counts of the published walk for the heads that have one. Workspace: PublishedWorkspaceBytes.
int64_t PublishedWorkspaceBytes(int64_t num_heads, int64_t num_tokens);
absl::Status CountPublished(const Indices& indices, int64_t num_heads, const Prompt& prompt, void* workspace,
                            PairCounts* counts, cudaStream_t stream);

}  // namespace longfill::cuda::count_pairs

#endif  // LONGFILL_KERNELS_CUDA_INDEX_COUNT_PAIRS_ARGS_CUH_
