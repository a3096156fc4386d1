#include "runtime/serving/prompt_upload.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "runtime/client/convert.h"

namespace longfill {
namespace {

absl::Status CheckRequestId(const std::string& id) {
  if (static_cast<int64_t>(id.size()) > kMaxRequestIdCharacters) {
    return absl::InvalidArgumentError(
        absl::StrCat("request_id has ", id.size(), " characters, the limit is ", kMaxRequestIdCharacters));
  }
  for (const char c : id) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_' && c != ':' && c != '-') {
      return absl::InvalidArgumentError("request_id may hold letters, digits and . _ : - only");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status PromptUpload::Add(const v1::PrefillRequest& message) {
  switch (message.message_case()) {
    case v1::PrefillRequest::kHeader:
      return AddHeader(message.header());
    case v1::PrefillRequest::kTokens:
      return AddTokens(message.tokens());
    case v1::PrefillRequest::MESSAGE_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("a message of the prompt holds neither header nor tokens");
}

absl::Status PromptUpload::AddHeader(const v1::PrefillHeader& header) {
  if (has_header_) return absl::InvalidArgumentError("the header came twice");
  LF_RETURN_IF_ERROR(CheckRequestId(header.request_id()));
  if (header.num_tokens() < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("the prompt is empty: num_tokens is ", header.num_tokens()));
  }
  if (header.num_tokens() > max_tokens_) {
    too_long_ = true;
    return absl::InvalidArgumentError(absl::StrCat("the prompt has ", header.num_tokens(),
                                                   " tokens, the model takes at most ", max_tokens_));
  }
  if (header.logits_positions_size() > kMaxLogitsPositions) {
    return absl::InvalidArgumentError(absl::StrCat(header.logits_positions_size(),
                                                   " logits positions, the limit is ", kMaxLogitsPositions));
  }
  const v1::AttentionSpec& attention = header.attention();
  if (static_cast<int64_t>(attention.spec().size()) > kMaxSpecCharacters) {
    return absl::InvalidArgumentError(absl::StrCat("attention.spec has ", attention.spec().size(),
                                                   " characters, the limit is ", kMaxSpecCharacters));
  }
  if (static_cast<int64_t>(attention.pattern_json().size()) > kMaxPatternJsonBytes) {
    return absl::InvalidArgumentError(absl::StrCat("attention.pattern_json has ",
                                                   attention.pattern_json().size(), " bytes, the limit is ",
                                                   kMaxPatternJsonBytes));
  }
  request_.request_id = header.request_id();
  request_.attention.text = attention.spec().empty() ? "auto" : attention.spec();
  request_.attention.pattern_json = attention.pattern_json();
  LF_ASSIGN_OR_RETURN(request_.coverage, FromProto(header.coverage()));
  request_.kv_dtype = default_kv_dtype_;
  if (header.kv_dtype() != v1::DATA_TYPE_UNSPECIFIED) {
    LF_ASSIGN_OR_RETURN(request_.kv_dtype, FromProto(header.kv_dtype()));
  }
  request_.recall = default_recall_;
  if (header.has_recall()) {
    LF_ASSIGN_OR_RETURN(request_.recall, FromProto(header.recall()));
  }
  request_.logits_positions.assign(header.logits_positions().begin(), header.logits_positions().end());
  num_tokens_ = header.num_tokens();
  has_header_ = true;
  return absl::OkStatus();
}

absl::Status PromptUpload::AddTokens(const v1::TokenChunk& chunk) {
  if (!has_header_) return absl::InvalidArgumentError("tokens came before the header");
  if (chunk.ids_size() > kMaxIdsInMessage) {
    return absl::InvalidArgumentError(
        absl::StrCat(chunk.ids_size(), " ids in one message, the limit is ", kMaxIdsInMessage));
  }
  const int64_t total = static_cast<int64_t>(request_.token_ids.size()) + chunk.ids_size();
  if (total > num_tokens_) {
    return absl::InvalidArgumentError(
        absl::StrCat("at least ", total, " tokens came, the header announced ", num_tokens_));
  }
  request_.token_ids.insert(request_.token_ids.end(), chunk.ids().begin(), chunk.ids().end());
  return absl::OkStatus();
}

absl::StatusOr<PrefillRequest> PromptUpload::Finish() {
  if (!has_header_) return absl::InvalidArgumentError("the call ended without a header");
  if (static_cast<int64_t>(request_.token_ids.size()) != num_tokens_) {
    return absl::InvalidArgumentError(absl::StrCat("the call ended after ", request_.token_ids.size(),
                                                   " tokens, the header announced ", num_tokens_));
  }
  return std::move(request_);
}

}  // namespace longfill
