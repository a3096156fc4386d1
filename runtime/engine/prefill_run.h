#ifndef LONGFILL_RUNTIME_ENGINE_PREFILL_RUN_H_
#define LONGFILL_RUNTIME_ENGINE_PREFILL_RUN_H_

#include "runtime/engine/engine_state.h"

namespace longfill {

// One request, from the agreement on memory and sinks to the figures. Every rank calls this with an equal
// request, in which rank 0 has resolved everything. An error is the same on all ranks, or has broken the
// group.
absl::StatusOr<PrefillResult> RunPrefill(EngineState& engine, const PrefillRequest& request,
                                         const KvSinkFactory& sink_factory,
                                         const PrefillCallbacks& callbacks);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_PREFILL_RUN_H_
