#include "runtime/kv/transfer_state.h"

#include "absl/strings/str_cat.h"

namespace longfill {

std::string_view TransferStateName(TransferState state) {
  switch (state) {
    case TransferState::kOpen:
      return "open";
    case TransferState::kComplete:
      return "complete";
    case TransferState::kAborted:
      return "aborted";
    case TransferState::kFailed:
      return "failed";
    case TransferState::kExpired:
      return "expired";
  }
  return "unknown";
}

bool IsLegalTransition(TransferState from, TransferState to) {
  return from == TransferState::kOpen && to != TransferState::kOpen;
}

absl::Status EndedStatus(const std::string& transfer_id, TransferState state, const absl::Status& reason) {
  const std::string text = absl::StrCat("transfer ", transfer_id.substr(0, 8),
                                        "... has ended: ", std::string(TransferStateName(state)),
                                        reason.message().empty() ? "" : ": ", reason.message());
  switch (state) {
    case TransferState::kOpen:
      return absl::OkStatus();
    case TransferState::kAborted:
      return absl::AbortedError(text);
    case TransferState::kFailed:
      return absl::Status(reason.ok() ? absl::StatusCode::kInternal : reason.code(), text);
    case TransferState::kComplete:
    case TransferState::kExpired:
      return absl::NotFoundError(text);
  }
  return absl::InternalError(text);
}

}  // namespace longfill
