#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_H_
#define LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

// KernelSet::Attention on sm_80 and newer for the query heads `heads`, ascending, alone: mma.sync and
// cp.async. compute_dtype is bfloat16 or float16; head_dim 64, 96, 128 or 256. The bits of a row depend on
// its index, the keys and key range, and on which rows of its 64-row block are given; not on the launch,
// cta_limit or other rows.
absl::Status CudaAttention(const AttentionParams& params, std::span<const int32_t> heads, Workspace workspace,
                           DType compute_dtype, const DeviceLimits& limits, cudaStream_t stream);

int64_t CudaAttentionWorkspaceBytes(const AttentionBounds& bounds);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_H_
