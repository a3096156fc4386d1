#include "kernels/api/backend.h"
#include "kernels/api/cuda_devices.h"

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
absl::StatusOr<CudaVersions> ReadCudaVersions() { return BuiltWithoutCuda(); }
absl::StatusOr<std::vector<CudaDeviceFacts>> ListCudaDevices() { return BuiltWithoutCuda(); }
absl::StatusOr<double> MeasurePeerCopy(int /*from*/, int /*to*/, int64_t /*bytes*/) {
  return BuiltWithoutCuda();
}

}  // namespace longfill
