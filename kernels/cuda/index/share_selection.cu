// Selection by share of one tile after the other: one sweep over the representatives of all blocks before the
// tile, one over those of the few candidates that it leaves.
//
// A row keeps a block iff its score reaches T = log2(sum over its blocks of 2^score) + log2(tau). The sum so
// far gives a threshold that only rises, so what fails it is out for good: the first sweep marks the others
// in the bits, as candidates, and needs no second look at the rest. The second one forms the scores of
// candidates again, gathered 64 at a time, and clears the bits of those that no row keeps.

#include <cmath>
#include <cstdint>
#include <new>

#include "kernels/cuda/attention/tile_memory.cuh"
#include "kernels/cuda/index/gather_blocks.cuh"
#include "kernels/cuda/index/row_scores.cuh"
#include "kernels/cuda/index/share_rows.cuh"
#include "kernels/cuda/index/share_selection_args.h"
#include "kernels/cuda/index/share_tile.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/packed.cuh"

namespace longfill {
namespace cuda::share_selection {
namespace {

using attention::CopyRows;
using attention::RowSource;
using attention::WaitForCopies;

template <typename Shape>
struct SharedMemory {
  ShareTile<Shape::kRows> tile;
  // The tile's queries go through them first.
  alignas(128) char stages[Shape::kStages][kChunkBlocks * Shape::kRowBytes];
  uint64_t votes[2][Shape::kWarps];  // of even and odd chunks
  int32_t gathered[kChunkBlocks];    // key blocks of a gathered chunk
  int32_t num_gathered;
  int32_t next_word;  // behind those that they are of
};

template <typename Element, typename Shape>
class Tile {
 public:
  static constexpr int kRowBlocks = ShareTile<Shape::kRows>::kRowBlocks;

  __device__ __forceinline__ Tile(const ShareSelectionArgs& args, SharedMemory<Shape>* shared)
      : args_(args),
        shared_(*shared),
        thread_(static_cast<int>(threadIdx.x)),
        warp_(static_cast<int>(threadIdx.x) / 32),
        tile_(shared->tile),
        rows_(args.scale_log2, args.share_log2[shared->tile.head()],
              shared->tile.num_rows() - warp_ * Shape::kWarpRows) {}

  __device__ __forceinline__ void Run() {
    LoadQueries();
    if (args_.num_samples > 0) TakeOwnKeys();
    MarkCandidates();
    StoreSums();
    ClearOthers();
    SetForcedBlocks();
  }

 private:
  // What the warps of row block i have voted for.
  __device__ __forceinline__ uint64_t VotesOf(int i, int parity) const {
    uint64_t votes = 0;
    for (int warp = 0; warp < Shape::kWarpsOfRowBlock; ++warp) {
      votes |= shared_.votes[parity][i * Shape::kWarpsOfRowBlock + warp];
    }
    return votes;
  }

  __device__ __forceinline__ void LoadQueries() {
    const int64_t row_bytes = 2 * args_.q_row_stride;
    const char* q = static_cast<const char*>(args_.q) + 2 * tile_.head() * args_.q_head_stride +
                    tile_.first_row() * row_bytes;
    static_assert(Shape::kRows <= Shape::kStages * kChunkBlocks);
    CopyRows<Shape, Shape::kRows>(shared_.stages[0], [&](int i) {
      const bool exists = i < tile_.num_rows();
      return RowSource{q + (exists ? i : 0) * row_bytes, exists};
    });
    WaitForCopies();
    __syncthreads();
    queries_.LoadQueries(shared_.stages[0]);
    if (args_.fp8) {
      const int first_row = warp_ / Shape::kWarpsOfRowBlock * int{kRowBlock};
      queries_.RoundToE4m3(shared_.stages[0] + first_row * Shape::kRowBytes);
    }
    __syncthreads();  // before stages are written
  }

  // The keys of each row block itself, into the sums of its rows.
  __device__ __forceinline__ void TakeOwnKeys() {
    const int64_t row_bytes = 2 * args_.own_k_row_stride;
    const char* k = static_cast<const char*>(args_.own_k) + tile_.first_row() * row_bytes;
    for (int row_block = 0; row_block < kRowBlocks; ++row_block) {
      CopyRows<Shape, kChunkBlocks>(shared_.stages[0], [&](int i) {
        const int row = row_block * int{kRowBlock} + i;
        const bool exists = row < tile_.num_rows();
        return RowSource{k + (exists ? row : 0) * row_bytes, exists};
      });
      WaitForCopies();
      __syncthreads();
      if (warp_ / Shape::kWarpsOfRowBlock == row_block) {
        rows_.Clear();
        queries_.Score(shared_.stages[0], 0, &rows_);
        rows_.MaskLater(warp_ % Shape::kWarpsOfRowBlock * Shape::kWarpRows);
        rows_.Accumulate();
      }
      __syncthreads();  // before the stage is written
    }
  }
  __device__ __forceinline__ float Bonus(int r) const {
    return r < args_.num_samples ? args_.sample_bonus : 0;
  }

  // Starts to copy representative r of 64 blocks; block_of(i) is the i-th of them, or negative.
  template <typename BlockOf>
  __device__ __forceinline__ void LoadStage(int stage, int r, const BlockOf& block_of) {
    const char* plane = static_cast<const char*>(args_.representatives) + 2 * r * args_.plane_stride;
    CopyRows<Shape, kChunkBlocks>(shared_.stages[stage], [&](int i) {
      const int64_t block = block_of(i);
      return RowSource{plane + (block < 0 ? 0 : block) * Shape::kRowBytes, block >= 0};
    });
  }

  // Eights of the chunk that are open to row block i.
  __device__ __forceinline__ uint32_t OpenOf(int i, int32_t chunk) const {
    if (!tile_.Exists(i)) return 0;
    return static_cast<uint32_t>(tile_.OpenEights(args_, i, chunk / 8) >> (chunk % 8 * 8)) & 0xFF;
  }
  // The last chunk up to this one of which something is open to some row block, or -1.
  __device__ __forceinline__ int32_t LastOpen(int32_t chunk) const {
    for (; chunk >= 0; --chunk) {
      for (int i = 0; i < kRowBlocks; ++i) {
        if (OpenOf(i, chunk) != 0) return chunk;
      }
    }
    return -1;
  }

  // From the nearest chunk to the first, since most rows give near blocks much of their share: their
  // thresholds are close to the last ones soon. Stages follow each other over the ends of chunks; what was
  // voted for a chunk is written one stage later.
  __device__ __forceinline__ void MarkCandidates() {
    for (int i = 0; i < kRowBlocks; ++i) {
      if (!tile_.Exists(i)) continue;
      for (int64_t w = thread_; w < args_.words_per_row; w += Shape::kThreads) tile_.BitsOf(args_, i)[w] = 0;
    }
    __syncthreads();
    const auto load = [&](int stage, int32_t chunk, int r) {
      LoadStage(stage, r, [&](int i) {
        const int32_t block = chunk * kChunkBlocks + i;
        return block < tile_.num_blocks() ? block : -1;
      });
    };
    const int row_block = warp_ / Shape::kWarpsOfRowBlock;
    const int32_t blocks_before = tile_.BlocksBefore(row_block);
    int stage = 0;
    int32_t before = -1;  // the chunk before this one
    int32_t chunk = LastOpen(tile_.num_chunks() - 1);
    if (chunk >= 0) load(0, chunk, 0);
    for (int parity = 0; chunk >= 0; parity ^= 1) {
      const int32_t next = LastOpen(chunk - 1);
      rows_.Clear();
      for (int r = 0; r < args_.num_representatives; ++r) {
        WaitForCopies();
        __syncthreads();  // the stage is here, the other one has been read
        if (r == 0 && before >= 0) WriteCandidates(before, parity ^ 1);
        const bool last = r + 1 == args_.num_representatives;
        if (!last) {
          load(stage ^ 1, chunk, r + 1);
        } else if (next >= 0) {
          load(stage ^ 1, next, 0);
        }
        queries_.Score(shared_.stages[stage], Bonus(r), &rows_);
        stage ^= 1;
      }
      const uint32_t open = OpenOf(row_block, chunk);
      uint64_t votes = 0;
      if (open != 0) {
        const int32_t num_visible = blocks_before - chunk * kChunkBlocks;
        if (open != 0xFF || num_visible < kChunkBlocks) {
          rows_.Mask([&](int n) { return (open >> n & 1) != 0 ? num_visible - 8 * n : 0; });
        }
        rows_.Accumulate();
        if (rows_.HasCandidates()) {
          SetThresholds();
          votes = rows_.Votes(kCandidateSlack);
        }
      }
      if (thread_ % 32 == 0) shared_.votes[parity][warp_] = votes;
      before = chunk;
      chunk = next;
      if (next < 0) {
        __syncthreads();
        WriteCandidates(before, parity);
      }
    }
    __syncthreads();  // the bits can be read
  }

  __device__ __forceinline__ void WriteCandidates(int32_t chunk, int parity) {
    if (thread_ < kRowBlocks && tile_.Exists(thread_))
      tile_.BitsOf(args_, thread_)[chunk] = VotesOf(thread_, parity);
  }

  __device__ __forceinline__ int RowOf(int i, int half) const {
    return warp_ * Shape::kWarpRows + 16 * i + 8 * half + thread_ % 32 / 4;
  }
  __device__ __forceinline__ void SetThresholds() {
    rows_.SetThresholds([&](int i, int half) { return tile_.CoarseSum(args_, RowOf(i, half)); });
  }
  __device__ __forceinline__ void StoreSums() {
    if (args_.sums == nullptr) return;
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = rows_.LogSum(i, half);
        if (thread_ % 4 == 0) tile_.StoreSum(args_, RowOf(i, half), sum);
      }
    }
  }

  __device__ __forceinline__ void ClearOthers() {
    SetThresholds();  // of all blocks
    for (int32_t word = 0; word < tile_.num_chunks();) {
      if (warp_ == 0) Gather(word);
      __syncthreads();
      word = shared_.next_word;
      const int count = shared_.num_gathered;
      if (count > 0) ClearGathered(count);
      __syncthreads();  // before others are gathered
    }
  }

  // Of any row block of the tile, from `word` on. One warp.
  __device__ __forceinline__ void Gather(int32_t word) {
    const auto candidates = [&](int32_t w) {
      uint64_t bits = 0;
      for (int i = 0; i < kRowBlocks; ++i) {
        if (tile_.Exists(i)) bits |= tile_.BitsOf(args_, i)[w];
      }
      return bits;
    };
    const int found = GatherBlocks(tile_.num_chunks(), candidates, shared_.gathered, &word);
    if (thread_ != 0) return;
    shared_.num_gathered = found;
    shared_.next_word = word;
  }

  __device__ __forceinline__ void ClearGathered(int count) {
    const auto load = [&](int stage, int r) {
      LoadStage(stage, r, [&](int i) { return i < count ? shared_.gathered[i] : -1; });
    };
    load(0, 0);
    rows_.Clear();
    for (int r = 0; r < args_.num_representatives; ++r) {
      WaitForCopies();
      __syncthreads();  // the stage is here, the other one has been read
      if (r + 1 < args_.num_representatives) load((r + 1) % 2, r + 1);
      queries_.Score(shared_.stages[r % 2], Bonus(r), &rows_);
    }
    // Blocks that this warp's rows do not see may get votes; their bits are not set, so nothing clears them.
    const uint64_t votes = rows_.Votes();
    if (thread_ % 32 == 0) shared_.votes[0][warp_] = votes;
    __syncthreads();
    const int row_block = thread_ / kChunkBlocks;
    const int i = thread_ % kChunkBlocks;
    if (row_block >= kRowBlocks || !tile_.Exists(row_block) || i >= count) return;
    if ((VotesOf(row_block, 0) >> i & 1) != 0) return;
    tile_.ClearBlock(args_, row_block, shared_.gathered[i]);
  }

  __device__ __forceinline__ void SetForcedBlocks() {
    if (thread_ < kRowBlocks && tile_.Exists(thread_)) tile_.SetForcedBlocks(args_, thread_);
  }

  const ShareSelectionArgs& args_;
  SharedMemory<Shape>& shared_;
  const int thread_;
  const int warp_;
  const ShareTile<Shape::kRows>& tile_;
  ShareRows<Element, Shape> queries_;
  RowScores<Shape::kRowTiles> rows_;
};

// A thread block does one tile of one head.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(ShareShape<kHeadDim>::kThreads, ShareShape<kHeadDim>::kBlocksPerSm)
    ShareSelectionKernel(const __grid_constant__ ShareSelectionArgs args) {
  extern __shared__ __align__(128) char memory[];
  using Shape = ShareShape<kHeadDim>;
  auto* shared = reinterpret_cast<SharedMemory<Shape>*>(memory);
  if (threadIdx.x == 0) new (&shared->tile) ShareTile<Shape::kRows>(args);
  __syncthreads();
  Tile<Element, Shape>(args, shared).Run();
}

template <typename Element, int kHeadDim>
absl::Status LaunchVariant(const ShareSelectionArgs& args, int64_t num_tiles, cudaStream_t stream) {
  using Shape = ShareShape<kHeadDim>;
  return Launch("ShareSelectionKernel", ShareSelectionKernel<Element, kHeadDim>,
                {.grid_x = num_tiles * args.num_heads,
                 .block = Shape::kThreads,
                 .shared_bytes = sizeof(SharedMemory<Shape>)},
                stream, args);
}

}  // namespace
}  // namespace cuda::share_selection

absl::Status LaunchShareSelection(const ShareSelectionArgs& args, int64_t num_tiles, int64_t head_dim,
                                  DType dtype, cudaStream_t stream) {
  return cuda::WithComputeType(dtype, [&]<typename Element>() {
    using cuda::share_selection::LaunchVariant;
    switch (head_dim) {
      case 64:
        return LaunchVariant<Element, 64>(args, num_tiles, stream);
      case 96:
        return LaunchVariant<Element, 96>(args, num_tiles, stream);
      case 128:
        return LaunchVariant<Element, 128>(args, num_tiles, stream);
      case 256:
        return LaunchVariant<Element, 256>(args, num_tiles, stream);
      default:
        return absl::UnimplementedError(absl::StrCat("share selection: no variant for head_dim ", head_dim,
                                                     ", only for 64, 96, 128 and 256"));
    }
  });
}

}  // namespace longfill
