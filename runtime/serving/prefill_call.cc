#include "runtime/serving/prefill_call.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/client/convert.h"
#include "runtime/kv/crc32c.h"
#include "runtime/kv/transfer_id.h"
#include "runtime/observe/log.h"

namespace longfill {
namespace {

constexpr size_t kLogitsPartBytes = size_t{1} << 20;

std::optional<std::chrono::steady_clock::time_point> SteadyDeadline(
    std::chrono::system_clock::time_point deadline) {
  if (deadline == std::chrono::system_clock::time_point::max()) return std::nullopt;
  return std::chrono::steady_clock::now() + (deadline - std::chrono::system_clock::now());
}

}  // namespace

PrefillCall::PrefillCall(PrefillServiceImpl* service, grpc::CallbackServerContext* context,
                         int64_t max_tokens, DType default_kv_dtype, const RecallOptions& default_recall)
    : service_(service),
      context_(context),
      max_tokens_(max_tokens),
      upload_(max_tokens, default_kv_dtype, default_recall) {}

void PrefillCall::Start() { StartRead(&incoming_); }

void PrefillCall::Refuse(const absl::Status& status, std::optional<std::chrono::milliseconds> retry_after) {
  EndWithError(status, retry_after);
}

void PrefillCall::FailUpload(const absl::Status& status) {
  std::lock_guard lock(mutex_);
  if (phase_ == Phase::kUploading) EndWithErrorLocked(status, {}, 0);
}

void PrefillCall::FailIdleUpload(std::chrono::steady_clock::time_point idle_since) {
  std::lock_guard lock(mutex_);
  if (phase_ != Phase::kUploading || last_message_ >= idle_since) return;
  EndWithErrorLocked(absl::DeadlineExceededError("no message of the prompt came for too long"), {}, 0);
}

void PrefillCall::OnReadDone(bool ok) {
  if (!ok) {  // half-closed, or cancelled
    Submit();
    return;
  }
  absl::Status status;
  bool too_long = false;
  {
    std::lock_guard lock(mutex_);
    if (phase_ != Phase::kUploading) return;
    last_message_ = std::chrono::steady_clock::now();
    status = upload_.Add(incoming_);
    too_long = upload_.too_long();
    if (status.ok()) StartRead(&incoming_);
  }
  if (!status.ok()) EndWithError(status, {}, too_long ? max_tokens_ : 0);
}

absl::StatusOr<PrefillRequest> PrefillCall::CompleteRequest() {
  LF_ASSIGN_OR_RETURN(PrefillRequest request, upload_.Finish());
  LF_ASSIGN_OR_RETURN(request.transfer_id, NewTransferId());
  if (request.request_id.empty()) {
    // No part of the transfer id, which is a secret.
    LF_ASSIGN_OR_RETURN(const std::string random, NewTransferId());
    request.request_id = absl::StrCat("request-", random.substr(0, 16));
  }
  return request;
}

void PrefillCall::Submit() {
  absl::StatusOr<PrefillRequest> request = absl::CancelledError();
  {
    std::lock_guard lock(mutex_);
    if (phase_ != Phase::kUploading || cancelled_) return;
    request = CompleteRequest();
    if (request.ok()) phase_ = Phase::kSubmitted;
  }
  if (!request.ok()) return EndWithError(request.status());
  if (absl::Status status = service_->backend_->Validate(*request); !status.ok()) {
    return EndWithError(status, {},
                        absl::IsResourceExhausted(status) ? service_->backend_->LongestPrompt(*request) : 0);
  }
  std::shared_ptr<PrefillJob> job;
  {
    std::lock_guard lock(mutex_);
    if (finished_ || cancelled_) return;
    request_id_ = request->request_id;
    job_ = std::make_shared<PrefillJob>(*std::move(request), SteadyDeadline(context_->deadline()),
                                        shared_from_this());
    job = job_;
  }
  if (absl::Status status = service_->scheduler_->Submit(job); !status.ok()) {
    std::optional<std::chrono::milliseconds> retry_after;
    if (absl::IsResourceExhausted(status)) retry_after = service_->scheduler_->RetryAfter();
    EndWithError(status, retry_after);
  }
}

void PrefillCall::OnQueued(int position) {
  std::lock_guard lock(mutex_);
  if (phase_ != Phase::kSubmitted || accepted_) return;
  queued_position_ = position;
  AdvanceLocked();
}

void PrefillCall::OnAccepted(const PrefillRequest& request, const ResolvedAttention& attention,
                             const std::vector<std::string>& token_hashes, double queue_seconds) {
  v1::Accepted accepted;
  *accepted.mutable_manifest() = *service_->AddManifest(request, token_hashes);
  accepted.set_attention(attention.resolved);
  *accepted.mutable_memory_plan() = ToProto(service_->backend_->PlanMemory(request));
  accepted.set_queue_seconds(queue_seconds);
  std::lock_guard lock(mutex_);
  if (phase_ != Phase::kSubmitted) return;
  queued_position_.reset();
  accepted_ = std::move(accepted);
  AdvanceLocked();
}

void PrefillCall::OnProgress(const PrefillProgress& progress) {
  std::lock_guard lock(mutex_);
  if (phase_ != Phase::kSubmitted) return;
  progress_ = progress;
  AdvanceLocked();
}

void PrefillCall::OnEnd(absl::StatusOr<PrefillResult> result) {
  if (!result.ok()) return EndWithError(result.status());
  std::lock_guard lock(mutex_);
  if (phase_ != Phase::kSubmitted) return;
  phase_ = Phase::kEnding;
  result_ = *std::move(result);
  logits_crc32c_ =
      Crc32c(result_->logits.data(), static_cast<int64_t>(result_->logits.size() * sizeof(float)));
  AdvanceLocked();
}

void PrefillCall::EndWithError(const absl::Status& status,
                               std::optional<std::chrono::milliseconds> retry_after, int64_t max_tokens) {
  std::lock_guard lock(mutex_);
  EndWithErrorLocked(status, retry_after, max_tokens);
}

void PrefillCall::EndWithErrorLocked(const absl::Status& status,
                                     std::optional<std::chrono::milliseconds> retry_after,
                                     int64_t max_tokens) {
  if (phase_ == Phase::kEnding) return;
  phase_ = Phase::kEnding;
  queued_position_.reset();
  progress_.reset();
  error_.emplace();
  error_->set_code(static_cast<int>(status.code()));
  error_->set_message(std::string(status.message()));
  error_->set_max_tokens(max_tokens);
  if (const auto rank = status.GetPayload(kLostRankPayload)) error_->set_lost_rank(std::string(*rank));
  if (retry_after) {
    error_->set_retry_after_ms(retry_after->count());
    context_->AddTrailingMetadata("grpc-retry-pushback-ms", absl::StrCat(retry_after->count()));
  }
  AdvanceLocked();
}

void PrefillCall::AdvanceLocked() {
  if (write_in_flight_ || finished_) return;
  if (cancelled_) {
    finished_ = true;
    Finish(grpc::Status(grpc::StatusCode::CANCELLED, "the call was cancelled"));
  } else if (NextEventLocked()) {
    write_in_flight_ = true;
    StartWrite(&outgoing_);
  } else if (error_) {
    FinishWithErrorLocked();
  } else if (result_sent_) {
    finished_ = true;
    Finish(grpc::Status::OK);
  }
}

// Fills outgoing_ with the next event, if there is one.
bool PrefillCall::NextEventLocked() {
  outgoing_.Clear();
  if (queued_position_) {
    outgoing_.mutable_queued()->set_position(*queued_position_);
    outgoing_.mutable_queued()->set_request_id(request_id_);
    queued_position_.reset();
  } else if (accepted_) {
    *outgoing_.mutable_accepted() = std::move(*accepted_);
    accepted_.reset();
  } else if (progress_) {
    *outgoing_.mutable_progress() = ToProto(*progress_);
    progress_.reset();
  } else if (result_ && logits_sent_bytes_ < result_->logits.size() * sizeof(float)) {
    FillLogitsLocked();
  } else if (result_ && !result_sent_) {
    FillResultLocked();
  } else {
    return false;
  }
  return true;
}

void PrefillCall::FillLogitsLocked() {
  const size_t total = result_->logits.size() * sizeof(float);
  const size_t bytes = std::min(total - logits_sent_bytes_, kLogitsPartBytes);
  v1::LogitsPart* part = outgoing_.mutable_logits();
  part->set_offset_bytes(static_cast<int64_t>(logits_sent_bytes_));
  part->set_data(reinterpret_cast<const char*>(result_->logits.data()) + logits_sent_bytes_, bytes);
  logits_sent_bytes_ += bytes;
}

void PrefillCall::FillResultLocked() {
  v1::PrefillResult* message = outgoing_.mutable_result();
  for (const int64_t position : result_->positions) message->add_positions(position);
  message->set_vocab_size(service_->backend_->model().vocab_size);
  message->set_logits_crc32c(logits_crc32c_);
  *message->mutable_figures() = ToProto(result_->figures);
  result_sent_ = true;
}

void PrefillCall::FinishWithErrorLocked() {
  finished_ = true;
  const grpc::Status status(static_cast<grpc::StatusCode>(error_->code()), error_->message());
  *outgoing_.mutable_error() = std::move(*error_);
  StartWriteAndFinish(&outgoing_, grpc::WriteOptions(), status);
}

void PrefillCall::OnWriteDone(bool ok) {
  std::lock_guard lock(mutex_);
  write_in_flight_ = false;
  if (!ok) cancelled_ = true;  // the client is gone; OnCancel ends the job
  AdvanceLocked();
}

void PrefillCall::OnCancel() {
  std::shared_ptr<PrefillJob> job;
  {
    std::lock_guard lock(mutex_);
    cancelled_ = true;
    phase_ = Phase::kEnding;
    job = job_;
    AdvanceLocked();
  }
  if (job == nullptr) return;
  const bool overdue = std::chrono::system_clock::now() >= context_->deadline();
  service_->scheduler_->Cancel(job, overdue ? absl::DeadlineExceededError("the call's deadline passed")
                                            : absl::CancelledError("the client cancelled or is gone"));
}

void PrefillCall::OnDone() {
  const std::shared_ptr<PrefillCall> self = shared_from_this();  // until the lock is released
  std::shared_ptr<PrefillJob> job;
  {
    std::lock_guard lock(mutex_);
    job = std::exchange(job_, nullptr);
    finished_ = true;
    phase_ = Phase::kEnding;
  }
  // Whatever ended the call: nothing computes for nobody. No effect on a job that is done.
  if (job != nullptr) service_->scheduler_->Cancel(job, absl::CancelledError("the call has ended"));
  service_->Forget(this);
}

}  // namespace longfill
