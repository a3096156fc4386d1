#ifndef LONGFILL_KERNELS_CPU_LAST_QUERY_H_
#define LONGFILL_KERNELS_CPU_LAST_QUERY_H_

// KernelSet::LastQueryRowMax, LastQueryRowSum, LastQueryScore. What belongs to a key is computed by the same
// sequence of exactly rounded operations wherever the key lies, maxima are order-free and sums over keys are
// sums of integers; so all results are bit-identical however keys are dealt, on all machines with fused
// multiply-add (those without agree among themselves).

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

int64_t CpuLastQueryWorkspaceBytes(int64_t head_dim, int num_threads);
absl::Status CpuLastQueryRowMax(const LastQueryParams& params, float* row_max, Workspace workspace,
                                ThreadPool& pool);
absl::Status CpuLastQueryRowSum(const LastQueryParams& params, const float* row_max, uint64_t* row_sum,
                                Workspace workspace, ThreadPool& pool);
absl::Status CpuLastQueryScore(const LastQueryParams& params, const float* row_max, const uint64_t* row_sum,
                               const LastQueryScores& scores, Workspace workspace, ThreadPool& pool);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_LAST_QUERY_H_
