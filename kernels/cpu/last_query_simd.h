#ifndef LONGFILL_KERNELS_CPU_LAST_QUERY_SIMD_H_
#define LONGFILL_KERNELS_CPU_LAST_QUERY_SIMD_H_

// One block of keys against the last queries, which lie in vector lanes in reverse: lane 0 is the last query.
// Keys that follow each other in position then shift a lane's slash entry by one, so diagonal sums are sums
// of whole vectors.

#include <cstdint>

#include "kernels/api/kernel_set.h"
#include "kernels/cpu/tile_constants.h"

namespace longfill {

struct LastQueryTile {
  const float* queries = nullptr;  // [head_dim, kTileLanes] packed, aligned to 64 bytes
  float* scores = nullptr;         // [kSelectionBlock, kTileLanes] aligned to 64 bytes
  int64_t head_dim = 0;
  int64_t num_queries = 0;
  float scale = 0;
};

struct LastQueryKeys {
  const float* rows[kSelectionBlock];
  int64_t num_keys = 0;
  // Key j is at distance last_distance - j from the last query (negative: after it), so lane i sees it iff
  // i <= last_distance - j.
  int64_t last_distance = 0;
};

// max[lane] becomes the maximum with the scores of the visible keys.
void LastQueryMax(const LastQueryTile& tile, const LastQueryKeys& keys, float* max);
// sum[lane] grows by the exponentials in units of 2^-40: whole numbers, exact for up to 4096 keys since it
// was 0.
void LastQuerySum(const LastQueryTile& tile, const LastQueryKeys& keys, const float* max, double* sum);
// Overwrites vertical[num_keys] and slash[kDiagonalWindow]. inverse_sum[lane] turns exponentials into
// probabilities.
void LastQueryProbabilities(const LastQueryTile& tile, const LastQueryKeys& keys, const float* max,
                            const float* inverse_sum, float* vertical, float* slash);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_LAST_QUERY_SIMD_H_
