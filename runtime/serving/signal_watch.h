#ifndef LONGFILL_RUNTIME_SERVING_SIGNAL_WATCH_H_
#define LONGFILL_RUNTIME_SERVING_SIGNAL_WATCH_H_

#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/base/status.h"

namespace longfill {

// Signals as calls on an ordinary thread, where locks may be taken. At most one in a process at a time. The
// handlers and the mask before it come back when it goes, on the thread that started it.
//
// No handler runs on the thread that calls Start, nor on those that it starts later: the signals are blocked
// there. oneDNN's matrix products (2.7, with AVX-512) keep data where the kernel puts the frame of a handler,
// so that one in the middle of a product would break the heap. A program that is executed inherits the mask.
class SignalWatch {
 public:
  // FailedPrecondition if there is one already.
  static absl::StatusOr<std::unique_ptr<SignalWatch>> Start(const std::vector<int>& signals,
                                                            std::function<void(int signal)> on_signal);
  ~SignalWatch();
  SignalWatch(const SignalWatch&) = delete;
  SignalWatch& operator=(const SignalWatch&) = delete;

 private:
  struct Impl;
  explicit SignalWatch(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SERVING_SIGNAL_WATCH_H_
