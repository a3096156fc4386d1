#ifndef LONGFILL_KERNELS_CPU_INDEX_H_
#define LONGFILL_KERNELS_CPU_INDEX_H_

// KernelSet::BuildIndex and CountPairs.

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

absl::Status CpuBuildIndex(const BuildIndexParams& params, ThreadPool& pool);
absl::Status CpuCountPairs(const CountPairsParams& params, ThreadPool& pool);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_INDEX_H_
