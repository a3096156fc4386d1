#ifndef LONGFILL_KERNELS_CUDA_INDEX_SHARE_TILE_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_SHARE_TILE_CUH_

#include <cstdint>

#include "kernels/cuda/index/row_scores.cuh"
#include "kernels/cuda/index/share_selection_args.h"

namespace longfill::cuda::share_selection {

// What a thread block selects for: kRowsOf rows of a head. Made by one thread in shared memory. Arguments are
// those of the kernel, which as parameters are read where they lie. Heads of a
// tile are neighbours, tiles with the most blocks start first.
template <int kRowsOf>
class ShareTile {
 public:
  static constexpr int kRows = kRowsOf;
  static constexpr int kRowBlocks = kRows / static_cast<int>(kRowBlock);

  __device__ __forceinline__ explicit ShareTile(const ShareSelectionArgs& args)
      : head_(static_cast<int>(blockIdx.x) % args.num_heads),
        first_row_((args.end_tile - 1 - static_cast<int64_t>(blockIdx.x) / args.num_heads) * kRows),
        num_rows_(static_cast<int>(min(args.num_rows - first_row_, int64_t{kRows}))) {
    num_blocks_ = 0;
    for (int i = 0; i < kRowBlocks; ++i) {
      const int64_t row = first_row_ + i * kRowBlock;
      blocks_before_[i] =
          Exists(i) ? static_cast<int32_t>(args.positions.Position(row) / args.block_keys) : 0;
      num_blocks_ = max(num_blocks_, blocks_before_[i]);
    }
  }

  __device__ __forceinline__ int head() const { return head_; }
  __device__ __forceinline__ int64_t first_row() const { return first_row_; }
  __device__ __forceinline__ int num_rows() const { return num_rows_; }
  __device__ __forceinline__ int32_t num_blocks() const { return num_blocks_; }  // before the last row block
  __device__ __forceinline__ int32_t num_chunks() const {
    return (num_blocks_ + kChunkBlocks - 1) / kChunkBlocks;
  }

  // Of row block i of the tile; those beyond the last row do not exist.
  __device__ __forceinline__ bool Exists(int i) const { return i * int{kRowBlock} < num_rows_; }
  __device__ __forceinline__ int32_t BlocksBefore(int i) const { return blocks_before_[i]; }
  __device__ __forceinline__ uint64_t* BitsOf(const ShareSelectionArgs& args, int i) const {
    return args.bits + RowBlockNumber(args, i) * args.words_per_row;
  }

  // Blocks are open, or not, eight at a time, and in words of 64 eights: those of row block i from eight 64 w
  // on that are open and of which it sees some block.
  __device__ __forceinline__ uint64_t OpenEights(const ShareSelectionArgs& args, int i, int32_t w) const {
    const int32_t whole = BlocksBefore(i) / kEight;  // all of whose blocks it sees
    const bool part = BlocksBefore(i) % kEight != 0;
    const int32_t count = whole - 64 * w;
    uint64_t open = count >= 64 ? ~0ULL : count <= 0 ? 0 : (1ULL << count) - 1;
    if (args.open != nullptr && open != 0) open &= args.open[RowBlockNumber(args, i) * args.open_words + w];
    return part && whole / 64 == w ? open | 1ULL << (whole % 64) : open;
  }
  __device__ __forceinline__ int32_t num_open_words() const {
    return (num_blocks_ + 64 * kEight - 1) / (64 * kEight);
  }

  // For row `row` of the tile: log2 of its sum over coarse blocks, or -infinity.
  __device__ __forceinline__ float CoarseSum(const ShareSelectionArgs& args, int row) const {
    if (args.coarse_sums == nullptr || row >= num_rows_) return -INFINITY;
    return args.coarse_sums[head_ * args.num_rows + first_row_ + row];
  }
  __device__ __forceinline__ void StoreSum(const ShareSelectionArgs& args, int row, float sum) const {
    if (row < num_rows_) args.sums[head_ * args.num_rows + first_row_ + row] = sum;
  }

  // Bits of row block i, by atomics of one thread each: plain reads could find what a cache has kept.
  __device__ __forceinline__ void SetBlocks(const ShareSelectionArgs& args, int i, int64_t word,
                                            uint64_t blocks) const {
    atomicOr(reinterpret_cast<unsigned long long*>(BitsOf(args, i) + word), blocks);
  }
  __device__ __forceinline__ void SetBlock(const ShareSelectionArgs& args, int i, int32_t block) const {
    SetBlocks(args, i, block / 64, 1ULL << (block % 64));
  }
  __device__ __forceinline__ void ClearBlock(const ShareSelectionArgs& args, int i, int32_t block) const {
    atomicAnd(reinterpret_cast<unsigned long long*>(BitsOf(args, i) + block / 64), ~(1ULL << (block % 64)));
  }
  // What every row block keeps, but of coarse blocks.
  __device__ __forceinline__ void SetForcedBlocks(const ShareSelectionArgs& args, int i) const {
    if (args.sums != nullptr) return;
    const int32_t last = BlocksBefore(i);
    SetBlock(args, i, 0);
    for (int32_t j = 0; j < kForcedNearestBlocks && j <= last; ++j) SetBlock(args, i, last - j);
  }

 private:
  static constexpr int kEight = static_cast<int>(kCoarseBlocks);
  static_assert(kEight == 8);

  __device__ __forceinline__ int64_t RowBlockNumber(const ShareSelectionArgs& args, int i) const {
    const int64_t row_blocks = (args.num_rows + kRowBlock - 1) / kRowBlock;
    return head_ * row_blocks + first_row_ / kRowBlock + i;
  }

  const int head_;
  const int64_t first_row_;
  const int num_rows_;
  int32_t num_blocks_;
  int32_t blocks_before_[kRowBlocks];
};

}  // namespace longfill::cuda::share_selection

#endif  // LONGFILL_KERNELS_CUDA_INDEX_SHARE_TILE_CUH_
