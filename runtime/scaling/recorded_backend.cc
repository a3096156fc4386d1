#include "runtime/scaling/recorded_backend.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

using Kind = ScheduleStep::Kind;

absl::Status NotRecorded(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("a recorded device is given ", what, " of another"));
}

class RecordedEvent final : public Event {
 public:
  RecordedEvent(StepRecorder& recorder, std::unique_ptr<Event> device)
      : recorder_(recorder), number_(recorder.NewEvent()), device_(std::move(device)) {}

  absl::Status Record(Stream& stream) override {
    auto* recorded = dynamic_cast<RecordedStream*>(&stream);
    if (recorded == nullptr) return NotRecorded("a stream");
    return recorder_.Step({.kind = Kind::kRecord, .stream = recorded->number(), .event = number_},
                          [&] { return device_->Record(recorded->of_device()); });
  }
  absl::StatusOr<bool> Passed() const override { return device_->Passed(); }
  absl::Status Wait() const override {
    return recorder_.Step({.kind = Kind::kHostWait, .event = number_}, [&] { return device_->Wait(); });
  }
  absl::StatusOr<double> SecondsSince(const Event& earlier) const override {
    const auto* recorded = dynamic_cast<const RecordedEvent*>(&earlier);
    if (recorded == nullptr) return NotRecorded("an event");
    return device_->SecondsSince(*recorded->device_);
  }

  int number() const { return number_; }
  const Event& of_device() const { return *device_; }

 private:
  StepRecorder& recorder_;
  const int number_;
  const std::unique_ptr<Event> device_;
};

}  // namespace

absl::Status RecordedStream::Sync() {
  return recorder_.Step({.kind = Kind::kHostSync, .stream = number_}, [&] { return device_.Sync(); });
}

absl::Status RecordedStream::WaitFor(const Event& event) {
  const auto* recorded = dynamic_cast<const RecordedEvent*>(&event);
  if (recorded == nullptr) return NotRecorded("an event");
  return recorder_.Step({.kind = Kind::kWait, .stream = number_, .event = recorded->number()},
                        [&] { return device_.WaitFor(recorded->of_device()); });
}

RecordedBackend::RecordedBackend(Backend& device)
    : device_(device),
      recorder_(device),
      stream_(recorder_, kMainStream, device.stream()),
      kernels_(RecordKernels(device.kernels(), recorder_)) {}

RecordedBackend::~RecordedBackend() = default;

absl::StatusOr<std::unique_ptr<Stream>> RecordedBackend::NewStream() {
  LF_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device_.NewStream());
  Stream& of_device = *stream;
  return std::make_unique<RecordedStream>(recorder_, recorder_.NewStream(), of_device, std::move(stream));
}

absl::StatusOr<std::unique_ptr<Event>> RecordedBackend::NewEvent() {
  LF_ASSIGN_OR_RETURN(std::unique_ptr<Event> event, device_.NewEvent());
  return std::make_unique<RecordedEvent>(recorder_, std::move(event));
}

}  // namespace longfill
