// Selection by share of one tile after the other: one sweep over the representatives of all blocks before the
// tile, one over those of the few candidates that it leaves.
//
// A row keeps a block iff its score reaches T = log2(sum over its blocks of 2^score) + log2(tau). The sum so
// far gives a threshold that only rises, so what fails it is out for good: the first sweep marks the others
// in the bits, as candidates, and needs no second look at the rest. The second one forms the scores of
// candidates again, gathered 64 at a time, and clears the bits of those that no row keeps.

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention/tile_memory.cuh"
#include "kernels/cuda/index/share_rows.cuh"
#include "kernels/cuda/index/share_selection_args.h"
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
  // The tile's queries go through them first.
  alignas(128) char stages[Shape::kStages][Shape::kChunkBlocks * Shape::kRowBytes];
  uint64_t votes[2][Shape::kWarps];       // of even and odd chunks
  int32_t gathered[Shape::kChunkBlocks];  // key blocks of a gathered chunk
  int32_t num_gathered;
  int32_t next_word;  // behind those that they are of
};

template <typename Element, typename Shape>
class Tile {
 public:
  static constexpr int kChunkBlocks = Shape::kChunkBlocks;
  static constexpr int kRowBlocks = Shape::kRowBlocks;

  __device__ __forceinline__ Tile(const ShareSelectionArgs& args, SharedMemory<Shape>* shared)
      : args_(args),
        shared_(*shared),
        thread_(static_cast<int>(threadIdx.x)),
        warp_(static_cast<int>(threadIdx.x) / 32),
        head_(static_cast<int>(blockIdx.x) % args.num_heads),
        first_row_((args.end_tile - 1 - static_cast<int64_t>(blockIdx.x) / args.num_heads) * Shape::kRows),
        num_rows_(static_cast<int>(min(args.num_rows - first_row_, int64_t{Shape::kRows}))),
        rows_(args.scale_log2, args.share_log2[head_], num_rows_) {
    num_blocks_ = 0;
    for (int i = 0; i < kRowBlocks; ++i) num_blocks_ = max(num_blocks_, BlocksBefore(i));
  }

  __device__ __forceinline__ void Run() {
    LoadQueries();
    if (args_.num_samples > 0) TakeOwnKeys();
    MarkCandidates();
    ClearOthers();
    SetForcedBlocks();
  }

 private:
  // Of row block i of the tile; those beyond the last row do not exist.
  __device__ __forceinline__ bool Exists(int i) const { return i * int{kRowBlock} < num_rows_; }
  __device__ __forceinline__ int32_t BlocksBefore(int i) const {
    if (!Exists(i)) return 0;
    return static_cast<int32_t>(args_.positions.Position(first_row_ + i * kRowBlock) / kRowBlock);
  }
  __device__ __forceinline__ uint64_t* BitsOf(int i) const {
    const int64_t row_blocks = (args_.num_rows + kRowBlock - 1) / kRowBlock;
    return args_.bits + (head_ * row_blocks + first_row_ / kRowBlock + i) * args_.words_per_row;
  }
  __device__ __forceinline__ int32_t NumChunks() const {
    return (num_blocks_ + kChunkBlocks - 1) / kChunkBlocks;
  }
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
    const char* q =
        static_cast<const char*>(args_.q) + 2 * head_ * args_.q_head_stride + first_row_ * row_bytes;
    static_assert(Shape::kRows <= Shape::kStages * kChunkBlocks);
    CopyRows<Shape, Shape::kRows>(shared_.stages[0], [&](int i) {
      const bool exists = i < num_rows_;
      return RowSource{q + (exists ? i : 0) * row_bytes, exists};
    });
    WaitForCopies();
    __syncthreads();
    rows_.LoadQueries(shared_.stages[0]);
    __syncthreads();  // before stages are written
  }

  // The keys of each row block itself, into the sums of its rows.
  __device__ __forceinline__ void TakeOwnKeys() {
    const int64_t row_bytes = 2 * args_.own_k_row_stride;
    const char* k = static_cast<const char*>(args_.own_k) + first_row_ * row_bytes;
    for (int row_block = 0; row_block < kRowBlocks; ++row_block) {
      CopyRows<Shape, kChunkBlocks>(shared_.stages[0], [&](int i) {
        const int row = row_block * int{kRowBlock} + i;
        const bool exists = row < num_rows_;
        return RowSource{k + (exists ? row : 0) * row_bytes, exists};
      });
      WaitForCopies();
      __syncthreads();
      if (warp_ / Shape::kWarpsOfRowBlock == row_block) {
        rows_.Clear();
        rows_.Score(shared_.stages[0], 0);
        rows_.MaskLater();
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

  // From the nearest chunk to the first, since most rows give near blocks much of their share: their
  // thresholds are close to the last ones soon. Stages follow each other over the ends of chunks; what was
  // voted for a chunk is written one stage later.
  __device__ __forceinline__ void MarkCandidates() {
    const int32_t num_chunks = NumChunks();
    const auto load = [&](int stage, int32_t chunk, int r) {
      LoadStage(stage, r, [&](int i) {
        const int32_t block = chunk * kChunkBlocks + i;
        return block < num_blocks_ ? block : -1;
      });
    };
    const int32_t blocks_before = BlocksBefore(warp_ / Shape::kWarpsOfRowBlock);  // of this warp's rows
    int stage = 0;
    if (num_chunks > 0) load(0, num_chunks - 1, 0);
    for (int32_t chunk = num_chunks - 1; chunk >= 0; --chunk) {
      rows_.Clear();
      for (int r = 0; r < args_.num_representatives; ++r) {
        WaitForCopies();
        __syncthreads();  // the stage is here, the other one has been read
        if (r == 0 && chunk + 1 < num_chunks) WriteCandidates(chunk + 1);
        const bool last = r + 1 == args_.num_representatives;
        if (!last) {
          load(stage ^ 1, chunk, r + 1);
        } else if (chunk > 0) {
          load(stage ^ 1, chunk - 1, 0);
        }
        rows_.Score(shared_.stages[stage], Bonus(r));
        stage ^= 1;
      }
      const int32_t num_visible = blocks_before - chunk * kChunkBlocks;  // the same for all rows of a warp
      uint64_t votes = 0;
      if (num_visible > 0) {
        rows_.Mask(num_visible);
        rows_.Accumulate();
        rows_.SetThresholds();
        votes = rows_.Votes(kCandidateSlack);
      }
      if (thread_ % 32 == 0) shared_.votes[chunk % 2][warp_] = votes;
    }
    __syncthreads();
    if (num_chunks > 0) WriteCandidates(0);
    for (int i = 0; i < kRowBlocks; ++i) {
      if (!Exists(i)) continue;
      for (int64_t w = num_chunks + thread_; w < args_.words_per_row; w += Shape::kThreads) BitsOf(i)[w] = 0;
    }
    __syncthreads();  // the bits can be read
  }

  __device__ __forceinline__ void WriteCandidates(int32_t chunk) {
    if (thread_ < kRowBlocks && Exists(thread_)) BitsOf(thread_)[chunk] = VotesOf(thread_, chunk % 2);
  }

  __device__ __forceinline__ void ClearOthers() {
    rows_.SetThresholds();  // of all blocks
    for (int32_t word = 0; word < NumChunks();) {
      if (warp_ == 0) Gather(word);
      __syncthreads();
      word = shared_.next_word;
      const int count = shared_.num_gathered;
      if (count > 0) ClearGathered(count);
      __syncthreads();  // before others are gathered
    }
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
      rows_.Score(shared_.stages[r % 2], Bonus(r));
    }
    // Blocks that this warp's rows do not see may get votes; their bits are not set, so nothing clears them.
    const uint64_t votes = rows_.Votes(0);
    if (thread_ % 32 == 0) shared_.votes[0][warp_] = votes;
    __syncthreads();
    const int row_block = thread_ / kChunkBlocks;
    const int i = thread_ % kChunkBlocks;
    if (row_block >= kRowBlocks || !Exists(row_block) || i >= count) return;
    if ((VotesOf(row_block, 0) >> i & 1) != 0) return;
    const int32_t block = shared_.gathered[i];
    atomicAnd(reinterpret_cast<unsigned long long*>(BitsOf(row_block) + block / 64), ~(1ULL << (block % 64)));
  }

  // The candidates of whole words from `word` on, of any row block of the tile, as many as fit: those of one
  // word at least. One warp.
  __device__ __forceinline__ void Gather(int32_t word) {
    const int lane = thread_ % 32;
    int found = 0;
    int taken = 32;  // words, a prefix of the lanes
    while (taken == 32) {
      const int32_t w = word + lane;
      uint64_t candidates = 0;
      for (int i = 0; i < kRowBlocks; ++i) {
        if (w < NumChunks() && Exists(i)) candidates |= BitsOf(i)[w];
      }
      const int count = __popcll(candidates);
      int inclusive = count;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, inclusive, step);
        if (lane >= step) inclusive += other;
      }
      const bool fits = w < NumChunks() && found + inclusive <= kChunkBlocks;
      if (fits) {
        for (int at = found + inclusive - count; candidates != 0; ++at, candidates &= candidates - 1) {
          shared_.gathered[at] = w * 64 + __ffsll(static_cast<long long>(candidates)) - 1;
        }
      }
      taken = __popc(__ballot_sync(kAllLanes, fits));
      if (taken > 0) found += __shfl_sync(kAllLanes, inclusive, taken - 1);
      word += taken;
    }
    if (lane == 0) {
      shared_.num_gathered = found;
      shared_.next_word = word;
    }
  }

  // By atomics like the clearing: plain reads could find what a cache has kept.
  __device__ __forceinline__ void SetForcedBlocks() {
    if (thread_ >= kRowBlocks || !Exists(thread_)) return;
    const int32_t last = BlocksBefore(thread_);
    const auto set = [&](int32_t block) {
      atomicOr(reinterpret_cast<unsigned long long*>(BitsOf(thread_) + block / 64), 1ULL << (block % 64));
    };
    set(0);
    for (int32_t i = 0; i < kForcedNearestBlocks && i <= last; ++i) set(last - i);
  }

  const ShareSelectionArgs& args_;
  SharedMemory<Shape>& shared_;
  const int thread_;
  const int warp_;
  const int head_;
  const int64_t first_row_;  // of the tile
  const int num_rows_;       // of the tile
  int32_t num_blocks_;       // before the tile's last row block
  ShareRows<Element, Shape> rows_;
};

// A thread block does one tile of one head. Heads of a tile are neighbours, tiles with the most blocks start
// first.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(ShareShape<kHeadDim>::kThreads, ShareShape<kHeadDim>::kBlocksPerSm)
    ShareSelectionKernel(const __grid_constant__ ShareSelectionArgs args) {
  extern __shared__ __align__(128) char memory[];
  using Shape = ShareShape<kHeadDim>;
  Tile<Element, Shape>(args, reinterpret_cast<SharedMemory<Shape>*>(memory)).Run();
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
