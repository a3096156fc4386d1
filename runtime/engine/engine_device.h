#ifndef LONGFILL_RUNTIME_ENGINE_ENGINE_DEVICE_H_
#define LONGFILL_RUNTIME_ENGINE_ENGINE_DEVICE_H_

// Which device a rank computes on, and how much of its memory the rank may plan with.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "kernels/api/backend.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

namespace longfill {

struct DeviceOptions {
  DeviceKind kind = DeviceKind::kCpu;
  std::optional<DType> compute_dtype;  // empty: float32 on the CPU, bfloat16 on CUDA
  int ordinal = -1;                    // of CUDA; -1: local_rank modulo the visible devices
  bool generic_kernels = false;        // of CudaBackendOptions
  int num_threads = 1;                 // on the CPU
  int ranks_on_host = 1;
  int local_rank = 0;     // among them
  std::string peer_host;  // of CudaBackendOptions
};

// Which of the `num_devices` visible GPUs the rank takes: `ordinal`, which need not be there, or that of its
// local rank.
int DeviceOrdinal(const DeviceOptions& options, int num_devices);

// Errors are those of CreateCudaBackend; InvalidArgument for an ordinal that is not there or a compute dtype
// that the device does not have.
absl::StatusOr<std::shared_ptr<Backend>> CreateBackend(const DeviceOptions& options);

// How many of `options.ranks_on_host` ranks would compute on the device of this one, if all of them see the
// same devices; 1 on the CPU.
absl::StatusOr<int> RanksOnDevice(const DeviceOptions& options);

// Bytes of the device that this rank uses outside of backend.memory() and what it shares with peers: driver,
// context, libraries, and room for kernels that are loaded when they first run. Ranks that share the device
// are taken to be alike, so all of them have allocated what they keep. 0 on the CPU.
absl::StatusOr<int64_t> MeasureOutsideBytes(Backend& backend, int ranks_on_device);
// What a process that has just made `backend` will use so, whatever others use of the device. 0 on the CPU.
absl::StatusOr<int64_t> ForecastOutsideBytes(Backend& backend);
// MeasureOutsideBytes without that room: what there is.
absl::StatusOr<int64_t> OutsideBytesInUse(Backend& backend, int ranks_on_device);

// Bytes of the device for the next prompt of this rank, with what backend.memory() has in use and the
// `outside_bytes` that were measured, since plans count both. What backend.memory() holds for later
// allocations is this rank's alone. 0 on the CPU.
absl::StatusOr<int64_t> AvailableDeviceBytes(Backend& backend, int ranks_on_device, int64_t outside_bytes);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_ENGINE_DEVICE_H_
