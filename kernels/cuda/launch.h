#ifndef LONGFILL_KERNELS_CUDA_LAUNCH_H_
#define LONGFILL_KERNELS_CUDA_LAUNCH_H_

// Kernel launches that are checked and always name their stream. Included by .cu files only.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/cuda/cuda_status.h"

namespace longfill {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct LaunchShape {
  int64_t grid_x = 1, grid_y = 1, grid_z = 1;
  int block = 0;             // threads
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;           // thread blocks of a cluster, along x; more than 1 needs sm_90
};

inline constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
inline constexpr int64_t kMaxGridYZ = 65535;
inline constexpr int64_t kSharedBytesWithoutOptIn = 48 << 10;

// Blocks for `items` that a kernel walks in a loop with the grid's stride: all of them, or as many as keep
// every SM of the device busy in `waves` waves of `blocks_per_sm`.
inline int64_t LoopGrid(int64_t items, int num_sms, int blocks_per_sm, int waves = 4) {
  return std::min(items, int64_t{num_sms} * blocks_per_sm * waves);
}

// An empty grid is legal and launches nothing. `name` is for errors. Arguments convert to the parameters of
// the kernel as in a call. Errors of the run itself surface at Stream::Sync.
template <typename... Params, typename... Args>
absl::Status Launch(const char* name, void (*kernel)(Params...), const LaunchShape& shape,
                    cudaStream_t stream, Args&&... args) {
  if (shape.grid_x == 0 || shape.grid_y == 0 || shape.grid_z == 0) return absl::OkStatus();
  if (shape.grid_x > kMaxGridX || shape.grid_y > kMaxGridYZ || shape.grid_z > kMaxGridYZ) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": grid of ", shape.grid_x, " x ", shape.grid_y, " x ", shape.grid_z,
        " blocks is above the device's limit of ", kMaxGridX, " x ", kMaxGridYZ, " x ", kMaxGridYZ));
  }
  if (shape.shared_bytes > kSharedBytesWithoutOptIn) {
    LF_RETURN_IF_ERROR(CudaStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shape.shared_bytes)),
                                  absl::StrCat(name, ", shared memory of ", shape.shared_bytes, " bytes")));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid_x), static_cast<unsigned>(shape.grid_y),
                        static_cast<unsigned>(shape.grid_z));
  config.blockDim = dim3(static_cast<unsigned>(shape.block));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  if (shape.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  return CudaStatus(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_LAUNCH_H_
