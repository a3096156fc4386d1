#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_TILE_TASK_CUH_
#define LONGFILL_KERNELS_CUDA_ATTENTION_TILE_TASK_CUH_

// From the number of an item to the tile that it is: head, rows, where its data lie.

#include <cstdint>

#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/attention/tile_rows.cuh"

namespace longfill::cuda::attention {

// One (sequence, query head, tile).
template <int kRows>
struct TileTask {
  const SequenceEntry* sequence = nullptr;
  const IndexView* index = nullptr;
  int32_t sequence_number = 0;
  int32_t head = 0;
  int32_t kv_head = 0;
  // The head's K and V where the key at position 0 would be, which need not be given.
  const char* k = nullptr;
  const char* v = nullptr;
  Tile<kRows> tile;
};

// The tile of an item, its rows not looked at. Within a sequence the heads of a KV head follow each other,
// row blocks from the last, which has most keys, to the first. See Args::head_by_head for what runs at a time
// and so reads the same keys.
template <int kRows>
__device__ __forceinline__ TileTask<kRows> TaskOf(const Args& args, int32_t item) {
  int32_t low = 0;
  for (int32_t high = args.num_sequences; high - low > 1;) {
    const int32_t middle = low + (high - low) / 2;
    if (args.sequences[middle].first_item <= item) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const SequenceEntry& sequence = args.sequences[low];
  const int32_t in_sequence = item - sequence.first_item;
  const HeadEntry group = args.heads[in_sequence / sequence.num_tiles];
  const int32_t in_group = in_sequence - group.group_begin * sequence.num_tiles;
  const HeadEntry entry =
      args.head_by_head ? group : args.heads[group.group_begin + in_group % group.group_size];
  const int32_t tiles_before =
      args.head_by_head ? in_sequence % sequence.num_tiles : in_group / group.group_size;
  const int64_t place = sequence.num_tiles - 1 - tiles_before;

  TileTask<kRows> task;
  task.sequence = &sequence;
  task.index = &args.indices[sequence.first_index + entry.head];
  task.sequence_number = low;
  task.head = entry.head;
  task.kv_head = entry.kv_head;
  task.k = static_cast<const char*>(args.k) +
           2 * (entry.kv_head * args.k_head_stride + sequence.k_row_of_0 * args.k_row_stride);
  task.v = static_cast<const char*>(args.v) +
           2 * (entry.kv_head * args.v_head_stride + sequence.k_row_of_0 * args.v_row_stride);
  task.tile.block = static_cast<int32_t>(sequence.tiles.Position(place));
  task.tile.first_row = task.tile.block * kRows;
  task.tile.key_begin = sequence.key_range_begin;
  return task;
}

// Marks the task's rows that are given and writes to row[kRows] which row of the sequence each is, or -1.
// False if there are none. One warp.
template <int kRows>
__device__ __forceinline__ bool FindRows(TileTask<kRows>* task, int32_t* row) {
  const SequenceEntry& sequence = *task->sequence;
  int32_t end = 0;  // of the rows given, counted from the first of the tile
#pragma unroll
  for (int i = 0; i < kRows; i += 32) {
    const int64_t position = int64_t{task->tile.first_row} + i + Lane();
    const int64_t place = sequence.q_positions.RowsBelow(position);
    const bool given = place < sequence.num_rows && sequence.q_positions.Position(place) == position;
    row[i + Lane()] = given ? static_cast<int32_t>(place) : -1;
    const uint32_t rows = __ballot_sync(kAllLanes, given);
    task->tile.rows[i / 64] |= uint64_t{rows} << (i % 64);
    if (rows != 0) end = i + 32 - __clz(static_cast<int>(rows));
  }
  task->tile.key_end = min(task->tile.first_row + end, sequence.key_range_end);
  return end > 0;
}

// Row 0 of the sequence in the task's head of q and out, and its entry of lse.
template <int kRows>
__device__ __forceinline__ const char* QueryRow0(const Args& args, const TileTask<kRows>& task) {
  return static_cast<const char*>(args.q) +
         2 * (task.head * args.q_head_stride + task.sequence->q_begin * args.q_row_stride);
}
template <int kRows>
__device__ __forceinline__ char* OutRow0(const Args& args, const TileTask<kRows>& task) {
  return static_cast<char*>(args.out) +
         2 * (task.head * args.out_head_stride + task.sequence->q_begin * args.out_row_stride);
}
template <int kRows>
__device__ __forceinline__ float* LseOf(const Args& args, const TileTask<kRows>& task) {
  return args.lse + task.head * args.lse_head_stride + task.sequence->q_begin;
}

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_TILE_TASK_CUH_
