#ifndef LONGFILL_KERNELS_BASE_STREAM_H_
#define LONGFILL_KERNELS_BASE_STREAM_H_

#include <cstdint>

#include "kernels/base/status.h"

namespace longfill {

enum class DeviceKind : uint8_t { kCpu, kCuda };

// An ordered queue of work on one device. Work given to a KernelSet or Communicator with a stream runs in the
// order given; on the CPU every call has finished when it returns, so Sync() is immediate there.
class Stream {
 public:
  virtual ~Stream() = default;
  virtual DeviceKind device() const = 0;
  virtual absl::Status Sync() = 0;
};

class CpuStream final : public Stream {
 public:
  DeviceKind device() const override { return DeviceKind::kCpu; }
  absl::Status Sync() override { return absl::OkStatus(); }
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_BASE_STREAM_H_
