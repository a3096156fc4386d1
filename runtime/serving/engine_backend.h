#ifndef LONGFILL_RUNTIME_SERVING_ENGINE_BACKEND_H_
#define LONGFILL_RUNTIME_SERVING_ENGINE_BACKEND_H_

#include <memory>

#include "runtime/engine/prefill_engine.h"
#include "runtime/serving/prefill_backend.h"

namespace longfill {

// The engine as the service sees it. `engine` outlives the backend.
std::unique_ptr<PrefillBackend> MakeEngineBackend(PrefillEngine* engine);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SERVING_ENGINE_BACKEND_H_
