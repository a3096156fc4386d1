#ifndef LONGFILL_KERNELS_CUDA_HOPPER_ATTENTION_H_
#define LONGFILL_KERNELS_CUDA_HOPPER_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

// The query heads of a call that HopperAttention serves, and the others, each ascending: on compute
// capability 9.0 with head_dim 64, 96 or 128 all but those in parity coverage, whose runs do not move with
// the rows.
struct HopperHeads {
  std::vector<int32_t> served, others;
};
HopperHeads SplitHopperHeads(const AttentionParams& params, const DeviceLimits& limits);

// KernelSet::Attention on sm_90 for the query heads `heads`, which it serves, alone: TMA and wgmma.
// compute_dtype is bfloat16 or float16. The bits of a row depend on its index, the keys and key range, and on
// which rows of its 128-row tile are given; not on the launch, cta_limit or other rows.
absl::Status HopperAttention(const AttentionParams& params, std::span<const int32_t> heads,
                             Workspace workspace, DType compute_dtype, const DeviceLimits& limits,
                             cudaStream_t stream);

int64_t HopperAttentionWorkspaceBytes(const AttentionBounds& bounds);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_ATTENTION_H_
