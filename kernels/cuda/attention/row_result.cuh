#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_ROW_RESULT_CUH_
#define LONGFILL_KERNELS_CUDA_ATTENTION_ROW_RESULT_CUH_

#include <cmath>

namespace longfill::cuda::attention {

// What a row becomes: `weight` times its sums plus old_weight times what is there.
struct RowResult {
  float weight, old_weight, lse;
};

// Of a row whose probabilities relative to `max` have this sum; old_lse is -infinity where nothing is there.
__device__ __forceinline__ RowResult ResultOf(float max, float sum, float old_lse) {
  if (sum == 0) return {0, 0, -INFINITY};
  const float lse = max + logf(sum);
  if (old_lse == -INFINITY) return {1 / sum, 0, lse};
  const float larger = fmaxf(lse, old_lse);
  const float part = expf(lse - larger);
  const float old_part = expf(old_lse - larger);
  const float both = part + old_part;
  return {part / (both * sum), old_part / both, larger + logf(both)};
}

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_ROW_RESULT_CUH_
