#ifndef LONGFILL_KERNELS_CUDA_INDEX_SHARE_SELECTION_H_
#define LONGFILL_KERNELS_CUDA_INDEX_SHARE_SELECTION_H_

#include <cuda_runtime_api.h>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

// KernelSet::SelectByShare for head dims 64, 96, 128 and 256 and rows aligned to 16 bytes. Launches are cut
// so that none is predicted above 200 ms. Only two levels and fp8 scores take a workspace.
int64_t CudaShareSelectionWorkspaceBytes(const ShareSelectionBounds& bounds, const DeviceLimits& limits);
absl::Status CudaSelectByShare(const ShareSelectionParams& params, Workspace workspace, DType compute_dtype,
                               const DeviceLimits& limits, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_SHARE_SELECTION_H_
