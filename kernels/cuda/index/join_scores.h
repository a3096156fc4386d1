#ifndef LONGFILL_KERNELS_CUDA_INDEX_JOIN_SCORES_H_
#define LONGFILL_KERNELS_CUDA_INDEX_JOIN_SCORES_H_

#include <cuda_runtime_api.h>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

// KernelSet::JoinScores: one pass over the windows.
absl::Status CudaJoinScores(const JoinScoresParams& params, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_JOIN_SCORES_H_
