#include "models/part_timer.h"

#include <utility>

namespace longfill {

void PartTimer::Begin(int part) {
  const int current = marks_.empty() ? kNoPart : marks_.back().part;
  if (part != current && status_.ok()) status_ = Record(part);
}

absl::Status PartTimer::Record(int part) {
  if (free_.empty()) {
    LF_ASSIGN_OR_RETURN(std::unique_ptr<Event> event, backend_.NewEvent());
    free_.push_back(std::move(event));
  }
  LF_RETURN_IF_ERROR(free_.back()->Record(backend_.stream()));
  marks_.push_back({part, std::move(free_.back())});
  free_.pop_back();
  return absl::OkStatus();
}

absl::Status PartTimer::Collect() {
  LF_RETURN_IF_ERROR(status_);
  while (marks_.size() > 1) {
    LF_ASSIGN_OR_RETURN(const bool passed, marks_[1].event->Passed());
    if (!passed) break;
    if (marks_[0].part != kNoPart) {
      LF_ASSIGN_OR_RETURN(const double seconds, marks_[1].event->SecondsSince(*marks_[0].event));
      seconds_[static_cast<size_t>(marks_[0].part)] += seconds;
    }
    free_.push_back(std::move(marks_[0].event));
    marks_.pop_front();
  }
  return absl::OkStatus();
}

absl::Status PartTimer::Finish() {
  Begin(kNoPart);
  LF_RETURN_IF_ERROR(status_);
  if (marks_.empty()) return absl::OkStatus();
  LF_RETURN_IF_ERROR(marks_.back().event->Wait());
  return Collect();
}

}  // namespace longfill
