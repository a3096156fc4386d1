#include "runtime/serving/engine_backend.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/fingerprint.h"
#include "runtime/engine/memory_plan.h"

namespace longfill {
namespace {

std::string DefaultAttention(const AttentionDefaults& defaults) {
  std::string longer = "vertical-slash:1000,6096";
  if (defaults.patterns) {
    longer = defaults.patterns->text;
  } else if (defaults.model_patterns) {
    longer = defaults.model_patterns->text;
  }
  return absl::StrCat("dense below ", defaults.dense_below, " tokens, else ", longer);
}

class EngineBackend final : public PrefillBackend {
 public:
  EngineBackend(PrefillEngine* engine, const EngineOptions& options) : engine_(engine), options_(options) {
    const ModelConfig& config = engine->config();
    model_ = {.architecture = config.architecture,
              .model_fingerprint = engine->model_fingerprint(),
              .num_layers = config.num_layers,
              .num_q_heads = config.num_q_heads,
              .num_kv_heads = config.num_kv_heads,
              .head_dim = config.head_dim,
              .vocab_size = config.vocab_size,
              .max_position_embeddings = config.max_position_embeddings,
              .weights_bytes = engine->weights_bytes(),
              .mesh = options.mesh,
              .default_attention = DefaultAttention(options.attention)};
  }

  const ServedModel& model() const override { return model_; }
  absl::Status Validate(const PrefillRequest& request) const override { return engine_->Validate(request); }
  MemoryPlan PlanMemory(const PrefillRequest& request) const override {
    return longfill::PlanMemory(PlanInput(request, static_cast<int64_t>(request.token_ids.size())));
  }

  int64_t LongestPrompt(const PrefillRequest& request) const override {
    int64_t available = options_.memory_limit_bytes;
    if (available == 0) {
      const absl::StatusOr<int64_t> now = AvailableMemoryBytes(options_.ranks_on_host);
      if (!now.ok()) return 0;
      available = *now;
    }
    int64_t fits = 0;
    int64_t too_long = model_.max_position_embeddings + 1;
    while (too_long - fits > 1) {
      const int64_t middle = fits + (too_long - fits) / 2;
      (CheckFits(PlanInput(request, middle), available).ok() ? fits : too_long) = middle;
    }
    return fits;
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
  MemoryPlanInput PlanInput(const PrefillRequest& request, int64_t num_tokens) const {
    return {.config = &engine_->config(),
            .weights_bytes = engine_->weights_bytes(),
            .mesh = options_.mesh,
            .num_tokens = num_tokens,
            .num_logits = std::max<int64_t>(static_cast<int64_t>(request.logits_positions.size()), 1),
            .kv_dtype = request.kv_dtype,
            .keep_kv = options_.keep_kv};
  }

  PrefillEngine* const engine_;
  const EngineOptions options_;
  ServedModel model_;
};

}  // namespace

std::unique_ptr<PrefillBackend> MakeEngineBackend(PrefillEngine* engine, const EngineOptions& options) {
  return std::make_unique<EngineBackend>(engine, options);
}

}  // namespace longfill
