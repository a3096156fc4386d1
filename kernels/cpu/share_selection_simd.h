#ifndef LONGFILL_KERNELS_CPU_SHARE_SELECTION_SIMD_H_
#define LONGFILL_KERNELS_CPU_SHARE_SELECTION_SIMD_H_

// Steps of selection by share for one block of up to 64 rows, which lie in vector lanes. Arrays of lanes are
// aligned to 64 bytes.

#include <cstdint>

#include "kernels/cpu/tile_constants.h"

namespace longfill {

// What stands for each of some blocks: `num` rows, to whose products with the first num_samples ones
// sample_bonus is added.
struct BlockRows {
  int64_t num = 1;
  int64_t num_samples = 0;
  float sample_bonus = 0;
};

// scores[b][lane] = max over r of the product of packed[.][lane] with rows[b * of_block.num + r], and
// row_max[lane] is raised to it. products [num_blocks * of_block.num, kTileLanes] is scratch.
void ScoreBlocks(const float* packed, int64_t head_dim, const float* const* rows, int64_t num_blocks,
                 const BlockRows& of_block, float* products, float* scores, float* row_max);

// scores[b][lane] becomes 2^(scores[b][lane] - row_max[lane]); row_sum[lane] is their sum, in ascending b.
void ExponentiateBlocks(const float* row_max, int64_t num_blocks, float* scores, float* row_sum);

// Sets bit b of `bits` where scores[b][lane] >= threshold[lane] for some lane.
void VoteForBlocks(const float* scores, int64_t num_blocks, const float* threshold, uint64_t* bits);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_SHARE_SELECTION_SIMD_H_
