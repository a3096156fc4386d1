#include "runtime/engine/engine_device.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

constexpr int64_t kLazyKernelBytes = int64_t{128} << 20;

// Of the device, by this rank's own account.
int64_t BytesInUse(Backend& backend) {
  const int64_t own = backend.memory().bytes_in_use();
  return backend.peers() == nullptr ? own : own + backend.peers()->memory().bytes_in_use();
}

}  // namespace

int DeviceOrdinal(const DeviceOptions& options, int num_devices) {
  return options.ordinal >= 0 ? options.ordinal : options.local_rank % num_devices;
}

absl::StatusOr<std::shared_ptr<Backend>> CreateBackend(const DeviceOptions& options) {
  if (options.kind == DeviceKind::kCpu) {
    if (options.compute_dtype.value_or(DType::kFloat32) != DType::kFloat32) {
      return absl::InvalidArgumentError(absl::StrCat("the CPU computes in float32, not in ",
                                                     std::string(DTypeName(*options.compute_dtype))));
    }
    return std::shared_ptr<Backend>(CreateCpuBackend(options.num_threads));
  }
  LF_ASSIGN_OR_RETURN(const int num_devices, CudaDeviceCount());
  const int ordinal = DeviceOrdinal(options, num_devices);
  if (ordinal >= num_devices) {
    return absl::InvalidArgumentError(
        absl::StrCat("CUDA device ", ordinal, " is asked for, the visible ones are 0 to ", num_devices - 1));
  }
  LF_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend,
                      CreateCudaBackend({.device = ordinal,
                                         .compute_dtype = options.compute_dtype.value_or(DType::kBFloat16),
                                         .generic_kernels = options.generic_kernels,
                                         .peer_host = options.peer_host}));
  return std::shared_ptr<Backend>(std::move(backend));
}

absl::StatusOr<int> RanksOnDevice(const DeviceOptions& options) {
  if (options.kind == DeviceKind::kCpu) return 1;
  if (options.ordinal >= 0) return options.ranks_on_host;
  LF_ASSIGN_OR_RETURN(const int num_devices, CudaDeviceCount());
  const bool one_more = DeviceOrdinal(options, num_devices) < options.ranks_on_host % num_devices;
  return options.ranks_on_host / num_devices + (one_more ? 1 : 0);
}

absl::StatusOr<int64_t> OutsideBytesInUse(Backend& backend, int ranks_on_device) {
  if (backend.kernels().device() == DeviceKind::kCpu) return 0;
  LF_ASSIGN_OR_RETURN(const int64_t free_bytes, backend.FreeMemoryBytes());
  const int64_t of_each = (backend.facts().memory_bytes - free_bytes) / ranks_on_device;
  return std::max<int64_t>(0, of_each - BytesInUse(backend));
}

absl::StatusOr<int64_t> MeasureOutsideBytes(Backend& backend, int ranks_on_device) {
  if (backend.kernels().device() == DeviceKind::kCpu) return 0;
  LF_ASSIGN_OR_RETURN(const int64_t in_use, OutsideBytesInUse(backend, ranks_on_device));
  return in_use + kLazyKernelBytes;
}

absl::StatusOr<int64_t> ForecastOutsideBytes(Backend& backend) {
  if (backend.facts().free_bytes_before == 0) return MeasureOutsideBytes(backend, 1);
  LF_ASSIGN_OR_RETURN(const int64_t free_bytes, backend.FreeMemoryBytes());
  const int64_t taken = backend.facts().free_bytes_before - free_bytes;
  return std::max<int64_t>(0, taken - BytesInUse(backend)) + kLazyKernelBytes;
}

absl::StatusOr<int64_t> AvailableDeviceBytes(Backend& backend, int ranks_on_device, int64_t outside_bytes) {
  if (backend.kernels().device() == DeviceKind::kCpu) return 0;
  LF_ASSIGN_OR_RETURN(const int64_t free_bytes, backend.FreeMemoryBytes());
  LF_ASSIGN_OR_RETURN(const int64_t idle_bytes, backend.memory().IdleBytes());
  return (free_bytes - idle_bytes) / ranks_on_device + idle_bytes + BytesInUse(backend) + outside_bytes -
         kLazyKernelBytes;
}

}  // namespace longfill
