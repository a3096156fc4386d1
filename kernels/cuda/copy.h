#ifndef LONGFILL_KERNELS_CUDA_COPY_H_
#define LONGFILL_KERNELS_CUDA_COPY_H_

// KernelSet's CopyIn, CopyOut, Copy2D and Zero.

#include <cuda_runtime_api.h>

#include "kernels/api/kernel_set.h"

namespace longfill {

// Up to kInlineCopyBytes travel as kernel parameters, without waiting and in a captured graph too. More is
// read by the copy engine, and since the host memory must have been read on return, the call then waits for
// the stream.
inline constexpr int64_t kInlineCopyBytes = int64_t{64} << 10;
absl::Status CudaCopyIn(void* to, const void* host, int64_t bytes, Stream& stream);
// Does not wait where `host` is page-locked memory.
absl::Status CudaCopyOut(void* host, const void* from, int64_t bytes, cudaStream_t stream);
absl::Status CudaCopy2D(const Copy2DParams& params, cudaStream_t stream);
absl::Status CudaZero(void* data, int64_t bytes, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_COPY_H_
