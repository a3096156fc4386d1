#include "runtime/serving/scheduler.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/observe/log.h"

namespace longfill {
namespace {

using std::chrono::steady_clock;

double SecondsSince(steady_clock::time_point start) {
  return std::chrono::duration<double>(steady_clock::now() - start).count();
}

}  // namespace

void PrefillJob::End(absl::StatusOr<PrefillResult> result) {
  if (!ended_.exchange(true)) observer_->OnEnd(std::move(result));
}

PrefillScheduler::PrefillScheduler(PrefillBackend* backend, KvSinkFactory sink_factory,
                                   SchedulerOptions options,
                                   std::function<void(const absl::Status&)> on_broken)
    : backend_(backend),
      sink_factory_(std::move(sink_factory)),
      options_(options),
      on_broken_(std::move(on_broken)),
      thread_([this] { Loop(); }) {}

PrefillScheduler::~PrefillScheduler() { (void)Stop(); }

absl::Status PrefillScheduler::Submit(const std::shared_ptr<PrefillJob>& job) {
  const int64_t tokens = static_cast<int64_t>(job->request().token_ids.size());
  {
    std::lock_guard lock(mutex_);
    LF_RETURN_IF_ERROR(refuse_);
    // The first of an idle scheduler does not wait: it is about to run.
    const int limit = options_.queue_capacity + (running_ == nullptr ? 1 : 0);
    if (static_cast<int>(queue_.size()) >= limit) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "the queue is full: ", queue_.size(), " prompts wait, the limit is ", options_.queue_capacity));
    }
    if (!queue_.empty() && queued_tokens_ + tokens > options_.max_tokens_queued) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "the queue is full: ", queued_tokens_, " tokens wait, the limit is ", options_.max_tokens_queued));
    }
    queue_.push_back(job);
    queued_tokens_ += tokens;
  }
  AnnouncePositions();
  changed_.notify_all();
  return absl::OkStatus();
}

void PrefillScheduler::Cancel(const std::shared_ptr<PrefillJob>& job, const absl::Status& reason) {
  bool waited = false;
  {
    std::lock_guard lock(mutex_);
    if (job->stop_.ok()) job->stop_ = reason;
    const auto found = std::find(queue_.begin(), queue_.end(), job);
    if (found != queue_.end()) {
      queue_.erase(found);
      queued_tokens_ -= static_cast<int64_t>(job->request().token_ids.size());
      waited = true;
    }
  }
  if (!waited) return;
  job->End(reason);
  AnnouncePositions();
}

std::chrono::milliseconds PrefillScheduler::RetryAfter() const {
  std::lock_guard lock(mutex_);
  double seconds = 1;
  if (running_ != nullptr) {
    const double left = static_cast<double>(progress_.total_tokens - progress_.processed_tokens);
    const double pace = progress_.processed_tokens > 0
                            ? progress_.seconds / static_cast<double>(progress_.processed_tokens)
                            : seconds_per_token_;
    seconds = std::clamp(left * pace, 1.0, 600.0);
  }
  return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
}

void PrefillScheduler::Drain() {
  std::deque<std::shared_ptr<PrefillJob>> refused;
  const absl::Status reason =
      absl::UnavailableError("the server is draining; send the prompt to another one");
  {
    std::lock_guard lock(mutex_);
    if (refuse_.ok()) refuse_ = reason;
    refused.swap(queue_);
    queued_tokens_ = 0;
  }
  for (const auto& job : refused) job->End(reason);
  changed_.notify_all();
}

bool PrefillScheduler::WaitIdle(steady_clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline, [this] { return running_ == nullptr && queue_.empty(); });
}

void PrefillScheduler::CancelRunning(const absl::Status& reason) {
  std::lock_guard lock(mutex_);
  if (running_ != nullptr && running_->stop_.ok()) running_->stop_ = reason;
}

void PrefillScheduler::Break(const absl::Status& reason) {
  std::deque<std::shared_ptr<PrefillJob>> ended;
  {
    std::lock_guard lock(mutex_);
    if (!broken_.ok()) return;
    broken_ = reason;
    refuse_ = reason;
    ended.swap(queue_);
    queued_tokens_ = 0;
    if (running_ != nullptr) {
      running_->stop_ = reason;
      ended.push_front(running_);
    }
  }
  for (const auto& job : ended) job->End(reason);
  changed_.notify_all();
}

absl::Status PrefillScheduler::Stop() {
  Drain();
  CancelRunning(absl::UnavailableError("the server is stopping"));
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  std::lock_guard lock(mutex_);
  return shutdown_status_;
}

SchedulerStatus PrefillScheduler::status() const {
  std::lock_guard lock(mutex_);
  SchedulerStatus status;
  status.queue_length = static_cast<int>(queue_.size());
  if (running_ != nullptr) {
    status.running_request_id = running_->request().request_id;
    status.progress = progress_;
  }
  status.prompts_done = prompts_done_;
  status.prompts_failed = prompts_failed_;
  return status;
}

void PrefillScheduler::AnnouncePositions() {
  std::vector<std::pair<std::shared_ptr<PrefillJob>, int>> moved;
  {
    std::lock_guard lock(mutex_);
    for (size_t place = 0; place < queue_.size(); ++place) {
      const int position = static_cast<int>(place);
      if (queue_[place]->last_position_ == position) continue;
      queue_[place]->last_position_ = position;
      moved.emplace_back(queue_[place], position);
    }
  }
  for (const auto& [job, position] : moved) job->observer_->OnQueued(position);
}

absl::Status PrefillScheduler::StopReason(const PrefillJob& job) const {
  if (job.deadline_ && steady_clock::now() >= *job.deadline_) {
    return absl::DeadlineExceededError("the deadline passed while the prompt was computed");
  }
  std::lock_guard lock(mutex_);
  return broken_.ok() ? job.stop_ : broken_;
}

absl::StatusOr<PrefillResult> PrefillScheduler::Compute(const std::shared_ptr<PrefillJob>& job) {
  LF_RETURN_IF_ERROR(StopReason(*job));
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> hashes, backend_->TokenHashes(job->request().token_ids));
  const double queue_seconds = SecondsSince(job->submitted_);
  PrefillCallbacks callbacks;
  callbacks.on_accepted = [&](const ResolvedAttention& attention) {
    job->observer_->OnAccepted(job->request(), attention, hashes, queue_seconds);
  };
  callbacks.on_progress = [&](const PrefillProgress& progress) {
    {
      std::lock_guard lock(mutex_);
      progress_ = progress;
    }
    job->observer_->OnProgress(progress);
  };
  callbacks.should_stop = [&] { return StopReason(*job); };
  return backend_->Prefill(job->request(), sink_factory_, callbacks);
}

void PrefillScheduler::RunJob(const std::shared_ptr<PrefillJob>& job) {
  const auto start = steady_clock::now();
  absl::StatusOr<PrefillResult> result = Compute(job);
  const double seconds = SecondsSince(start);
  const int64_t tokens = static_cast<int64_t>(job->request().token_ids.size());
  Log(result.ok() ? LogLevel::kInfo : LogLevel::kWarning, "prefill_done",
      {{"request_id", job->request().request_id},
       {"tokens", tokens},
       {"seconds", seconds},
       {"code", absl::StatusCodeToString(result.status().code())},
       {"message", std::string(result.status().message())}});
  const absl::Status status = result.status();
  {
    std::lock_guard lock(mutex_);
    running_.reset();
    ++(result.ok() ? prompts_done_ : prompts_failed_);
    if (result.ok()) {
      const double rate = seconds / static_cast<double>(std::max<int64_t>(tokens, 1));
      seconds_per_token_ = seconds_per_token_ == 0 ? rate : 0.5 * (seconds_per_token_ + rate);
    }
  }
  job->End(std::move(result));
  changed_.notify_all();
  if (!backend_->healthy()) {
    const absl::Status reason =
        status.ok()
            ? absl::UnavailableError("the group of ranks is broken")
            : absl::UnavailableError(absl::StrCat("the group of ranks is broken: ", status.message()));
    Break(reason);
    on_broken_(reason);
  }
}

void PrefillScheduler::Loop() {
  auto next_keep_alive = steady_clock::now() + options_.keep_alive_interval;
  while (true) {
    std::shared_ptr<PrefillJob> job;
    {
      std::unique_lock lock(mutex_);
      changed_.wait_until(lock, next_keep_alive,
                          [this] { return !queue_.empty() || stopping_ || !broken_.ok(); });
      if (!broken_.ok()) return;
      if (stopping_ && queue_.empty()) break;
      if (!queue_.empty()) {
        job = std::move(queue_.front());
        queue_.pop_front();
        queued_tokens_ -= static_cast<int64_t>(job->request().token_ids.size());
        running_ = job;
        progress_ = {};
        progress_.total_tokens = static_cast<int64_t>(job->request().token_ids.size());
      }
    }
    if (job != nullptr) {
      AnnouncePositions();
      RunJob(job);
      next_keep_alive = steady_clock::now() + options_.keep_alive_interval;
    } else if (steady_clock::now() >= next_keep_alive) {
      next_keep_alive = steady_clock::now() + options_.keep_alive_interval;
      if (absl::Status status = backend_->KeepAlive(); !status.ok()) {
        Break(absl::UnavailableError(absl::StrCat("the group of ranks is broken: ", status.message())));
        on_broken_(status);
        return;
      }
    }
  }
  absl::Status status = backend_->Shutdown();
  std::lock_guard lock(mutex_);
  shutdown_status_ = std::move(status);
}

}  // namespace longfill
