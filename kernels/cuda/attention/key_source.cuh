#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_KEY_SOURCE_CUH_
#define LONGFILL_KERNELS_CUDA_ATTENTION_KEY_SOURCE_CUH_

// Fills a tile's queue from the index of its head. All functions are for one whole warp.
//
// What every row of the tile sees of a range is cut into chunks of consecutive keys; the rest of it (less
// than a chunk, and keys that the diagonal or the limits of an exact run hide from some rows) is gathered,
// together with the columns that no range covers, so that the only padded chunk of a tile is its last. Pairs
// are counted from the same numbers.

#include <cstdint>

#include "kernels/cuda/attention/key_queue.cuh"
#include "kernels/cuda/attention/key_ranges.cuh"
#include "kernels/cuda/attention/mma.cuh"
#include "kernels/sparse/index_view.h"

namespace longfill::cuda::attention {

template <int kRows, int kChunkKeys>
class QueueFill {
 public:
  __device__ __forceinline__ QueueFill(const IndexView& index, const Tile<kRows>& tile, KeyQueue* queue)
      : index_(index), tile_(tile), queue_(*queue), cursor_(queue->cursor) {
    first_gathered_ = queue_.gathered_chunks * kChunkKeys;
  }

  __device__ __forceinline__ void Run() {
    bool finished = false;
    while (segment_keys_ + cursor_.gathered - first_gathered_ < kFillKeys) {
      if (cursor_.column_end != kNoColumns) {
        AddColumns();
      } else if (cursor_.ranges_done == 0) {
        AddRanges();
      } else {
        PadLastChunk();
        finished = true;
        break;
      }
    }
    Publish(finished);
  }

 private:
  static constexpr uint16_t kEveryRow = kRows << 8;  // PackRows(0, kRows)

  __device__ __forceinline__ void Gather(int32_t place, int32_t key, uint16_t rows) {
    const int32_t slot = static_cast<int32_t>(static_cast<uint32_t>(place) % kGatherCapacity);
    queue_.gathered_keys[slot] = key;
    queue_.gathered_rows[slot] = rows;
    pairs_ += RowsGiven(tile_, rows >> 8) - RowsGiven(tile_, rows & 0xFF);
  }

  __device__ __forceinline__ RangeBatch NextBatch() {
    if constexpr (kRows == kRowBlockRows) {
      if (index_.form == IndexView::Form::kBlockList) return NextBlocks(index_, tile_, &cursor_);
      if (index_.coverage == Coverage::kParity) return NextPublished(index_, tile_, &cursor_);
    }
    return NextRuns(index_, tile_, cursor_);
  }

  // The next batch of ranges, as far as what is gathered of them fits, becomes the one that columns are held
  // against.
  __device__ __forceinline__ void AddRanges() {
    const bool runs = index_.form == IndexView::Form::kDiagonalColumn && index_.coverage == Coverage::kTiles;
    const RangeBatch batch = NextBatch();
    const LaneRange& range = batch.range;
    // Keys [full_begin, full_end) are seen by every row.
    const int32_t full_begin = Clamp(tile_.first_row + kRows - range.max_distance, range.begin, range.end);
    const int32_t full_end = Clamp(tile_.first_row - range.min_distance + 1, full_begin, range.end);
    int32_t chunks = (full_end - full_begin) / kChunkKeys;
    int32_t rest = range.end - range.begin - chunks * kChunkKeys;

    // The chunk in the readers' hands keeps its place in the ring.
    const int32_t space = kGatherCapacity - kChunkKeys - (cursor_.gathered - first_gathered_);
    const int32_t rests_so_far = InclusiveSum(rest);
    const bool fits = Lane() < batch.count && rests_so_far <= space;
    const int32_t taken = __popc(__ballot_sync(kAllLanes, fits));
    if (!fits) chunks = rest = 0;
    __syncwarp();
    queue_.range_begin[Lane()] = fits ? range.begin : INT32_MAX;
    queue_.range_end[Lane()] = fits ? range.end : INT32_MAX;
    __syncwarp();
    cursor_.column_end = __shfl_sync(kAllLanes, range.end, taken - 1);
    if (runs) {
      const bool at_end = __shfl_sync(kAllLanes, range.begin, taken - 1) >= tile_.key_end;
      cursor_.next_range = at_end ? 0 : cursor_.next_range - taken;
      cursor_.ranges_done = cursor_.next_range == 0;
      if (cursor_.next_range == 0) cursor_.column_end = tile_.key_end;
    }
    if (cursor_.num_columns == 0) cursor_.column_end = kNoColumns;
    AddSegments(full_begin, chunks);
    GatherRests(range, full_begin, chunks * kChunkKeys, rest);
  }

  __device__ __forceinline__ void AddSegments(int32_t begin, int32_t chunks) {
    const uint32_t lanes = __ballot_sync(kAllLanes, chunks > 0);
    if (chunks > 0) {
      const int32_t place = num_segments_ + __popc(lanes & LanesBelow(Lane()));
      queue_.segment_begin[place] = begin;
      queue_.segment_chunks[place] = chunks;
      pairs_ += int64_t{chunks} * kChunkKeys * RowsGiven(tile_, kRows);
    }
    num_segments_ += __popc(lanes);
    const int32_t all_chunks = __reduce_add_sync(kAllLanes, chunks);
    segment_keys_ += all_chunks * kChunkKeys;
    cursor_.num_chunks += all_chunks;
  }

  // Of each lane's range, the `rest` keys that are left when the `skip` from full_begin on are taken out.
  __device__ __forceinline__ void GatherRests(const LaneRange& range, int32_t full_begin, int32_t skip,
                                              int32_t rest) {
    for (uint32_t lanes = __ballot_sync(kAllLanes, rest > 0); lanes != 0; lanes &= lanes - 1) {
      const int lane = __ffs(static_cast<int>(lanes)) - 1;
      const int32_t begin = __shfl_sync(kAllLanes, range.begin, lane);
      const int32_t min_distance = __shfl_sync(kAllLanes, range.min_distance, lane);
      const int32_t max_distance = __shfl_sync(kAllLanes, range.max_distance, lane);
      const int32_t skip_begin = __shfl_sync(kAllLanes, full_begin, lane);
      const int32_t skip_keys = __shfl_sync(kAllLanes, skip, lane);
      const int32_t count = __shfl_sync(kAllLanes, rest, lane);
#pragma unroll 1  // the sums of the tile live in registers meanwhile
      for (int32_t i = Lane(); i < count; i += 32) {
        const int32_t key = begin + i + (begin + i >= skip_begin ? skip_keys : 0);
        uint16_t rows = RowsOfKey(tile_, key, min_distance, max_distance);
        const uint16_t causal = CausalRowsOfKey(tile_, key);
        if (rows != causal && IsColumn(key)) rows = causal;
        Gather(cursor_.gathered + i, key, rows);
      }
      cursor_.gathered += count;
    }
  }

  __device__ __forceinline__ bool IsColumn(int32_t key) const {
    int32_t low = 0;
    int32_t high = cursor_.num_columns;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (index_.columns[middle] < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < cursor_.num_columns && index_.columns[low] == key;
  }

  // Up to 128 of the columns that are due.
  __device__ __forceinline__ void AddColumns() {
    constexpr int kSteps = 4;
    int32_t columns[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int32_t place = cursor_.next_column + step * 32 + Lane();
      columns[step] = place < cursor_.num_columns ? index_.columns[place] : INT32_MAX;
    }
    int32_t num_due = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int32_t key = columns[step];
      const bool due = key < cursor_.column_end;
      num_due += __popc(__ballot_sync(kAllLanes, due));
      const bool gathered = due && !InBatch(key);
      const uint32_t lanes = __ballot_sync(kAllLanes, gathered);
      if (gathered) {
        Gather(cursor_.gathered + __popc(lanes & LanesBelow(Lane())), key, CausalRowsOfKey(tile_, key));
      }
      cursor_.gathered += __popc(lanes);
    }
    cursor_.next_column += num_due;
    if (num_due < kSteps * 32) cursor_.column_end = kNoColumns;
  }

  // Whether a range of the batch holds the key.
  __device__ __forceinline__ bool InBatch(int32_t key) const {
    int32_t count = 0;  // ranges that begin at or before the key
#pragma unroll
    for (int step = kBatchRanges / 2; step > 0; step /= 2) {
      if (queue_.range_begin[count + step - 1] <= key) count += step;
    }
    if (queue_.range_begin[count] <= key) ++count;
    return count > 0 && key < queue_.range_end[count - 1];
  }

  __device__ __forceinline__ void PadLastChunk() {
    const int32_t pads = (kChunkKeys - cursor_.gathered % kChunkKeys) % kChunkKeys;
    for (int32_t i = Lane(); i < pads; i += 32) Gather(cursor_.gathered + i, kNoKey, kNoRows);
    cursor_.gathered += pads;
  }

  // What was filled becomes what readers see, after the next barrier.
  __device__ __forceinline__ void Publish(bool finished) {
    __syncwarp();
    const int32_t gathered_chunks = cursor_.gathered / kChunkKeys;
    for (int32_t chunk = first_gathered_ / kChunkKeys; chunk < gathered_chunks; ++chunk) {
      const int32_t slot = RingSlot<kChunkKeys>(~chunk);
      uint16_t rows = kEveryRow;
#pragma unroll
      for (int32_t i = 0; i < kChunkKeys; i += 32) {
        const uint16_t some = queue_.gathered_rows[slot + i + Lane()];
        if (some != kEveryRow) rows = some;
      }
      const bool limited = __any_sync(kAllLanes, rows != kEveryRow);
      if (Lane() == 0) queue_.limited[slot / kChunkKeys] = limited ? 1 : 0;
    }
    const int64_t pairs = WarpSum(pairs_);
    if (Lane() == 0) {
      cursor_.covered_pairs += pairs;
      queue_.cursor = cursor_;
      queue_.num_segments = num_segments_;
      queue_.gathered_chunks = gathered_chunks;
      queue_.finished = finished ? 1 : 0;
    }
    __syncwarp();
  }

  const IndexView& index_;
  const Tile<kRows>& tile_;
  KeyQueue& queue_;
  KeyCursor cursor_;
  int64_t pairs_ = 0;  // of this lane
  int32_t num_segments_ = 0;
  int32_t segment_keys_ = 0;
  int32_t first_gathered_ = 0;  // before this fill, whole chunks only
};

// Before the first fill of a tile.
template <int kRows>
__device__ __forceinline__ void StartQueue(const IndexView& index, const Tile<kRows>& tile, KeyQueue* queue) {
  const KeyCursor cursor = StartOfTile(index, tile);
  queue->range_begin[Lane()] = INT32_MAX;
  queue->range_end[Lane()] = INT32_MAX;
  if (Lane() == 0) {
    queue->cursor = cursor;
    queue->num_segments = 0;
    queue->gathered_chunks = 0;
    queue->finished = 0;
  }
  __syncwarp();
}

// When all that was in the queue has been taken; the chunk taken last may still be read. Other threads see it
// after a barrier.
template <int kChunkKeys, int kRows>
__device__ __forceinline__ void FillQueue(const IndexView& index, const Tile<kRows>& tile, KeyQueue* queue) {
  QueueFill<kRows, kChunkKeys>(index, tile, queue).Run();
}

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_KEY_SOURCE_CUH_
