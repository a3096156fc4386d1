#include "kernels/cuda/hopper/launch_attention.cuh"

namespace longfill::cuda::hopper {

template absl::Status LaunchAttention<DType::kFloat16, 64>(const attention::Args&, int, const DeviceLimits&,
                                                           cudaStream_t);

}  // namespace longfill::cuda::hopper
