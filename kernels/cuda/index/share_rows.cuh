#ifndef LONGFILL_KERNELS_CUDA_INDEX_SHARE_ROWS_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_SHARE_ROWS_CUH_

// The rows of a tile that one warp has: their scores for the 64 key blocks of a chunk, running maxima and
// sums, votes. Representative r of the blocks of a chunk lies in one stage, block i in row i, so that a
// product for block i is at the same place for every r: the largest of them is an elementwise maximum of
// fragments.

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/tile_memory.cuh"
#include "kernels/cuda/index/share_selection_args.h"

namespace longfill::cuda::share_selection {

using attention::FastExp2;
using attention::LoadMatrices;
using attention::MultiplyAdd;
using attention::SharedAddress;
using attention::Swizzle;

inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;

// How far below its threshold so far, in units of log2, a score still makes its block a candidate: more than
// what rounding takes from a threshold, which without rounding could only rise.
inline constexpr float kCandidateSlack = 1.0F / 64;

template <typename Element, typename Shape>
class ShareRows {
 public:
  static constexpr int kHeadDim = Shape::kHeadDim;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kBlockTiles = Shape::kChunkBlocks / 8;
  static constexpr int kTilesAtOnce = 4;  // of blocks, whose products are formed side by side
  static constexpr int kSteps = kHeadDim / 16;

  // Rows from num_rows on do not exist; they are counted from the tile's first.
  __device__ __forceinline__ ShareRows(float scale_log2, float share_log2, int num_rows)
      : scale_log2_(scale_log2),
        share_log2_(share_log2),
        lane_(static_cast<int>(threadIdx.x) % 32),
        first_row_(static_cast<int>(threadIdx.x) / 32 * Shape::kWarpRows),
        num_rows_(num_rows) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max_[i][half] = -INFINITY;
        sum_[i][half] = 0;
      }
    }
  }

  // From the tile's rows in shared memory. Matrices 0 and 1 are the two halves of 16 rows, 2 and 3 the same
  // of the next 8 dims.
  __device__ __forceinline__ void LoadQueries(const char* rows) {
    const int row = lane_ % 8;
    const uint32_t address =
        SharedAddress(rows) +
        static_cast<uint32_t>((first_row_ + row + 8 * (lane_ / 8 % 2)) * Shape::kRowBytes);
    const int place = Swizzle<kHeadDim>(row, lane_ / 16);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        LoadMatrices(q_[i][step], Place(address, 16 * i, 2 * step ^ place));
      }
    }
  }

  // Scores of a chunk are the largest products, not scaled, with the stages since Clear().
  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kBlockTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores_[i][n][e] = -INFINITY;
      }
    }
  }
  // `bonus` is added to the products. Matrices 0 and 1 are the two halves of 16 dims of 8 blocks, 2 and 3 the
  // same of the next 8 blocks.
  __device__ __forceinline__ void Score(const char* stage, float bonus) {
    const int row = lane_ % 8;
    const uint32_t address =
        SharedAddress(stage) + static_cast<uint32_t>((row + 8 * (lane_ / 16)) * Shape::kRowBytes);
    const int place = Swizzle<kHeadDim>(row, lane_ / 8 % 2);
#pragma unroll
    for (int first = 0; first < kBlockTiles; first += kTilesAtOnce) {
      float products[kRowTiles][kTilesAtOnce][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int n = 0; n < kTilesAtOnce; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) products[i][n][e] = bonus;
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int n = 0; n < kTilesAtOnce; n += 2) {
          uint32_t k[4];
          LoadMatrices(k, Place(address, 8 * (first + n), 2 * step ^ place));
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            MultiplyAdd<Element>(products[i][n], q_[i][step], k[0], k[1]);
            MultiplyAdd<Element>(products[i][n + 1], q_[i][step], k[2], k[3]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int n = 0; n < kTilesAtOnce; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            scores_[i][first + n][e] = fmaxf(scores_[i][first + n][e], products[i][n][e]);
          }
        }
      }
    }
  }

  // Hides the blocks of the chunk from `num_visible` on.
  __device__ __forceinline__ void Mask(int num_visible) {
    if (num_visible >= Shape::kChunkBlocks) return;
#pragma unroll
    for (int n = 0; n < kBlockTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * n + 2 * (lane_ % 4) + e % 2 < num_visible) continue;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) scores_[i][n][e] = -INFINITY;
      }
    }
  }

  // For the keys of the row block in place of blocks: hides those after each row.
  __device__ __forceinline__ void MaskLater() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kBlockTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = (first_row_ + 16 * i + 8 * (e / 2) + lane_ / 4) % int{kRowBlock};
          if (8 * n + 2 * (lane_ % 4) + e % 2 > row) scores_[i][n][e] = -INFINITY;
        }
      }
    }
  }

  // Takes the chunk, of which some block is visible, into maxima and sums.
  __device__ __forceinline__ void Accumulate() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float best = -INFINITY;
#pragma unroll
        for (int n = 0; n < kBlockTiles; ++n) {
          best = fmaxf(best, fmaxf(scores_[i][n][2 * half], scores_[i][n][2 * half + 1]));
        }
        best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 1));
        best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 2));
        const float max = fmaxf(max_[i][half], best * scale_log2_);
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kBlockTiles; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            sum += FastExp2(fmaf(scores_[i][n][e], scale_log2_, -max));
          }
        }
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        sum_[i][half] = fmaf(sum_[i][half], FastExp2(max_[i][half] - max), sum);
        max_[i][half] = max;
      }
    }
  }

  // Scaled scores from which on a row gives a block its share, with the blocks taken in so far; no score is
  // as high for rows that do not exist or have seen no block.
  __device__ __forceinline__ void SetThresholds() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row_ + 16 * i + 8 * half + lane_ / 4;
        const bool votes = row < num_rows_ && sum_[i][half] > 0;
        thresholds_[i][half] = votes ? max_[i][half] + log2f(sum_[i][half]) + share_log2_ : INFINITY;
      }
    }
  }

  // Bit b: some row of the warp votes for block b of the chunk. All lanes return it.
  __device__ __forceinline__ uint64_t Votes(float slack) const {
    uint32_t low = 0, high = 0;
#pragma unroll
    for (int n = 0; n < kBlockTiles; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        bool vote = false;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            vote |= scores_[i][n][2 * half + column] * scale_log2_ >= thresholds_[i][half] - slack;
          }
        }
        const uint32_t bit = (vote ? 1U : 0U) << (8 * (n % 4) + column);
        (n < 4 ? low : high) |= bit;
      }
    }
    const int shift = 2 * (lane_ % 4);  // lane l has the columns 2 (l % 4) and the next of each eight
    low = __reduce_or_sync(kAllLanes, low << shift);
    high = __reduce_or_sync(kAllLanes, high << shift);
    return uint64_t{high} << 32 | low;
  }

 private:
  // `rows` further down, at a permuted place of 16 bytes.
  __device__ __forceinline__ static uint32_t Place(uint32_t matrix_row, int rows, int place) {
    return matrix_row + static_cast<uint32_t>(rows * Shape::kRowBytes + place * 16);
  }

  const float scale_log2_;
  const float share_log2_;
  const int lane_;
  const int first_row_;  // of the warp, in the tile
  const int num_rows_;   // of the tile
  uint32_t q_[kRowTiles][kSteps][4];
  float scores_[kRowTiles][kBlockTiles][4];
  float max_[kRowTiles][2];  // scaled
  float sum_[kRowTiles][2];  // relative to it
  float thresholds_[kRowTiles][2];
};

}  // namespace longfill::cuda::share_selection

#endif  // LONGFILL_KERNELS_CUDA_INDEX_SHARE_ROWS_CUH_
