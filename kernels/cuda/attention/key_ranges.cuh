#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_KEY_RANGES_CUH_
#define LONGFILL_KERNELS_CUDA_ATTENTION_KEY_RANGES_CUH_

// From the index of a head to the ranges of keys of one tile: what kernels/sparse/coverage.h defines, in
// batches of 32 ranges, one to a lane, ascending, without a list for each row block. All functions are for
// one whole warp.

#include <cstdint>

#include "kernels/cuda/attention/key_queue.cuh"
#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/sparse/index_view.h"

namespace longfill::cuda::attention {

// Dense and A-shape heads: one exact run, which covers what it covers whatever rows are taken together.
__device__ __forceinline__ bool IsWide(const IndexView& index) {
  return index.form == IndexView::Form::kDiagonalColumn && index.coverage == Coverage::kTiles &&
         index.counts->runs == 1 && index.runs[0].exact;
}

// A range of keys of the tile, of this lane. A row sees a key at a distance in [min_distance, max_distance);
// coarse ranges have no limits but causality.
struct LaneRange {
  int32_t begin = 0;
  int32_t end = 0;
  int32_t min_distance = 0;
  int32_t max_distance = kAnyDistance;
};
template <int kRows>
__device__ __forceinline__ LaneRange Clipped(const Tile<kRows>& tile, int32_t begin, int32_t end) {
  return {Clamp(begin, tile.key_begin, tile.key_end), Clamp(end, tile.key_begin, tile.key_end)};
}
template <int kRows>
__device__ __forceinline__ LaneRange NoRange(const Tile<kRows>& tile) {
  return {tile.key_end, tile.key_end};
}

// ---- Ranges: the first `count` lanes have one each, possibly empty. A caller that cannot take them all has
// the rest again the next time (runs only; the others are short enough).

struct RangeBatch {
  LaneRange range;
  int32_t count = 0;
};

// The last of the first cursor.next_range runs, the one of the largest distances first.
template <int kRows>
__device__ __forceinline__ RangeBatch NextRuns(const IndexView& index, const Tile<kRows>& tile,
                                               const KeyCursor& cursor) {
  const int32_t count = cursor.next_range < kBatchRanges ? cursor.next_range : kBatchRanges;
  if (Lane() >= count) return {NoRange(tile), count};
  const DistanceRun run = index.runs[cursor.next_range - 1 - Lane()];
  const int32_t d_lo = static_cast<int32_t>(run.d_lo);  // some row of the tile is that far from key 0
  const int32_t d_hi = static_cast<int32_t>(min(run.d_hi, int64_t{kAnyDistance}));
  LaneRange range = Clipped(tile, tile.first_row - d_hi + 1, tile.first_row + kRows - d_lo);
  if (run.exact) {
    range.min_distance = d_lo;
    range.max_distance = d_hi;
  }
  return {range, count};
}

template <int kRows>
__device__ __forceinline__ RangeBatch NextBlocks(const IndexView& index, const Tile<kRows>& tile,
                                                 KeyCursor* cursor) {
  int64_t first = tile.block * index.row_length;
  int64_t num_blocks = index.row_length < tile.block + 1 ? index.row_length : tile.block + 1;
  if (index.row_offsets != nullptr) {
    first = index.row_offsets[tile.block];
    num_blocks = index.row_offsets[tile.block + 1] - first;
  }
  const int32_t place = cursor->next_range + Lane();
  cursor->next_range += kBatchRanges;
  cursor->ranges_done = cursor->next_range >= num_blocks;
  if (place >= num_blocks) return {NoRange(tile), kBatchRanges};
  const int32_t begin = index.key_blocks[first + place] * kRowBlockRows;
  return {Clipped(tile, begin, begin + kRowBlockRows), kBatchRanges};
}

// The walk of the published index conversion (coverage.h, AppendPublishedRuns), as far as 32 runs or
// kWalkSteps pieces of 64 keys. Distances are looked at from the largest that reaches the tile downwards:
// lane l holds the one l places below the top of a window, so that the next that matters is the first below
// the limit.
inline constexpr int kWalkSteps = 64;
template <int kRows>
__device__ __forceinline__ RangeBatch NextPublished(const IndexView& index, const Tile<kRows>& tile,
                                                    KeyCursor* cursor) {
  const int32_t end = tile.first_row + kRowBlockRows;
  RangeBatch batch{NoRange(tile), 0};
  const auto emit = [&] {
    if (Lane() == batch.count) batch.range = Clipped(tile, cursor->walk_begin, cursor->walk_end);
    ++batch.count;
    cursor->walk_begin = cursor->walk_end;
  };
  const auto load_window = [&] {
    const int32_t place = cursor->next_range - 1 - Lane();
    return place >= 0 ? index.distances[place] : INT32_MAX;
  };
  int32_t window = load_window();
  for (int step = 0; batch.count < kBatchRanges; ++step) {
    if (step == kWalkSteps) {
      emit();  // the rest of this run comes with the next batch
      break;
    }
    const int32_t limit = end - cursor->walk_end;
    uint32_t below = __ballot_sync(kAllLanes, window < limit);
    while (below == 0 && cursor->next_range > 32) {
      cursor->next_range -= 32;
      window = load_window();
      below = __ballot_sync(kAllLanes, window < limit);
    }
    if (below == 0) {
      emit();
      cursor->ranges_done = 1;
      break;
    }
    const int32_t distance = __shfl_sync(kAllLanes, window, __ffs(static_cast<int>(below)) - 1);
    const int32_t edge = end - distance > kRowBlockRows ? end - distance : kRowBlockRows;
    if (edge > cursor->walk_end + kRowBlockRows) {
      emit();
      cursor->walk_begin = edge - kRowBlockRows;
      cursor->walk_end = edge;
    } else {
      cursor->walk_end += kRowBlockRows;
    }
  }
  return batch;
}

// The cursor of a tile's first fill.
template <int kRows>
__device__ __forceinline__ KeyCursor StartOfTile(const IndexView& index, const Tile<kRows>& tile) {
  KeyCursor cursor = {};
  cursor.column_end = kNoColumns;
  cursor.ranges_done = 1;
  if (tile.key_begin >= tile.key_end) return cursor;
  if (index.form == IndexView::Form::kBlockList) {
    cursor.ranges_done = 0;
    return cursor;
  }
  const int32_t end = tile.first_row + kRows;
  cursor.num_columns = index.counts->columns;
  cursor.next_column =
      CountBelow(cursor.num_columns, tile.key_begin, [&](int32_t i) { return index.columns[i]; });
  if (index.coverage == Coverage::kParity) {
    cursor.next_range =
        CountBelow(index.counts->distances, end, [&](int32_t i) { return index.distances[i]; });
    if (cursor.next_range == 0) return cursor;  // and its columns do not count
    const int32_t edge = end - index.distances[cursor.next_range - 1];
    cursor.walk_end = edge > kRows ? edge : kRows;
    cursor.walk_begin = cursor.walk_end - kRows;
  } else {
    // Runs whose ranges end behind the first key.
    cursor.next_range = CountBelow(index.counts->runs, int64_t{end} - tile.key_begin,
                                   [&](int32_t i) { return index.runs[i].d_lo; });
    if (cursor.next_range == 0) cursor.column_end = tile.key_end;
  }
  cursor.ranges_done = cursor.next_range == 0;
  return cursor;
}

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_KEY_RANGES_CUH_
