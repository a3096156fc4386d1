#ifndef LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_H_
#define LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

// KernelSet::LastQueryRowMax, LastQueryRowSum, LastQueryScore for head dims 64, 96, 128 and 256. K is read
// twice: RowMax leaves each block's maximum and sum of exponentials in the workspace, from which RowSum
// works. What belongs to a block of 128 keys is computed by one warp (two for head dim 256) in an order of
// its own, so results do not depend on where the block lies, on the launch, or on which heads are in the
// call.
int64_t CudaLastQueryWorkspaceBytes(int64_t num_heads, int64_t num_keys, int64_t head_dim);
absl::Status CudaLastQueryRowMax(const LastQueryParams& params, float* row_max, Workspace workspace,
                                 DType compute_dtype, const DeviceLimits& limits, cudaStream_t stream);
absl::Status CudaLastQueryRowSum(const LastQueryParams& params, const float* row_max, uint64_t* row_sum,
                                 Workspace workspace, DType compute_dtype, const DeviceLimits& limits,
                                 cudaStream_t stream);
absl::Status CudaLastQueryScore(const LastQueryParams& params, const float* row_max, const uint64_t* row_sum,
                                const LastQueryScores& scores, Workspace workspace, DType compute_dtype,
                                const DeviceLimits& limits, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_H_
