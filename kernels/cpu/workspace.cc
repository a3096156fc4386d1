#include "kernels/cpu/workspace.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/tile_constants.h"

namespace longfill {

absl::Status CheckWorkspace(std::string_view operation, Workspace workspace, int64_t needed_bytes) {
  if (workspace.data != nullptr && workspace.size_bytes >= needed_bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(std::string(operation), ": workspace of ",
                                                 workspace.data == nullptr ? 0 : workspace.size_bytes,
                                                 " bytes, needs ", needed_bytes));
}

absl::Status CheckHeadDim(std::string_view operation, int64_t head_dim) {
  if (head_dim >= 8 && head_dim <= kMaxHeadDim && head_dim % 8 == 0) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(std::string(operation), ": no variant for head_dim ", head_dim,
                                               ", which must be a multiple of 8 up to ", kMaxHeadDim));
}

absl::Status CheckAtLeast(std::string_view operation, std::string_view name, int64_t value, int64_t min) {
  if (value >= min) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(operation), ": ", std::string(name), " ", value, " below ", min));
}

}  // namespace longfill
