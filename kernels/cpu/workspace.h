#ifndef LONGFILL_KERNELS_CPU_WORKSPACE_H_
#define LONGFILL_KERNELS_CPU_WORKSPACE_H_

#include <cstdint>
#include <string_view>

#include "kernels/api/kernel_set.h"

namespace longfill {

inline constexpr int64_t kWorkspaceAlignment = 64;

// Bytes that hold `parts` pieces of `bytes_each`, each aligned, wherever the workspace itself starts.
inline int64_t AlignedBytes(int64_t bytes_each) {
  return (bytes_each + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}
inline int64_t PartsBytes(int64_t parts, int64_t bytes_each) {
  return parts * AlignedBytes(bytes_each) + kWorkspaceAlignment;
}

// First aligned byte of the workspace, and the start of piece `part`.
inline char* PartOf(Workspace workspace, int64_t part, int64_t bytes_each) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(workspace.data);
  const uintptr_t skip = (kWorkspaceAlignment - start % kWorkspaceAlignment) % kWorkspaceAlignment;
  return static_cast<char*>(workspace.data) + skip + part * AlignedBytes(bytes_each);
}

// InvalidArgument naming the operation, the bytes given and the bytes needed.
absl::Status CheckWorkspace(std::string_view operation, Workspace workspace, int64_t needed_bytes);
// Unimplemented unless head_dim is a multiple of 8 in [8, kMaxHeadDim].
absl::Status CheckHeadDim(std::string_view operation, int64_t head_dim);
// InvalidArgument unless min <= value.
absl::Status CheckAtLeast(std::string_view operation, std::string_view name, int64_t value, int64_t min);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_WORKSPACE_H_
