#ifndef LONGFILL_RUNTIME_SERVING_PROMPT_UPLOAD_H_
#define LONGFILL_RUNTIME_SERVING_PROMPT_UPLOAD_H_

#include <cstdint>

#include "kernels/base/status.h"
#include "longfill/v1/prefill.pb.h"
#include "runtime/engine/prefill_engine.h"

namespace longfill {

inline constexpr int64_t kMaxIdsInMessage = 262144;
inline constexpr int64_t kMaxLogitsPositions = int64_t{1} << 20;  // their memory is the plan's matter
inline constexpr int64_t kMaxPatternJsonBytes = int64_t{2} << 20;
inline constexpr int64_t kMaxSpecCharacters = 256;
inline constexpr int64_t kMaxRequestIdCharacters = 128;

// Collects the messages of one Prefill call. Holds at most the ids that the header announced, and grows only
// as they arrive, so that a false header allocates nothing.
class PromptUpload {
 public:
  // Prompts longer than max_tokens are refused at the header; one that names no KV dtype, or says nothing of
  // recall, gets what is given.
  PromptUpload(int64_t max_tokens, DType default_kv_dtype, const RecallOptions& default_recall)
      : max_tokens_(max_tokens), default_kv_dtype_(default_kv_dtype), default_recall_(default_recall) {}

  // InvalidArgument names what is wrong; the upload is of no more use then.
  absl::Status Add(const v1::PrefillRequest& message);
  // After the half-close. Everything but the transfer id is filled in.
  absl::StatusOr<PrefillRequest> Finish();

  bool too_long() const { return too_long_; }

 private:
  absl::Status AddHeader(const v1::PrefillHeader& header);
  absl::Status AddTokens(const v1::TokenChunk& chunk);

  const int64_t max_tokens_;
  const DType default_kv_dtype_;
  const RecallOptions default_recall_;
  bool has_header_ = false;
  bool too_long_ = false;
  int64_t num_tokens_ = 0;
  PrefillRequest request_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SERVING_PROMPT_UPLOAD_H_
