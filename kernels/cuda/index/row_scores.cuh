#ifndef LONGFILL_KERNELS_CUDA_INDEX_ROW_SCORES_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_ROW_SCORES_CUH_

// The scores that the rows of one warp have for the 64 key blocks of a chunk, running maxima and sums of
// shares, votes. The same for mma.sync and wgmma, whose results lie alike in a warp: lane l has, of each 16
// rows, l / 4 and the one 8 further on, and of each 8 blocks 2 (l % 4) and the next.

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/cuda/index/share_selection_args.h"

namespace longfill::cuda::share_selection {

using attention::FastExp2;
using attention::kAllLanes;

inline constexpr int kChunkBlocks = 64;  // key blocks that are scored together: a word of bits

// Below all scores, and finite, so that nothing has to be told apart.
inline constexpr float kNoMax = -1e30F;

// How far below its threshold so far, in units of log2, a score still makes its block a candidate: more than
// what rounding takes from a threshold, which without rounding could only rise.
inline constexpr float kCandidateSlack = 1.0F / 64;

// Of kRowTiles times 16 rows.
template <int kRowTiles>
class RowScores {
 public:
  static constexpr int kBlockTiles = kChunkBlocks / 8;

  // Rows of the warp from num_rows on do not exist; it may be negative.
  __device__ __forceinline__ RowScores(float scale_log2, float share_log2, int num_rows)
      : scale_log2_(scale_log2), share_log2_(share_log2), num_rows_(num_rows) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max_[i][half] = kNoMax;
        sum_[i][half] = 0;
        thresholds_[i][half] = -INFINITY;
      }
    }
  }

  // What scores are multiplied with beside the scale, before the first are taken in.
  __device__ __forceinline__ void ScaleBy(float factor) { scale_log2_ *= factor; }

  // [16 rows][8 blocks], then row / 8, block % 2: the largest products with the representatives so far, not
  // scaled.
  float scores[kRowTiles][kBlockTiles][4];

  // Before the first representative of a chunk.
  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kBlockTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[i][n][e] = -INFINITY;
      }
    }
  }
  // Hides all but the first num_visible(n) blocks of the n-th eight of the chunk.
  template <typename NumVisible>
  __device__ __forceinline__ void Mask(const NumVisible& num_visible) {
#pragma unroll
    for (int n = 0; n < kBlockTiles; ++n) {
      const int count = num_visible(n);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (2 * (lane() % 4) + e % 2 < count) continue;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) scores[i][n][e] = -INFINITY;
      }
    }
  }

  // For the keys of the row block in place of blocks: hides those after each row. The warp's rows begin at
  // `first_row` of it.
  __device__ __forceinline__ void MaskLater(int first_row) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kBlockTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = first_row + 16 * i + 8 * (e / 2) + lane() / 4;
          if (8 * n + 2 * (lane() % 4) + e % 2 > row) scores[i][n][e] = -INFINITY;
        }
      }
    }
  }

  // Takes the chunk into maxima and sums of each lane's blocks, eight after eight from the last to the first:
  // what comes out does not depend on which eights make a chunk, and hidden ones change nothing.
  __device__ __forceinline__ void Accumulate() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        best_[i][half] = -INFINITY;
#pragma unroll
        for (int n = kBlockTiles - 1; n >= 0; --n) {
          const float first = scores[i][n][2 * half], second = scores[i][n][2 * half + 1];
          const float best = fmaxf(first, second) * scale_log2_;
          const float max = fmaxf(max_[i][half], best);
          sum_[i][half] =
              fmaf(sum_[i][half], FastExp2(max_[i][half] - max), FastExp2(fmaf(first, scale_log2_, -max)));
          sum_[i][half] += FastExp2(fmaf(second, scale_log2_, -max));
          max_[i][half] = max;
          best_[i][half] = fmaxf(best_[i][half], best);
        }
      }
    }
  }

  // log2 of a row's sum over the blocks taken in so far, in its four lanes; -infinity if there are none.
  __device__ __forceinline__ float LogSum(int i, int half) const {
    float max = max_[i][half];
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
    float sum = sum_[i][half] * FastExp2(max_[i][half] - max);
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    return max + __log2f(sum);
  }
  // Scaled scores from which on a row gives a block its share, with the blocks taken in so far or with
  // least_sum(i, half), where that is more, as log2 of a sum; no score is as high for rows that do not exist
  // or have neither. Until then every score is.
  template <typename LeastSum>
  __device__ __forceinline__ void SetThresholds(const LeastSum& least_sum) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = fmaxf(LogSum(i, half), least_sum(i, half));
        const bool votes = 16 * i + 8 * half + lane() / 4 < num_rows_ && sum > -INFINITY;
        thresholds_[i][half] = votes ? sum + share_log2_ : INFINITY;
      }
    }
  }

  // Whether the chunk that was taken in last may have candidates, by thresholds that were set before or after
  // it and may still rise: most chunks have none.
  __device__ __forceinline__ bool HasCandidates() const {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) any |= best_[i][half] >= thresholds_[i][half] - kCandidateSlack;
    }
    return __any_sync(kAllLanes, any) != 0;
  }

  // Whether a row of the warp, below 16 kRowTiles, gives a block its share with such a score, not scaled. All
  // lanes ask at the same time, each for its own.
  __device__ __forceinline__ bool GivesShare(int row, float score, float slack) const {
    bool gives = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float threshold = __shfl_sync(kAllLanes, thresholds_[i][half], row % 8 * 4);
        if (row / 8 == 2 * i + half) gives = score * scale_log2_ >= threshold - slack;
      }
    }
    return gives;
  }
  // Bit 4 n + e: by thresholds so far, scores[i][n][e] may make its block one that is kept.
  __device__ __forceinline__ uint32_t CandidateScores(int i) const {
    uint32_t candidates = 0;
#pragma unroll
    for (int n = 0; n < kBlockTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool candidate = scores[i][n][e] * scale_log2_ >= thresholds_[i][e / 2] - kCandidateSlack;
        candidates |= (candidate ? 1U : 0U) << (4 * n + e);
      }
    }
    return candidates;
  }

  // Bit b: some row of the warp votes for block b of the chunk. All lanes return it.
  __device__ __forceinline__ uint64_t Votes(float slack = 0) const {
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
            vote |= scores[i][n][2 * half + column] * scale_log2_ >= thresholds_[i][half] - slack;
          }
        }
        const uint32_t bit = (vote ? 1U : 0U) << (8 * (n % 4) + column);
        (n < 4 ? low : high) |= bit;
      }
    }
    const int shift = 2 * (lane() % 4);  // lane l has the columns 2 (l % 4) and the next of each eight
    low = __reduce_or_sync(kAllLanes, low << shift);
    high = __reduce_or_sync(kAllLanes, high << shift);
    return uint64_t{high} << 32 | low;
  }

 private:
  __device__ __forceinline__ static int lane() { return attention::Thread() % 32; }

  float scale_log2_;
  const float share_log2_;
  const int num_rows_;        // of the warp
  float max_[kRowTiles][2];   // scaled, of the lane's blocks
  float sum_[kRowTiles][2];   // relative to it
  float best_[kRowTiles][2];  // scaled, of the lane's blocks of the chunk that was taken in last
  float thresholds_[kRowTiles][2];
};

}  // namespace longfill::cuda::share_selection

#endif  // LONGFILL_KERNELS_CUDA_INDEX_ROW_SCORES_CUH_
