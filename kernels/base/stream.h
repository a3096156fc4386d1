#ifndef LONGFILL_KERNELS_BASE_STREAM_H_
#define LONGFILL_KERNELS_BASE_STREAM_H_

#include <chrono>
#include <cstdint>

#include "kernels/base/status.h"

namespace longfill {

enum class DeviceKind : uint8_t { kCpu, kCuda };

class Event;

// An ordered queue of work on one device. Work given to a KernelSet or Communicator with a stream runs in the
// order given, on memory of the stream's device; on the CPU every call has finished when it returns, so
// waiting is immediate there. One thread at a time.
class Stream {
 public:
  virtual ~Stream() = default;
  virtual DeviceKind device() const = 0;
  // Waits until all work given so far has run. Reports errors of that work; a device that does not answer
  // within kDeviceDeadline gives DeadlineExceeded.
  virtual absl::Status Sync() = 0;
  // Later work on this stream waits for the event; does not block. An event that was never recorded is past.
  virtual absl::Status WaitFor(const Event& event) = 0;

  static constexpr std::chrono::seconds kDeviceDeadline{300};
};

// A point in a stream. One thread at a time, but WaitFor of another stream may run beside Wait.
class Event {
 public:
  virtual ~Event() = default;
  virtual absl::Status Record(Stream& stream) = 0;  // of the same device; moves the event there
  virtual absl::StatusOr<bool> Passed() const = 0;
  virtual absl::Status Wait() const = 0;  // blocks the calling thread, at most kDeviceDeadline
  // Device time between two events that have passed.
  virtual absl::StatusOr<double> SecondsSince(const Event& earlier) const = 0;
};

class CpuStream final : public Stream {
 public:
  DeviceKind device() const override { return DeviceKind::kCpu; }
  absl::Status Sync() override { return absl::OkStatus(); }
  absl::Status WaitFor(const Event&) override { return absl::OkStatus(); }
};

class CpuEvent final : public Event {
 public:
  absl::Status Record(Stream& stream) override;
  absl::StatusOr<bool> Passed() const override { return true; }
  absl::Status Wait() const override { return absl::OkStatus(); }
  absl::StatusOr<double> SecondsSince(const Event& earlier) const override;

 private:
  std::chrono::steady_clock::time_point time_{};
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_BASE_STREAM_H_
