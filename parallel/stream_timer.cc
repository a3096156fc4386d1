#include "parallel/stream_timer.h"

namespace longfill {

absl::Status StreamTimer::Record(Stream& stream) {
  if (used_ == events_.size()) {
    LF_ASSIGN_OR_RETURN(std::unique_ptr<Event> event, backend_->NewEvent());
    events_.push_back(std::move(event));
  }
  return events_[used_++]->Record(stream);
}

absl::StatusOr<double> StreamTimer::Seconds() const {
  LF_CHECK(used_ % 2 == 0);
  double seconds = 0;
  for (size_t i = 0; i < used_; i += 2) {
    LF_ASSIGN_OR_RETURN(const double part, events_[i + 1]->SecondsSince(*events_[i]));
    seconds += part;
  }
  return seconds;
}

}  // namespace longfill
