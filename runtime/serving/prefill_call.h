#ifndef LONGFILL_RUNTIME_SERVING_PREFILL_CALL_H_
#define LONGFILL_RUNTIME_SERVING_PREFILL_CALL_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "longfill/v1/prefill.grpc.pb.h"
#include "runtime/serving/prefill_service.h"
#include "runtime/serving/prompt_upload.h"
#include "runtime/serving/scheduler.h"

namespace longfill {

// One Prefill call. gRPC's threads bring messages and completions, the scheduler's thread brings events; both
// only change the state under the mutex and start at most one write, so nobody ever waits for a slow client:
// of queued and progress events only the latest is kept until the write before has gone out.
//
//   UPLOADING -> SUBMITTED -> ENDING, or UPLOADING -> ENDING; a cancelled call goes to ENDING from anywhere.
class PrefillCall final : public grpc::ServerBidiReactor<v1::PrefillRequest, v1::PrefillEvent>,
                          public PrefillObserver,
                          public std::enable_shared_from_this<PrefillCall> {
 public:
  PrefillCall(PrefillServiceImpl* service, grpc::CallbackServerContext* context, int64_t max_tokens,
              DType default_kv_dtype, const RecallOptions& default_recall);

  // Starts to read; the call is registered with the service.
  void Start();
  // Ends the call with an error if it still uploads.
  void FailUpload(const absl::Status& status);
  void FailIdleUpload(std::chrono::steady_clock::time_point idle_since);
  // Ends a call that was never started.
  void Refuse(const absl::Status& status, std::optional<std::chrono::milliseconds> retry_after);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  void OnQueued(int position) override;
  void OnAccepted(const PrefillRequest& request, const ResolvedAttention& attention,
                  const std::vector<std::string>& token_hashes, double queue_seconds) override;
  void OnProgress(const PrefillProgress& progress) override;
  void OnEnd(absl::StatusOr<PrefillResult> result) override;

 private:
  void Submit();
  absl::StatusOr<PrefillRequest> CompleteRequest();
  void EndWithError(const absl::Status& status, std::optional<std::chrono::milliseconds> retry_after = {},
                    int64_t max_tokens = 0);
  void EndWithErrorLocked(const absl::Status& status, std::optional<std::chrono::milliseconds> retry_after,
                          int64_t max_tokens);
  void AdvanceLocked();
  bool NextEventLocked();
  void FillLogitsLocked();
  void FillResultLocked();
  void FinishWithErrorLocked();

  PrefillServiceImpl* const service_;
  grpc::CallbackServerContext* const context_;
  const int64_t max_tokens_;

  std::mutex mutex_;  // a leaf: the scheduler and the service are never called under it
  enum class Phase { kUploading, kSubmitted, kEnding } phase_ = Phase::kUploading;
  PromptUpload upload_;
  std::chrono::steady_clock::time_point last_message_ = std::chrono::steady_clock::now();
  std::shared_ptr<PrefillJob> job_;
  std::string request_id_;
  bool write_in_flight_ = false;
  bool finished_ = false;
  bool cancelled_ = false;

  // To be sent.
  std::optional<int> queued_position_;
  std::optional<v1::Accepted> accepted_;
  std::optional<PrefillProgress> progress_;
  std::optional<PrefillResult> result_;
  size_t logits_sent_bytes_ = 0;
  uint32_t logits_crc32c_ = 0;
  bool result_sent_ = false;
  std::optional<v1::PrefillError> error_;

  v1::PrefillRequest incoming_;  // gRPC's while a read is under way
  v1::PrefillEvent outgoing_;    // gRPC's while a write is under way
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SERVING_PREFILL_CALL_H_
