#ifndef LONGFILL_KERNELS_CPU_CPU_KERNEL_SET_H_
#define LONGFILL_KERNELS_CPU_CPU_KERNEL_SET_H_

#include <memory>

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

// The CPU backend: fp32 compute and accumulation, vectorised with run-time dispatch, threads only through
// `pool`. `pool` and `memory` outlive the result. Results do not depend on the number of threads.
std::unique_ptr<KernelSet> CreateCpuKernelSet(ThreadPool& pool, MemoryResource& memory);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_CPU_KERNEL_SET_H_
