#ifndef LONGFILL_KERNELS_CPU_SHARE_SELECTION_H_
#define LONGFILL_KERNELS_CPU_SHARE_SELECTION_H_

// KernelSet::Representatives, CoarseRepresentatives and SelectByShare.

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

absl::Status CpuRepresentatives(const RepresentativesParams& params, ThreadPool& pool);
absl::Status CpuCoarseRepresentatives(const CoarseRepresentativesParams& params, ThreadPool& pool);
int64_t CpuShareSelectionWorkspaceBytes(const ShareSelectionBounds& bounds, int num_threads);
absl::Status CpuSelectByShare(const ShareSelectionParams& params, Workspace workspace, ThreadPool& pool);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_SHARE_SELECTION_H_
