#ifndef LONGFILL_PARALLEL_EXCHANGE_TIMER_H_
#define LONGFILL_PARALLEL_EXCHANGE_TIMER_H_

#include <chrono>
#include <deque>
#include <memory>
#include <optional>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"

namespace longfill {

// Time that exchanges take of a device's stream, from where the stream comes to them until their results are
// in place: work that was given before does not count, waiting for peers does. One thread.
class ExchangeTimer {
 public:
  explicit ExchangeTimer(Backend& backend) : backend_(backend) {}

  absl::Status Begin(Stream& stream);
  // `host_seconds` of it are counted elsewhere.
  absl::Status End(Stream& stream, double host_seconds);
  // Of the exchanges that have run.
  double seconds() const;
  // For how long the device has been in one of them, as far as repeated calls have seen it there.
  std::chrono::steady_clock::duration RunningFor();

 private:
  struct Exchange {
    std::unique_ptr<Event> begin, end;
    double host_seconds = 0;
    bool ended = false;
    std::optional<std::chrono::steady_clock::time_point> seen_running;
  };
  static bool HasRun(const Exchange& exchange);
  static double SecondsOf(const Exchange& exchange);

  Backend& backend_;
  std::deque<Exchange> on_their_way_;  // oldest first
  double seconds_ = 0;                 // of those before
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_EXCHANGE_TIMER_H_
