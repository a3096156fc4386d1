#include "kernels/cuda/attention/launch_attention.cuh"

namespace longfill::cuda::attention {

template absl::Status LaunchAttention<DType::kBFloat16, 256, 64>(const Args&, int, const DeviceLimits&,
                                                                 cudaStream_t);
template absl::Status LaunchAttention<DType::kBFloat16, 256, 128>(const Args&, int, const DeviceLimits&,
                                                                  cudaStream_t);
template int64_t SharedBytes<DType::kBFloat16, 256, 64>();
template int64_t SharedBytes<DType::kBFloat16, 256, 128>();

}  // namespace longfill::cuda::attention
