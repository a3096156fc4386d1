#ifndef LONGFILL_RUNTIME_ENGINE_REQUEST_PLAN_H_
#define LONGFILL_RUNTIME_ENGINE_REQUEST_PLAN_H_

// What rank 0 sends to the others: one message for each thing that all ranks do together.

#include <string>
#include <string_view>
#include <variant>

#include "kernels/base/status.h"
#include "runtime/engine/prefill_engine.h"

namespace longfill {

struct ShutdownCommand {};
struct KeepAliveCommand {};
// The request with everything resolved by rank 0, so that no rank decides from values that it does not share:
// the attention is never "auto" and logits_positions are never empty.
struct PrefillCommand {
  PrefillRequest request;
};
using RankCommand = std::variant<ShutdownCommand, KeepAliveCommand, PrefillCommand>;

// Bytes for Communicator broadcasts between processes of one build; not a stable format.
std::string Encode(const RankCommand& command);
absl::StatusOr<RankCommand> Decode(std::string_view bytes);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_REQUEST_PLAN_H_
