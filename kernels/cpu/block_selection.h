#ifndef LONGFILL_KERNELS_CPU_BLOCK_SELECTION_H_
#define LONGFILL_KERNELS_CPU_BLOCK_SELECTION_H_

// KernelSet::Pool and SelectBlocks.

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

absl::Status CpuPool(const PoolParams& params, ThreadPool& pool);
int64_t CpuSelectBlocksWorkspaceBytes(int64_t num_row_blocks, int64_t num_key_blocks, int64_t head_dim,
                                      int num_threads);
absl::Status CpuSelectBlocks(const SelectBlocksParams& params, Workspace workspace, ThreadPool& pool);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_BLOCK_SELECTION_H_
