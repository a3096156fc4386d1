#ifndef LONGFILL_KERNELS_CUDA_INDEX_BUILD_INDEX_H_
#define LONGFILL_KERNELS_CUDA_INDEX_BUILD_INDEX_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/api/kernel_set.h"

namespace longfill {

// KernelSet::BuildIndex: one thread block for each list. Counts are of what was stored, also after overflow.
int64_t CudaBuildIndexWorkspaceBytes(int64_t num_heads, int64_t words_per_list);
absl::Status CudaBuildIndex(const BuildIndexParams& params, Workspace workspace, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_BUILD_INDEX_H_
