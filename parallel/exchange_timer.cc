#include "parallel/exchange_timer.h"

#include <algorithm>
#include <utility>

namespace longfill {

bool ExchangeTimer::HasRun(const Exchange& exchange) {
  return exchange.ended && exchange.end->Passed().value_or(false);
}

double ExchangeTimer::SecondsOf(const Exchange& exchange) {
  const double seconds = exchange.end->SecondsSince(*exchange.begin).value_or(0);
  return std::max(0.0, seconds - exchange.host_seconds);
}

absl::Status ExchangeTimer::Begin(Stream& stream) {
  Exchange exchange;
  while (!on_their_way_.empty() && HasRun(on_their_way_.front())) {
    seconds_ += SecondsOf(on_their_way_.front());
    exchange = std::exchange(on_their_way_.front(), {});
    on_their_way_.pop_front();
  }
  if (exchange.begin == nullptr) {
    LF_ASSIGN_OR_RETURN(exchange.begin, backend_.NewEvent());
    LF_ASSIGN_OR_RETURN(exchange.end, backend_.NewEvent());
  }
  exchange.ended = false;
  exchange.seen_running.reset();
  LF_RETURN_IF_ERROR(exchange.begin->Record(stream));
  on_their_way_.push_back(std::move(exchange));
  return absl::OkStatus();
}

absl::Status ExchangeTimer::End(Stream& stream, double host_seconds) {
  Exchange& exchange = on_their_way_.back();
  exchange.host_seconds = host_seconds;
  LF_RETURN_IF_ERROR(exchange.end->Record(stream));
  exchange.ended = true;
  return absl::OkStatus();
}

std::chrono::steady_clock::duration ExchangeTimer::RunningFor() {
  using Clock = std::chrono::steady_clock;
  for (Exchange& exchange : on_their_way_) {
    if (HasRun(exchange)) continue;
    // The stream comes to later ones later.
    if (!exchange.ended || !exchange.begin->Passed().value_or(false)) break;
    const Clock::time_point now = Clock::now();
    return now - exchange.seen_running.emplace(exchange.seen_running.value_or(now));
  }
  return Clock::duration::zero();
}

double ExchangeTimer::seconds() const {
  double seconds = seconds_;
  for (const Exchange& exchange : on_their_way_) {
    if (HasRun(exchange)) seconds += SecondsOf(exchange);
  }
  return seconds;
}

}  // namespace longfill
