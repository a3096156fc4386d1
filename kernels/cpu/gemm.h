#ifndef LONGFILL_KERNELS_CPU_GEMM_H_
#define LONGFILL_KERNELS_CPU_GEMM_H_

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

int64_t CpuGemmWorkspaceBytes(int64_t max_in_width, int num_threads);

// KernelSet::Gemm through oneDNN's sgemm, one thread a call, over blocks of rows and columns of the output.
// The bits of an output row depend on its input row and the weight only. oneDNN's own depend on the number of
// rows of a call too: with AVX-512 below 16 rows, with AVX2 where its blocks of up to 144 rows are no
// multiple of
// 6. So calls have a multiple of 24 rows and at most 144, and column blocks depend on out_width alone
// (tests/unit/cpu/gemm_test.cc checks this on the machine at hand).
absl::Status CpuGemm(const GemmParams& params, Workspace workspace, ThreadPool& pool);

// out = (accumulate ? out : 0) + x * weight^T, all fp32 row-major, on the calling thread alone. Needs
// num_rows, out_width and in_width >= 1. Also what benchmarks compare with.
absl::Status SingleThreadSgemm(const float* x, int64_t x_stride, const float* weight, int64_t num_rows,
                               int64_t out_width, int64_t in_width, bool accumulate, float* out,
                               int64_t out_stride);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_GEMM_H_
