#include "kernels/cuda/hopper/order_heads.h"

#include <cstdint>

#include "kernels/cuda/hopper/slot.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/sparse/sparse_index.h"

namespace longfill::cuda::hopper {
namespace {

using attention::Args;
using attention::HeadEntry;
using attention::SequenceEntry;

// Keys that a head's tiles of a sequence bring, about: to compare heads by.
__device__ int64_t WorkOf(const IndexView& index, const SequenceEntry& sequence) {
  if (index.form == IndexView::Form::kDiagonalColumn) {
    const IndexCounts counts = *index.counts;
    // A tile sees half of the keys on average, and each run costs it up to a slot more.
    const int64_t all = (sequence.key_range_end - sequence.key_range_begin) / 2 + kSlotKeys;
    const int64_t keys = counts.columns + counts.distances + int64_t{kSlotKeys} * counts.runs;
    return min(keys, all) * sequence.num_tiles;
  }
  const int64_t first = sequence.q_positions.Position(0) / kRowBlock;
  const int64_t last = sequence.q_positions.Position(sequence.num_rows - 1) / kRowBlock;
  const int64_t blocks = index.row_offsets == nullptr
                             ? index.row_length * (last - first + 1)
                             : index.row_offsets[last + 1] - index.row_offsets[first];
  return blocks * kRowBlock;
}

// One thread for each head.
__global__ void __launch_bounds__(kMaxOrderedHeads)
    OrderHeadsKernel(const __grid_constant__ Args args, HeadEntry* heads, int num_heads) {
  __shared__ int64_t work[kMaxOrderedHeads];
  const int own = static_cast<int>(threadIdx.x);
  HeadEntry entry;
  int64_t sum = 0;
  if (own < num_heads) {
    entry = heads[own];
    for (int i = 0; i < args.num_sequences; ++i) {
      const SequenceEntry& sequence = args.sequences[i];
      sum += WorkOf(args.indices[sequence.first_index + entry.head], sequence);
    }
  }
  work[own] = sum;
  __syncthreads();
  if (own >= num_heads) return;
  int place = 0;
  for (int other = 0; other < num_heads; ++other) {
    place += work[other] > sum || (work[other] == sum && other < own) ? 1 : 0;
  }
  heads[place] = entry;
}

}  // namespace

absl::Status OrderHeads(const Args& args, HeadEntry* heads, int num_heads, cudaStream_t stream) {
  if (num_heads < 2 || num_heads > kMaxOrderedHeads) return absl::OkStatus();
  return Launch("OrderHeadsKernel", OrderHeadsKernel, {.block = kMaxOrderedHeads}, stream, args, heads,
                num_heads);
}

}  // namespace longfill::cuda::hopper
