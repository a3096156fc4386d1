#ifndef LONGFILL_RUNTIME_SERVING_PREFILL_BACKEND_H_
#define LONGFILL_RUNTIME_SERVING_PREFILL_BACKEND_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "runtime/engine/prefill_engine.h"

namespace longfill {

// Payload of the Unavailable status after the loss of a rank: its number.
inline constexpr char kLostRankPayload[] = "longfill.v1/lost_rank";

// Facts of the model that is served; fixed for the life of a backend.
struct ServedModel {
  std::string architecture;
  std::string model_fingerprint;
  int64_t num_layers = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t rotary_chunk_tokens = 0;  // KvManifest's
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  int64_t weights_bytes = 0;
  DType compute_dtype = DType::kFloat32;
  Mesh mesh;
  std::string default_attention;  // what "auto" stands for, in words
};

// What the service needs of an engine: PrefillEngine through engine_backend.h, or a scripted one in tests.
// The contract of each function is that of its namesake in PrefillEngine.
class PrefillBackend {
 public:
  virtual ~PrefillBackend() = default;
  virtual const ServedModel& model() const = 0;

  // Thread-safe, callable while a prompt computes.
  virtual absl::Status Validate(const PrefillRequest& request) const = 0;
  virtual MemoryPlan PlanMemory(const PrefillRequest& request) const = 0;
  // The longest prompt that a request like this could have now; 0: not even one token.
  virtual int64_t LongestPrompt(const PrefillRequest& request) const = 0;
  virtual absl::StatusOr<std::vector<std::string>> TokenHashes(std::span<const int32_t> ids) const = 0;
  virtual bool healthy() const = 0;
  // Wakes a call that waits for peers; it then returns `reason`. Never blocks.
  virtual void Abort(const absl::Status& reason) = 0;

  // One thread.
  virtual absl::StatusOr<PrefillResult> Prefill(const PrefillRequest& request,
                                                const KvSinkFactory& sink_factory,
                                                const PrefillCallbacks& callbacks) = 0;
  virtual absl::Status Serve(const KvSinkFactory& sink_factory,
                             const std::function<absl::Status()>& should_stop,
                             const std::function<void(const absl::Status& outcome)>& on_request_done) = 0;
  virtual absl::Status KeepAlive() = 0;
  virtual absl::Status Shutdown() = 0;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SERVING_PREFILL_BACKEND_H_
