#include "kernels/base/stream.h"

namespace longfill {

absl::Status CpuEvent::Record(Stream& stream) {
  if (stream.device() != DeviceKind::kCpu) {
    return absl::InvalidArgumentError("a CPU event is recorded on a stream of another device");
  }
  time_ = std::chrono::steady_clock::now();
  return absl::OkStatus();
}

absl::StatusOr<double> CpuEvent::SecondsSince(const Event& earlier) const {
  const auto* other = dynamic_cast<const CpuEvent*>(&earlier);
  if (other == nullptr) {
    return absl::InvalidArgumentError("a CPU event is compared with an event of another device");
  }
  constexpr std::chrono::steady_clock::time_point kNever{};
  if (time_ == kNever || other->time_ == kNever) {
    return absl::FailedPreconditionError("time between events of which one was never recorded");
  }
  return std::chrono::duration<double>(time_ - other->time_).count();
}

}  // namespace longfill
