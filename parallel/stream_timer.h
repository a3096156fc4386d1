#ifndef LONGFILL_PARALLEL_STREAM_TIMER_H_
#define LONGFILL_PARALLEL_STREAM_TIMER_H_

#include <cstddef>
#include <memory>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"

namespace longfill {

// Time that parts of a stream's work take on its device, by events; keeps its events for the next
// measurement.
class StreamTimer {
 public:
  explicit StreamTimer(Backend& backend) : backend_(&backend) {}

  void Reset() { used_ = 0; }
  absl::Status Begin(Stream& stream) { return Record(stream); }
  absl::Status End(Stream& stream) { return Record(stream); }
  // Sum over the parts since Reset, all of which have ended and run.
  absl::StatusOr<double> Seconds() const;

 private:
  absl::Status Record(Stream& stream);

  Backend* backend_;
  std::vector<std::unique_ptr<Event>> events_;  // begin, end, begin, end, ...
  size_t used_ = 0;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_STREAM_TIMER_H_
