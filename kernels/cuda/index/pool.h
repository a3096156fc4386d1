#ifndef LONGFILL_KERNELS_CUDA_INDEX_POOL_H_
#define LONGFILL_KERNELS_CUDA_INDEX_POOL_H_

#include <cuda_runtime_api.h>

#include "kernels/api/kernel_set.h"

namespace longfill {

// KernelSet::Pool for head dims that are multiples of 8. Sums are fp32 in an order that depends on the block
// alone.
absl::Status CudaPool(const PoolParams& params, DType compute_dtype, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_POOL_H_
