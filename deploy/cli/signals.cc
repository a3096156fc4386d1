#include "deploy/cli/signals.h"

#include <csignal>
#include <utility>

namespace longfill {

absl::StatusOr<std::unique_ptr<StopSignals>> StopSignals::Create() {
  std::signal(SIGPIPE, SIG_IGN);
  std::unique_ptr<StopSignals> signals(new StopSignals);
  LF_ASSIGN_OR_RETURN(
      signals->watch_,
      SignalWatch::Start({SIGINT, SIGTERM}, [raw = signals.get()](int signal) { raw->OnSignal(signal); }));
  return signals;
}

void StopSignals::OnSignal(int signal) {
  last_signal_.store(signal);
  const int count = count_.fetch_add(1) + 1;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (handler_) handler_(count);
}

absl::Status StopSignals::ShouldStop() const {
  if (count_.load() == 0) return absl::OkStatus();
  return absl::CancelledError(last_signal_.load() == SIGINT ? "interrupted (SIGINT)"
                                                            : "terminated (SIGTERM)");
}

void StopSignals::SetHandler(std::function<void(int)> handler) {
  const std::lock_guard<std::mutex> lock(mutex_);
  handler_ = std::move(handler);
  if (handler_ && count_.load() > 0) handler_(count_.load());
}

}  // namespace longfill
