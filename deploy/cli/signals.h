#ifndef LONGFILL_DEPLOY_CLI_SIGNALS_H_
#define LONGFILL_DEPLOY_CLI_SIGNALS_H_

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>

#include "kernels/base/status.h"
#include "runtime/serving/signal_watch.h"

namespace longfill {

// SIGINT and SIGTERM as a request to stop, SIGPIPE ignored. One in a process.
class StopSignals {
 public:
  static absl::StatusOr<std::unique_ptr<StopSignals>> Create();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  // Cancelled, naming the signal, once one has come.
  absl::Status ShouldStop() const;

  // Called at every signal, with their number so far, from a thread of its own; at once if one has come
  // already. The end of this call waits for a running handler. An empty one: signals are only counted.
  void SetHandler(std::function<void(int count)> handler);

 private:
  StopSignals() = default;
  void OnSignal(int signal);

  std::atomic<int> count_{0};
  std::atomic<int> last_signal_{0};
  std::mutex mutex_;  // guards handler_, held while it runs
  std::function<void(int)> handler_;
  std::unique_ptr<SignalWatch> watch_;  // last: ends before what its thread uses
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_SIGNALS_H_
