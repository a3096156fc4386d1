#ifndef LONGFILL_KERNELS_CUDA_INDEX_REPRESENTATIVES_H_
#define LONGFILL_KERNELS_CUDA_INDEX_REPRESENTATIVES_H_

#include <cuda_runtime_api.h>

#include "kernels/api/kernel_set.h"

namespace longfill {

// KernelSet::Representatives for head dims that are multiples of 8 up to 256. Sums over a block have one
// order.
absl::Status CudaRepresentatives(const RepresentativesParams& params, DType compute_dtype,
                                 cudaStream_t stream);
// KernelSet::CoarseRepresentatives, for the same head dims.
absl::Status CudaCoarseRepresentatives(const CoarseRepresentativesParams& params, DType compute_dtype,
                                       cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_REPRESENTATIVES_H_
