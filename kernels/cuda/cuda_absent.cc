#include "kernels/api/backend.h"

namespace longfill {
namespace {
absl::Status BuiltWithoutCuda() {
  return absl::UnimplementedError(
      "this longfill was built without CUDA (CMake option LONGFILL_CUDA, preset cuda): it has no GPU "
      "backend");
}
}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaBackendOptions& /*options*/) {
  return BuiltWithoutCuda();
}

absl::StatusOr<int> CudaDeviceCount() { return BuiltWithoutCuda(); }

}  // namespace longfill
