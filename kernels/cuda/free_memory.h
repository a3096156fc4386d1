#ifndef LONGFILL_KERNELS_CUDA_FREE_MEMORY_H_
#define LONGFILL_KERNELS_CUDA_FREE_MEMORY_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace longfill {

// Free bytes of a device, asked of the driver's management library (NVML), which makes no context on it; 0
// where that library or the device in it is missing.
int64_t FreeBytesWithoutContext(const cudaUUID_t& device);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_FREE_MEMORY_H_
