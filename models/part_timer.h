#ifndef LONGFILL_MODELS_PART_TIMER_H_
#define LONGFILL_MODELS_PART_TIMER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"

namespace longfill {

// Device time by part of a program, without waiting for the device: marks in the stream say which part begins
// there, and the time to the next mark is read once both have passed. Not thread-safe.
class PartTimer {
 public:
  static constexpr int kNoPart = -1;

  // Times work of backend.stream(), which outlives the timer.
  PartTimer(Backend& backend, int num_parts)
      : backend_(backend), seconds_(static_cast<size_t>(num_parts), 0.0) {}

  // Work enqueued from here on belongs to `part` (kNoPart: to none). The same part twice is one. An error is
  // kept for Collect and Finish.
  void Begin(int part);
  // Adds up what has passed; does not block.
  absl::Status Collect();
  // Ends the part and waits for the last mark, and so for all work before it.
  absl::Status Finish();

  double seconds(int part) const { return seconds_[static_cast<size_t>(part)]; }  // collected so far

 private:
  struct Mark {
    int part = kNoPart;
    std::unique_ptr<Event> event;
  };

  absl::Status Record(int part);

  Backend& backend_;
  std::vector<double> seconds_;
  absl::Status status_;                       // the first error
  std::deque<Mark> marks_;                    // in stream order; the first one's part is not yet added
  std::vector<std::unique_ptr<Event>> free_;  // passed, to be recorded again
};

}  // namespace longfill

#endif  // LONGFILL_MODELS_PART_TIMER_H_
