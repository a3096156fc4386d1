#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_CHECK_H_
#define LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_CHECK_H_

#include "kernels/api/kernel_set.h"

namespace longfill::cuda::attention {

// Kernels count positions in 32 bits, with room for the rows of a tile.
inline constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 128;

// What the kernels rely on, but for head_dim and the workspace. InvalidArgument naming value and limit.
absl::Status CheckAttention(const AttentionParams& params);

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_CHECK_H_
