#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_MEMORY_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_MEMORY_CUH_

// What the warps of selection by share have in common, and who waits for whom. A tile is 192 rows, a consumer
// warpgroup for each row block of 64; the fourth warpgroup produces. A stage is one representative of each of
// 64 key blocks, or the 64 keys of a row block. All stages go through all consumers, in one order. The blocks
// of a chunk are eight eights of neighbours, those that are open to some row block of the tile.
//
// The sweep over representatives is brought by one warp with the copy engine. Scores that may turn out to
// reach their row's share are written down in shared memory, a list for each warp, and judged when the sums
// of all blocks are known. A list that runs over is cleared of what fails by now; if that does not help, the
// tile has spilled: its candidates are marked in the bits, and a second sweep, gathered by all producer
// threads, forms their scores again. Its stages lie in the same places but have barriers of their own, since
// as many threads arrive as copy.

#include <cstdint>
#include <new>

#include "kernels/cuda/hopper/barrier.cuh"
#include "kernels/cuda/hopper/shared_memory.cuh"
#include "kernels/cuda/index/row_scores.cuh"
#include "kernels/cuda/index/share_tile.cuh"

namespace longfill::cuda::hopper::share {

using share_selection::kChunkBlocks;

inline constexpr int kRowBlocks = 3;
inline constexpr int kTileRows = kRowBlocks * static_cast<int>(kRowBlock);
using Tile = share_selection::ShareTile<kTileRows>;

inline constexpr int kWarps = 4 * kRowBlocks;  // that consume
inline constexpr int kConsumerThreads = 32 * kWarps;
inline constexpr int kThreads = kConsumerThreads + kWarpgroupThreads;
// The launch gives 128 to each of 512 threads; these are dealt anew. Queries in E4M3 take half as many.
template <bool kFp8>
inline constexpr int kConsumerRegisters = kFp8 ? 152 : 160;
template <bool kFp8>
inline constexpr int kProducerRegisters = 4 * 128 - kRowBlocks* kConsumerRegisters<kFp8>;
static_assert(kChunkBlocks == kSlotKeys);

inline constexpr int kEights = kChunkBlocks / static_cast<int>(kCoarseBlocks);
// An eight of a chunk: its number, and bit i when it is open to row block i of the tile.
struct Eight {
  int32_t number_and_open;

  __device__ __forceinline__ static Eight Of(int32_t number, int32_t open) { return {number << 3 | open}; }
  __device__ __forceinline__ bool exists() const { return number_and_open >= 0; }
  __device__ __forceinline__ int32_t number() const { return number_and_open >> 3; }
  __device__ __forceinline__ bool IsOpen(int i) const { return exists() && (number_and_open >> i & 1) != 0; }
  __device__ __forceinline__ int32_t first_block() const { return (number_and_open >> 3) * 8; }
};
static_assert(kRowBlocks <= 3);
inline constexpr Eight kNoEight = {-1};  // a place of a chunk without blocks; never the last place
inline constexpr Eight kNoMore = {-2};   // in all places: there are no more chunks
inline constexpr int kLists = 2;
inline constexpr int kMaxEntries = 768;  // of a warp's list of candidate scores

// A score of the warp's row % 16 for a block: 16 * block + row, which 29 bits hold.
struct ScoreEntry {
  float score;  // not scaled
  uint32_t block_and_row;

  __device__ __forceinline__ int row() const { return static_cast<int>(block_and_row % 16); }
  __device__ __forceinline__ int32_t block() const { return static_cast<int32_t>(block_and_row / 16); }
};

// Stages that one sweep passes through.
template <int kStages>
struct StageRing {
  Barrier full[kStages];   // it was brought
  Barrier empty[kStages];  // all consumers are done with it

  __device__ __forceinline__ void Init(int arrivals_full) {
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(&full[i], arrivals_full);
      InitBarrier(&empty[i], kWarps * kArrivalsOfWarp);
    }
  }
};

// Factors of products with the blocks of a chunk or of a list, there when its first stage is; with 16-bit
// elements there are none. Like eights, those of a chunk are read after its last stage was given back: their
// place is free when all warps have given back a stage of a later one. A list's are reused as list_empty
// says.
template <bool kFp8, int kCount>
struct BlockScales {
  float of_block[kCount][kChunkBlocks];
};
template <int kCount>
struct BlockScales<false, kCount> {};

template <typename ShapeOfStage>
struct alignas(1024) Memory {
  using ShapeOf = ShapeOfStage;
  static constexpr bool kFp8 = ShapeOf::kElementBytes == 1;
  static constexpr int kStages = (128 << 10) / ShapeOf::kSlotBytes;
  static constexpr int kChunks = kStages + 1;
  using Ring = StageRing<kStages>;

  char stages[kStages][ShapeOf::kSlotBytes];
  ScoreEntry entries[kWarps][kMaxEntries];
  int32_t spilled;
  uint64_t votes[2][kWarps];            // for even and odd lists
  int32_t lists[kLists][kChunkBlocks];  // list n of candidates at n % kLists
  int32_t list_size[kLists];            // 0: there are no more
  alignas(16) BlockScales<kFp8, kChunks> chunk_scales;
  BlockScales<kFp8, kLists> list_scales;
  float largest_query[kWarps];  // of each warp's rows, where queries are rounded
  Tile tile;
  // Of chunk n at n % kChunks, ascending. A chunk that is brought is at most kStages after one that is
  // judged.
  alignas(16) Eight eights[kChunks][kEights];
  Ring chunks;     // of the first sweep
  Ring gathered;   // of the second
  Barrier marked;  // all candidates are in the bits, if the tile has spilled
  Barrier list_full[kLists], list_empty[kLists];
};

// One thread, before anybody uses it.
template <typename ShapeOf>
__device__ __forceinline__ void Init(const ShareSelectionArgs& args, Memory<ShapeOf>* memory) {
  new (&memory->tile) Tile(args);
  memory->spilled = 0;
  memory->chunks.Init(kArrivalsOfWarp);
  memory->gathered.Init(kWarpgroupThreads);
  InitBarrier(&memory->marked, kWarps * kArrivalsOfWarp);
  for (int i = 0; i < kLists; ++i) {
    InitBarrier(&memory->list_full[i], kArrivalsOfWarp);
    InitBarrier(&memory->list_empty[i], kWarps * kArrivalsOfWarp);
  }
  PublishBarriers();
}

// Waits for all that consume, warpgroups 0 .. kRowBlocks - 1; the one that produces is kRowBlocks.
__device__ __forceinline__ void SyncConsumers() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(kRowBlocks + 2), "n"(kConsumerThreads) : "memory");
}

}  // namespace longfill::cuda::hopper::share

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_MEMORY_CUH_
