#include "kernels/cuda/hopper/index/launch_share_selection.cuh"

namespace longfill::cuda::hopper {

template absl::Status LaunchShareSelection<DType::kBFloat16, 64, false>(const ShareSelectionArgs&, int64_t,
                                                                        const ShareMaps&, cudaStream_t);
template absl::Status LaunchShareSelection<DType::kFloat16, 64, false>(const ShareSelectionArgs&, int64_t,
                                                                       const ShareMaps&, cudaStream_t);

}  // namespace longfill::cuda::hopper
