#ifndef LONGFILL_KERNELS_CPU_BLOCK_LISTS_H_
#define LONGFILL_KERNELS_CPU_BLOCK_LISTS_H_

// KernelSet::BuildBlockLists.

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

absl::Status CpuBuildBlockLists(const BuildBlockListsParams& params, ThreadPool& pool);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_BLOCK_LISTS_H_
