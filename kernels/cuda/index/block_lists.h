#ifndef LONGFILL_KERNELS_CUDA_INDEX_BLOCK_LISTS_H_
#define LONGFILL_KERNELS_CUDA_INDEX_BLOCK_LISTS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

// KernelSet::BuildBlockLists: the bits of each row are counted, the counts are added up, the lists are
// filled.
int64_t CudaBuildBlockListsWorkspaceBytes(int64_t num_heads, int64_t num_row_blocks);
absl::Status CudaBuildBlockLists(const BuildBlockListsParams& params, Workspace workspace,
                                 const DeviceLimits& limits, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_BLOCK_LISTS_H_
