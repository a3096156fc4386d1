#ifndef LONGFILL_KERNELS_CUDA_HOPPER_BLOCK_WINDOWS_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_BLOCK_WINDOWS_CUH_

// The block lists of a tile's two row blocks, merged: a key block that both have is one slot. All functions
// are for one whole warp.

#include <cstdint>

#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/cuda/hopper/run_window.cuh"
#include "kernels/cuda/hopper/slot.cuh"
#include "kernels/sparse/index_view.h"

namespace longfill::cuda::hopper {

// What is still to come of each half's list. In shared memory.
struct BlockLists {
  const int32_t* blocks[2];
  int32_t left[2];
};

__device__ __forceinline__ void StartBlocks(const IndexView& index, const PlanTile& tile, BlockLists* lists) {
  const int lane = attention::Lane();
  if (lane < 2) {
    const int64_t row_block = tile.rows.first_row / kHalfRows + lane;
    int64_t first = row_block * index.row_length;
    int64_t count = min(index.row_length, row_block + 1);
    if (tile.num_rows[lane] == 0) {
      first = count = 0;  // its row block may be beyond the prompt
    } else if (index.row_offsets != nullptr) {
      first = index.row_offsets[row_block];
      count = index.row_offsets[row_block + 1] - first;
    }
    lists->blocks[lane] = index.key_blocks + first;
    lists->left[lane] = static_cast<int32_t>(count);
  }
  __syncwarp();
}

// Number of the 16 lanes' ascending values from `first_lane` on that are below this lane's.
__device__ __forceinline__ int CountBelowMine(int32_t value, int first_lane) {
  int count = 0;
#pragma unroll
  for (int step = 8; step > 0; step /= 2) {
    if (__shfl_sync(attention::kAllLanes, value, first_lane + count + step - 1) < value) count += step;
  }
  return __shfl_sync(attention::kAllLanes, value, first_lane + count) < value ? count + 1 : count;
}

// Up to 16 key blocks of each half as windows of one slot, ascending; returns how many windows that makes.
// Lanes 0 to 15 hold half 0's, the others half 1's. What is above the last of a list that goes on waits for
// the next time.
__device__ __forceinline__ int32_t NextBlocks(BlockLists* lists, RunWindow (&windows)[kPlanWindows]) {
  const int lane = attention::Lane();
  const int half = lane / 16;
  const int in_half = lane % 16;
  const int other = 16 - 16 * half;  // the first lane of the other half
  const int32_t left = lists->left[half];
  const int32_t block = in_half < left ? lists->blocks[half][in_half] : INT32_MAX;
  const int32_t limit =
      min(__shfl_sync(attention::kAllLanes, block, 15), __shfl_sync(attention::kAllLanes, block, 31));
  const int below = CountBelowMine(block, other);
  const bool taken = block < INT32_MAX && block <= limit;
  // Of equal ones the other half's is the next that is not below.
  const bool in_both = __shfl_sync(attention::kAllLanes, block, other + min(below, 15)) == block && taken;
  const bool kept = taken && (half == 0 || !in_both);
  const uint32_t lanes = __ballot_sync(attention::kAllLanes, kept);
  const uint32_t lanes_taken = __ballot_sync(attention::kAllLanes, taken);
  windows[lane].slots_before = INT32_MAX;
  __syncwarp();
  if (kept) {
    const int place = __popc(lanes >> (16 * half) & attention::LanesBelow(in_half)) +
                      __popc(lanes >> other & attention::LanesBelow(below));
    windows[place] = AllKeys();
    windows[place].halves = in_both ? 3 : 1 << half;
    windows[place].first_slot = block * kSlotKeys;
    windows[place].slots_before = place;
  }
  if (in_half == 0) {
    const int num_taken = __popc(lanes_taken >> (16 * half) & 0xFFFF);
    lists->blocks[half] += num_taken;
    lists->left[half] = left - num_taken;
  }
  __syncwarp();
  return __popc(lanes);
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_BLOCK_WINDOWS_CUH_
