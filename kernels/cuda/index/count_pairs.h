#ifndef LONGFILL_KERNELS_CUDA_INDEX_COUNT_PAIRS_H_
#define LONGFILL_KERNELS_CUDA_INDEX_COUNT_PAIRS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

// KernelSet::CountPairs, exact integers. num_tokens is below 2^31.
int64_t CudaCountPairsWorkspaceBytes(int64_t num_heads, int64_t num_tokens);
absl::Status CudaCountPairs(const CountPairsParams& params, Workspace workspace, const DeviceLimits& limits,
                            cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_COUNT_PAIRS_H_
