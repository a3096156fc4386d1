#include "kernels/cuda/check.h"

#include "absl/strings/str_cat.h"

namespace longfill::cuda {
namespace {
absl::string_view Text(std::string_view text) { return {text.data(), text.size()}; }
}  // namespace

absl::Status CheckAtLeast(std::string_view operation, std::string_view name, int64_t value, int64_t min) {
  if (value >= min) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(Text(operation), ": ", Text(name), " ", value, " is below ", min));
}

absl::Status CheckWorkspace(std::string_view operation, Workspace workspace, int64_t needed_bytes) {
  if (workspace.size_bytes >= needed_bytes && (workspace.data != nullptr || needed_bytes == 0)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(Text(operation), ": workspace of ", workspace.size_bytes,
                                                 " bytes, ", needed_bytes, " are needed"));
}

absl::Status CheckFloat(std::string_view operation, std::string_view name, DType dtype) {
  if (IsFloat(dtype)) return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat(Text(operation), ": no variant for ", Text(name), " of ", Text(DTypeName(dtype))));
}

}  // namespace longfill::cuda
