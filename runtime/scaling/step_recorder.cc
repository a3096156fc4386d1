#include "runtime/scaling/step_recorder.h"

#include <utility>

namespace longfill {

absl::Status StepRecorder::BeginWork(WorkPart part, int stream, Stream& on) {
  host_seconds_ += std::chrono::duration<double>(Clock::now() - host_since_).count();
  if (open_.has_value() && open_->stream == stream && open_->part == part) return absl::OkStatus();
  LF_RETURN_IF_ERROR(EndStretch());
  AddHostTime();
  Stretch stretch{.part = part, .stream = stream, .on = &on, .step = taken_.schedule.steps.size()};
  LF_ASSIGN_OR_RETURN(stretch.begin, Mark(on));
  taken_.schedule.steps.push_back({.kind = ScheduleStep::Kind::kWork, .stream = stream});
  open_ = std::move(stretch);
  return absl::OkStatus();
}

absl::Status StepRecorder::Add(const ScheduleStep& step) {
  host_seconds_ += std::chrono::duration<double>(Clock::now() - host_since_).count();
  LF_RETURN_IF_ERROR(EndStretch());
  AddHostTime();
  taken_.schedule.steps.push_back(step);
  return absl::OkStatus();
}

absl::Status StepRecorder::EndStretch() {
  if (!open_.has_value()) return absl::OkStatus();
  LF_ASSIGN_OR_RETURN(open_->end, Mark(*open_->on));
  ended_.push_back(*std::exchange(open_, std::nullopt));
  return absl::OkStatus();
}

void StepRecorder::AddHostTime() {
  taken_.schedule.steps.push_back(
      {.kind = ScheduleStep::Kind::kWork, .stream = kHostStream, .seconds = std::exchange(host_seconds_, 0)});
}

absl::StatusOr<std::unique_ptr<Event>> StepRecorder::Mark(Stream& on) {
  if (free_.empty()) {
    LF_ASSIGN_OR_RETURN(std::unique_ptr<Event> event, device_.NewEvent());
    free_.push_back(std::move(event));
  }
  std::unique_ptr<Event> event = std::move(free_.back());
  free_.pop_back();
  LF_RETURN_IF_ERROR(event->Record(on));
  return event;
}

absl::StatusOr<RecordedSteps> StepRecorder::Take() {
  LF_RETURN_IF_ERROR(EndStretch());
  for (Stretch& stretch : ended_) {
    LF_RETURN_IF_ERROR(stretch.end->Wait());
    LF_ASSIGN_OR_RETURN(const double seconds, stretch.end->SecondsSince(*stretch.begin));
    taken_.schedule.steps[stretch.step].seconds = seconds;
    taken_.seconds[static_cast<size_t>(stretch.part)] += seconds;
    free_.push_back(std::move(stretch.begin));
    free_.push_back(std::move(stretch.end));
  }
  ended_.clear();
  host_seconds_ = 0;
  host_since_ = Clock::now();
  return std::exchange(taken_, {});
}

}  // namespace longfill
