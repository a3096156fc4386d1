#ifndef LONGFILL_KERNELS_CUDA_INDEX_SHARE_TILE_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_SHARE_TILE_CUH_

#include <cstdint>

#include "kernels/cuda/index/row_scores.cuh"
#include "kernels/cuda/index/share_selection_args.h"

namespace longfill::cuda::share_selection {

// What a thread block selects for: kRowsOf rows of a head. Heads of a tile are neighbours, tiles with the
// most blocks start first.
template <int kRowsOf>
class ShareTile {
 public:
  static constexpr int kRows = kRowsOf;
  static constexpr int kRowBlocks = kRows / static_cast<int>(kRowBlock);

  __device__ __forceinline__ explicit ShareTile(const ShareSelectionArgs& args)
      : args_(args),
        head_(static_cast<int>(blockIdx.x) % args.num_heads),
        first_row_((args.end_tile - 1 - static_cast<int64_t>(blockIdx.x) / args.num_heads) * kRows),
        num_rows_(static_cast<int>(min(args.num_rows - first_row_, int64_t{kRows}))) {
    num_blocks_ = 0;
    for (int i = 0; i < kRowBlocks; ++i) num_blocks_ = max(num_blocks_, BlocksBefore(i));
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
  __device__ __forceinline__ int32_t BlocksBefore(int i) const {
    if (!Exists(i)) return 0;
    return static_cast<int32_t>(args_.positions.Position(first_row_ + i * kRowBlock) / kRowBlock);
  }
  __device__ __forceinline__ uint64_t* BitsOf(int i) const {
    const int64_t row_blocks = (args_.num_rows + kRowBlock - 1) / kRowBlock;
    return args_.bits + (head_ * row_blocks + first_row_ / kRowBlock + i) * args_.words_per_row;
  }

  // Bits of row block i, by atomics of one thread each: plain reads could find what a cache has kept.
  __device__ __forceinline__ void SetBlocks(int i, int64_t word, uint64_t blocks) const {
    atomicOr(reinterpret_cast<unsigned long long*>(BitsOf(i) + word), blocks);
  }
  __device__ __forceinline__ void SetBlock(int i, int32_t block) const {
    SetBlocks(i, block / 64, 1ULL << (block % 64));
  }
  __device__ __forceinline__ void ClearBlock(int i, int32_t block) const {
    atomicAnd(reinterpret_cast<unsigned long long*>(BitsOf(i) + block / 64), ~(1ULL << (block % 64)));
  }
  // What every row block keeps.
  __device__ __forceinline__ void SetForcedBlocks(int i) const {
    const int32_t last = BlocksBefore(i);
    SetBlock(i, 0);
    for (int32_t j = 0; j < kForcedNearestBlocks && j <= last; ++j) SetBlock(i, last - j);
  }

 private:
  const ShareSelectionArgs& args_;
  const int head_;
  const int64_t first_row_;
  const int num_rows_;
  int32_t num_blocks_;
};

}  // namespace longfill::cuda::share_selection

#endif  // LONGFILL_KERNELS_CUDA_INDEX_SHARE_TILE_CUH_
