#ifndef LONGFILL_RUNTIME_SCALING_STEP_RECORDER_H_
#define LONGFILL_RUNTIME_SCALING_STEP_RECORDER_H_

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"
#include "runtime/scaling/schedule.h"

namespace longfill {

enum class WorkPart : uint8_t {
  kAttention,
  kGemm,
  kIndex,  // scoring and selection
  kOther,  // norms, rotary, activations, embedding
  kCopy,   // on the device, most of all packing for exchanges
};
inline constexpr size_t kNumWorkParts = 5;

struct RecordedSteps {
  RankSchedule schedule;
  std::array<double, kNumWorkParts> seconds{};  // of the device, all streams
  double of(WorkPart part) const { return seconds[static_cast<size_t>(part)]; }
};

// Writes down what a rank gives to the streams of its device, as steps of a schedule, while the device does
// it. Calls for one stream and of one part that follow one another are one stretch of work, which two events
// of the device time; so waiting of a stream is in no stretch. The host's own time between calls is work of
// kHostStream; its time inside them is not counted. One thread.
class StepRecorder {
 public:
  explicit StepRecorder(Backend& device) : device_(device), host_since_(Clock::now()) {}

  // The stream kMainStream is there from the start.
  int NewStream() { return ++last_stream_; }
  int NewEvent() { return ++last_event_; }

  // `call` gives work to `on`, which is stream number `stream`.
  template <typename Call>
  absl::Status Work(WorkPart part, int stream, Stream& on, const Call& call) {
    LF_RETURN_IF_ERROR(BeginWork(part, stream, on));
    absl::Status status = call();
    host_since_ = Clock::now();
    return status;
  }

  // `call` does on the device what any other step says.
  template <typename Call>
  absl::Status Step(const ScheduleStep& step, const Call& call) {
    LF_RETURN_IF_ERROR(Add(step));
    absl::Status status = call();
    host_since_ = Clock::now();
    return status;
  }

  // `call` does what is left of an exchange where there are no peers. On `stream`, or kHostStream.
  template <typename Call>
  absl::Status Exchange(int stream, ScheduledExchange exchange, const Call& call) {
    const auto number = static_cast<int>(taken_.schedule.exchanges.size());
    taken_.schedule.exchanges.push_back(std::move(exchange));
    return Step({.kind = ScheduleStep::Kind::kExchange, .stream = stream, .exchange = number}, call);
  }

  // The steps since the last call. Waits until their work has run. Numbers of streams and events go on.
  absl::StatusOr<RecordedSteps> Take();

 private:
  using Clock = std::chrono::steady_clock;
  struct Stretch {
    WorkPart part = WorkPart::kOther;
    int stream = kMainStream;
    Stream* on = nullptr;
    size_t step = 0;  // of the schedule
    std::unique_ptr<Event> begin, end;
  };

  absl::Status BeginWork(WorkPart part, int stream, Stream& on);
  absl::Status Add(const ScheduleStep& step);
  absl::Status EndStretch();
  void AddHostTime();
  absl::StatusOr<std::unique_ptr<Event>> Mark(Stream& on);

  Backend& device_;
  RecordedSteps taken_;
  std::optional<Stretch> open_;
  std::vector<Stretch> ended_;
  std::vector<std::unique_ptr<Event>> free_;  // events of stretches that were taken
  double host_seconds_ = 0;                   // not yet a step
  Clock::time_point host_since_;              // the end of the last call
  int last_stream_ = kMainStream;
  int last_event_ = -1;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SCALING_STEP_RECORDER_H_
