#ifndef LONGFILL_RUNTIME_SERVING_SCHEDULER_H_
#define LONGFILL_RUNTIME_SERVING_SCHEDULER_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "kernels/base/status.h"
#include "runtime/serving/prefill_backend.h"

namespace longfill {

// The side of a request that its client is on. Called without locks of the scheduler, from its thread or from
// the one that ended the request; must not block. OnEnd is called exactly once and last (a call that is
// already on its way from the other thread may overlap with it; implementations ignore what comes after
// OnEnd).
class PrefillObserver {
 public:
  virtual ~PrefillObserver() = default;
  virtual void OnQueued(int position) = 0;  // 0: next
  virtual void OnAccepted(const PrefillRequest& request, const ResolvedAttention& attention,
                          const std::vector<std::string>& token_hashes, double queue_seconds) = 0;
  virtual void OnProgress(const PrefillProgress& progress) = 0;
  virtual void OnEnd(absl::StatusOr<PrefillResult> result) = 0;
};

// States of a request: QUEUED -> RUNNING -> DONE, or QUEUED -> DONE. Whoever moves it to DONE calls OnEnd.
class PrefillJob {
 public:
  PrefillJob(PrefillRequest request, std::optional<std::chrono::steady_clock::time_point> deadline,
             std::shared_ptr<PrefillObserver> observer)
      : request_(std::move(request)), deadline_(deadline), observer_(std::move(observer)) {}
  const PrefillRequest& request() const { return request_; }

 private:
  friend class PrefillScheduler;
  // Calls OnEnd if nobody did before.
  void End(absl::StatusOr<PrefillResult> result);

  const PrefillRequest request_;
  const std::optional<std::chrono::steady_clock::time_point> deadline_;
  const std::shared_ptr<PrefillObserver> observer_;
  const std::chrono::steady_clock::time_point submitted_ = std::chrono::steady_clock::now();
  std::atomic<bool> ended_ = false;
  // Guarded by the scheduler's mutex.
  absl::Status stop_;  // why the prompt should not go on; OK: it should
  int last_position_ = -1;
};

struct SchedulerOptions {
  int queue_capacity = 16;  // waiting, beside the one that computes
  std::chrono::milliseconds keep_alive_interval{10000};
  int64_t max_tokens_queued = int64_t{64} << 20;  // ids of all waiting prompts together
};

struct SchedulerStatus {
  int queue_length = 0;
  std::string running_request_id;  // empty: none
  PrefillProgress progress;        // of the running one
  int64_t prompts_done = 0;
  int64_t prompts_failed = 0;
};

// Rank 0: the thread that owns the engine, and the bounded queue before it. First come, first served; one
// computes at a time. Thread-safe.
class PrefillScheduler {
 public:
  // `on_broken` is called once, from the scheduler's thread, when the backend says that its group is broken.
  // `backend` outlives the scheduler.
  PrefillScheduler(PrefillBackend* backend, KvSinkFactory sink_factory, SchedulerOptions options,
                   std::function<void(const absl::Status&)> on_broken);
  ~PrefillScheduler();  // Stop

  // ResourceExhausted when the queue is full (retry after RetryAfter()), Unavailable when draining or broken.
  // After OK the job's OnEnd comes in any case. The request has passed Validate.
  absl::Status Submit(const std::shared_ptr<PrefillJob>& job);
  // Ends a job with `reason`: at once if it waits, at the engine's next check if it computes. No effect on a
  // done one.
  void Cancel(const std::shared_ptr<PrefillJob>& job, const absl::Status& reason);
  // When a place in the queue may be free, from the rate of the prompts so far.
  std::chrono::milliseconds RetryAfter() const;

  // Refuses new requests and ends waiting ones with Unavailable; the one that computes goes on.
  void Drain();
  bool WaitIdle(std::chrono::steady_clock::time_point deadline);
  void CancelRunning(const absl::Status& reason);
  // The group is broken: every request ends with `reason` now, also the one that computes, though its engine
  // may need longer to notice.
  void Break(const absl::Status& reason);
  // Drain, CancelRunning, then the backend's Shutdown (unless broken) and the end of the thread. Blocks for
  // the engine's next check. Idempotent.
  absl::Status Stop();

  SchedulerStatus status() const;

 private:
  void Loop();
  void RunJob(const std::shared_ptr<PrefillJob>& job);
  absl::StatusOr<PrefillResult> Compute(const std::shared_ptr<PrefillJob>& job);
  absl::Status StopReason(const PrefillJob& job) const;
  // Tells waiting jobs their place where it changed.
  void AnnouncePositions();

  PrefillBackend* const backend_;
  const KvSinkFactory sink_factory_;
  const SchedulerOptions options_;
  const std::function<void(const absl::Status&)> on_broken_;

  mutable std::mutex mutex_;  // no observer and no backend function is called under it
  std::condition_variable changed_;
  std::deque<std::shared_ptr<PrefillJob>> queue_;
  std::shared_ptr<PrefillJob> running_;
  PrefillProgress progress_;
  absl::Status refuse_;  // not OK: no new requests, for this reason
  absl::Status broken_;
  bool stopping_ = false;
  int64_t queued_tokens_ = 0;
  int64_t prompts_done_ = 0;
  int64_t prompts_failed_ = 0;
  double seconds_per_token_ = 0;  // running mean, 0: no prompt yet
  absl::Status shutdown_status_;
  std::thread thread_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SERVING_SCHEDULER_H_
