#ifndef LONGFILL_RUNTIME_CLIENT_CANCELLATION_H_
#define LONGFILL_RUNTIME_CLIENT_CANCELLATION_H_

#include <functional>
#include <map>
#include <mutex>

namespace longfill {

// Ends a call from another thread. Not from a signal handler: it takes a lock (runtime/serving/signal_watch.h
// turns signals into calls).
class Cancellation {
 public:
  void Cancel() {
    std::lock_guard lock(mutex_);
    cancelled_ = true;
    for (const auto& [key, action] : actions_) action();
  }
  bool cancelled() const {
    std::lock_guard lock(mutex_);
    return cancelled_;
  }

  // Runs `action` at Cancel, or now if that was before; until the scope ends. `action` does not block.
  class Scope {
   public:
    Scope(Cancellation* cancellation, std::function<void()> action) : cancellation_(cancellation) {
      if (cancellation_ == nullptr) return;
      std::lock_guard lock(cancellation_->mutex_);
      if (cancellation_->cancelled_) action();
      cancellation_->actions_[this] = std::move(action);
    }
    ~Scope() {
      if (cancellation_ == nullptr) return;
      std::lock_guard lock(cancellation_->mutex_);
      cancellation_->actions_.erase(this);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Cancellation* const cancellation_;
  };

 private:
  mutable std::mutex mutex_;
  bool cancelled_ = false;
  std::map<const Scope*, std::function<void()>> actions_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_CLIENT_CANCELLATION_H_
