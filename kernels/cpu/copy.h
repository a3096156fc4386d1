#ifndef LONGFILL_KERNELS_CPU_COPY_H_
#define LONGFILL_KERNELS_CPU_COPY_H_

// KernelSet::CopyIn and CopyOut (one memory, so both are a copy), Copy2D, Zero and FillRandom.

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

absl::Status CpuCopy(void* to, const void* from, int64_t bytes, ThreadPool& pool);
absl::Status CpuCopy2D(const Copy2DParams& params, ThreadPool& pool);
absl::Status CpuZero(void* data, int64_t bytes, ThreadPool& pool);
absl::Status CpuFillRandom(const FillRandomParams& params, ThreadPool& pool);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_COPY_H_
