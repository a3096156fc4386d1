#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_KEY_QUEUE_CUH_
#define LONGFILL_KERNELS_CUDA_ATTENTION_KEY_QUEUE_CUH_

// What a tile (64 or 128 rows of one query head) has to multiply next, as chunks of keys. One warp fills the
// queue (key_source.cuh), all threads of the thread block take from it. A chunk is either consecutive keys
// that every row of the tile sees, or a gathered one: any keys, each with the rows that see it.

#include <cstdint>

#include "kernels/cuda/attention/tile_rows.cuh"

namespace longfill::cuda::attention {

// Keys from one fill on stop it, so that the copies below stay small while fills stay rare.
inline constexpr int kFillKeys = 512;
inline constexpr int kGatherCapacity = 1024;  // a ring; a power of two and a multiple of every chunk size
inline constexpr int kBatchRanges = 32;       // one for each lane
// A fill starts a batch of ranges only with less than kFillKeys keys at hand, that is 15 chunks of 32.
inline constexpr int kMaxSegments = 16 + kBatchRanges;

// No column is due.
inline constexpr int32_t kNoColumns = INT32_MIN;

// Where the fills of a tile stand.
struct KeyCursor {
  int32_t next_range;   // runs or distances still to come, or the place of the next key block
  int32_t num_columns;  // of the head's list
  int32_t next_column;  // in it
  int32_t column_end;   // columns below are due, where the ranges of the batch do not cover them
  int32_t gathered;     // keys written to the ring since the tile began
  int32_t ranges_done;  // the last batch of ranges is in the table
  int32_t walk_begin;   // parity: the run that the walk is in, as far as it is not in a batch yet
  int32_t walk_end;
  int32_t num_chunks;     // of the tile so far, gathered ones not included
  int64_t covered_pairs;  // of the tile so far
};

struct KeyQueue {
  int32_t segment_begin[kMaxSegments];  // consecutive keys for all rows
  int32_t segment_chunks[kMaxSegments];
  int32_t num_segments;
  int32_t gathered_chunks;                 // whole ones in the ring since the tile began
  int32_t finished;                        // nothing follows what is in the queue
  int32_t gathered_keys[kGatherCapacity];  // key positions, or kNoKey
  alignas(4) uint16_t gathered_rows[kGatherCapacity];
  uint8_t limited[kGatherCapacity / 32];  // of the ring's chunks: some key is not for all rows
  // Ranges of the batch, ascending, possibly empty, for the columns that are due.
  int32_t range_begin[kBatchRanges];
  int32_t range_end[kBatchRanges];
  KeyCursor cursor;
};

// A chunk in one word: the first key of consecutive ones, or ~(number of a gathered chunk).
using KeyChunk = int32_t;
inline constexpr KeyChunk kNoChunk = INT32_MIN;
__device__ __forceinline__ bool IsGathered(KeyChunk chunk) { return chunk < 0; }
template <int kChunkKeys>
__device__ __forceinline__ int32_t RingSlot(KeyChunk chunk) {
  return static_cast<int32_t>(static_cast<uint32_t>(~chunk) * kChunkKeys % kGatherCapacity);
}

// One thread's place in the queue, the same in every thread.
struct KeyReader {
  int32_t segment = 0;  // of the queue, next
  int32_t key = 0;      // of the segment in hand
  int32_t chunks = 0;   // left of it
  int32_t gathered = 0;

  // After a fill: its segments begin anew, the ring goes on.
  __device__ __forceinline__ void Restart() { segment = 0; }
  __device__ __forceinline__ bool Drained(const KeyQueue& queue) const {
    return chunks == 0 && segment == queue.num_segments && gathered == queue.gathered_chunks;
  }
  template <int kChunkKeys>
  __device__ __forceinline__ KeyChunk Next(const KeyQueue& queue) {
    if (chunks == 0 && segment < queue.num_segments) {
      key = queue.segment_begin[segment];
      chunks = queue.segment_chunks[segment];
      ++segment;
    }
    if (chunks > 0) {
      const KeyChunk chunk = key;
      key += kChunkKeys;
      --chunks;
      return chunk;
    }
    if (gathered < queue.gathered_chunks) return ~gathered++;
    return kNoChunk;
  }
};

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_KEY_QUEUE_CUH_
