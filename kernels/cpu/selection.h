#ifndef LONGFILL_KERNELS_CPU_SELECTION_H_
#define LONGFILL_KERNELS_CPU_SELECTION_H_

// KernelSet::SelectionHistogram, Pool, SelectBlocks.

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

absl::Status CpuSelectionHistogram(const SelectionHistogramParams& params, ThreadPool& pool);
absl::Status CpuPool(const PoolParams& params, ThreadPool& pool);
// The interface has no workspace for the scores of all key blocks, so they are taken from `memory` for the
// call: at most 272 bytes for each key block and thread.
absl::Status CpuSelectBlocks(const SelectBlocksParams& params, MemoryResource& memory, ThreadPool& pool);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_SELECTION_H_
