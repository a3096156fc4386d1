#ifndef LONGFILL_KERNELS_CUDA_UPLOAD_H_
#define LONGFILL_KERNELS_CUDA_UPLOAD_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <type_traits>

#include "kernels/base/status.h"

namespace longfill {

// Writes `bytes` of host memory to device memory `to` (aligned to 4 bytes) in stream order, as parameters of
// kernel launches: the host memory has been read on return, and a captured graph holds its own copy. For
// tables of some kilobytes; one launch for each kUploadBytes.
inline constexpr int64_t kUploadBytes = 4000;
absl::Status Upload(void* to, const void* host, int64_t bytes, cudaStream_t stream);

template <typename T>
absl::Status Upload(T* to, std::span<const std::type_identity_t<T>> values, cudaStream_t stream) {
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) >= 4);
  return Upload(static_cast<void*>(to), values.data(), static_cast<int64_t>(values.size_bytes()), stream);
}

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_UPLOAD_H_
