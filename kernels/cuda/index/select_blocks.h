#ifndef LONGFILL_KERNELS_CUDA_INDEX_SELECT_BLOCKS_H_
#define LONGFILL_KERNELS_CUDA_INDEX_SELECT_BLOCKS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

// KernelSet::SelectBlocks for head dims that are multiples of 8 up to 256. Row blocks go through the
// workspace some at a time; a product of means is one chain of fp32 multiply-adds, the same bits wherever it
// is formed.
int64_t CudaSelectBlocksWorkspaceBytes(int64_t num_row_blocks, int64_t num_key_blocks, int64_t head_dim);
absl::Status CudaSelectBlocks(const SelectBlocksParams& params, Workspace workspace,
                              const DeviceLimits& limits, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_SELECT_BLOCKS_H_
