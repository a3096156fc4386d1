#ifndef LONGFILL_KERNELS_CUDA_CHECK_H_
#define LONGFILL_KERNELS_CUDA_CHECK_H_

// Checks of parameters, before anything is launched.

#include <cstdint>
#include <string_view>
#include <type_traits>

#include "kernels/api/kernel_set.h"
#include "kernels/base/status.h"

namespace longfill::cuda {

// InvalidArgument naming the operation and the value unless min <= value.
absl::Status CheckAtLeast(std::string_view operation, std::string_view name, int64_t value, int64_t min);
// InvalidArgument naming the operation, the bytes given and the bytes needed.
absl::Status CheckWorkspace(std::string_view operation, Workspace workspace, int64_t needed_bytes);
// Unimplemented unless dtype is float32, bfloat16 or float16.
absl::Status CheckFloat(std::string_view operation, std::string_view name, DType dtype);

// True where every pointer or byte count is a multiple of 16, so that a kernel may use 16-byte accesses.
template <typename... Values>
bool AlignedTo16(Values... values) {
  const auto bits = [](auto value) {
    if constexpr (std::is_pointer_v<decltype(value)>) {
      return reinterpret_cast<uintptr_t>(value);
    } else {
      return static_cast<uintptr_t>(value);
    }
  };
  return (... && (bits(values) % 16 == 0));
}

}  // namespace longfill::cuda

#endif  // LONGFILL_KERNELS_CUDA_CHECK_H_
