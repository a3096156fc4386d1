#include "runtime/serving/engine_backend.h"

#include <utility>

#include "models/fingerprint.h"

namespace longfill {
namespace {

class EngineBackend final : public PrefillBackend {
 public:
  explicit EngineBackend(PrefillEngine* engine) : engine_(engine) {
    const ModelConfig& config = engine->config();
    model_ = {.architecture = config.architecture,
              .model_fingerprint = engine->model_fingerprint(),
              .num_layers = config.num_layers,
              .num_q_heads = config.num_q_heads,
              .num_kv_heads = config.num_kv_heads,
              .head_dim = config.head_dim,
              .rotary_chunk_tokens = config.rope.dual_chunk.chunk_len(),
              .vocab_size = config.vocab_size,
              .max_position_embeddings = config.max_position_embeddings,
              .weights_bytes = engine->weights_bytes(),
              .compute_dtype = engine->compute_dtype(),
              .mesh = engine->mesh(),
              .default_attention = engine->DescribeAuto()};
  }

  const ServedModel& model() const override { return model_; }
  absl::Status Validate(const PrefillRequest& request) const override { return engine_->Validate(request); }
  MemoryPlan PlanMemory(const PrefillRequest& request) const override { return engine_->PlanMemory(request); }
  int64_t LongestPrompt(const PrefillRequest& request) const override {
    return engine_->LongestPrompt(request);
  }

  absl::StatusOr<std::vector<std::string>> TokenHashes(std::span<const int32_t> ids) const override {
    return TokenHashChain(ids, kTokenBlock);
  }
  bool healthy() const override { return engine_->healthy(); }
  void Abort(const absl::Status& reason) override { engine_->world().Abort(reason); }

  absl::StatusOr<PrefillResult> Prefill(const PrefillRequest& request, const KvSinkFactory& sink_factory,
                                        const PrefillCallbacks& callbacks) override {
    return engine_->Prefill(request, sink_factory, callbacks);
  }
  absl::Status Serve(const KvSinkFactory& sink_factory, const std::function<absl::Status()>& should_stop,
                     const std::function<void(const absl::Status&)>& on_request_done) override {
    return engine_->Serve(sink_factory, should_stop, on_request_done);
  }
  absl::Status KeepAlive() override { return engine_->KeepAlive(); }
  absl::Status Shutdown() override { return engine_->Shutdown(); }

 private:
  PrefillEngine* const engine_;
  ServedModel model_;
};

}  // namespace

std::unique_ptr<PrefillBackend> MakeEngineBackend(PrefillEngine* engine) {
  return std::make_unique<EngineBackend>(engine);
}

}  // namespace longfill
