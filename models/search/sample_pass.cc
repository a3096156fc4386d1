#include "models/search/sample_pass.h"

#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "models/transformer.h"

namespace longfill {

absl::Status CheckSample(const ModelConfig& config, std::span<const int32_t> ids, std::string_view what) {
  const std::string name(what);
  const auto num_tokens = static_cast<int64_t>(ids.size());
  if (num_tokens < kMinSampleTokens) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", num_tokens,
                                                   " tokens are too few to tell patterns "
                                                   "apart, at least ",
                                                   kMinSampleTokens, " are needed"));
  }
  if (num_tokens > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", num_tokens, " tokens are beyond the ",
                                                   config.max_position_embeddings,
                                                   " positions of the model"));
  }
  if (config.rope.dual_chunk.Splits(num_tokens)) {
    return absl::UnimplementedError(absl::StrCat(name, ": ", num_tokens,
                                                 " tokens need dual chunk attention, "
                                                 "which begins beyond ",
                                                 config.rope.dual_chunk.chunk_len()));
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < config.vocab_size) continue;
    return absl::InvalidArgumentError(absl::StrCat(name, ": token id ", ids[i], " at index ", i,
                                                   " is not in [0, ", config.vocab_size, ")"));
  }
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const int64_t window = config.WindowOf(layer);
    if (window == 0 || window >= num_tokens) continue;
    return absl::UnimplementedError(absl::StrCat("layer ", layer, " has a sliding window of ", window,
                                                 " tokens, which leaves patterns of ", name, " (", num_tokens,
                                                 " tokens) nothing to decide"));
  }
  return absl::OkStatus();
}

LayerCallbacks LoneCallbacks(const SamplePassOptions& options) {
  LayerCallbacks callbacks;
  callbacks.on_kv = [](int64_t, int64_t, HeadsView<const void>, HeadsView<const void>) {
    return absl::OkStatus();
  };
  callbacks.should_stop = options.should_stop;
  callbacks.agree = [](const absl::Status& mine) { return mine; };
  return callbacks;
}

absl::Status RunSample(const SearchModel& model, std::span<const int32_t> ids, int64_t end_layer,
                       const SamplePassOptions& options, const SampleVisitor& visitor) {
  const ShardPlan plan(Mesh{1, 1}, static_cast<int64_t>(ids.size()));
  LF_ASSIGN_OR_RETURN(const std::unique_ptr<Transformer> transformer,
                      Transformer::Create(model.config, model.weights, model.backend, plan, 0));
  LF_ASSIGN_OR_RETURN(const std::unique_ptr<LayerScorer> scorer,
                      LayerScorer::Create(model.backend, GeometryOf(model.config),
                                          {.coverage = options.coverage,
                                           .num_tokens = plan.num_tokens(),
                                           .max_rows = options.max_rows,
                                           .num_threads = options.num_threads,
                                           .should_stop = options.should_stop}));
  LayerParallelism parallel;
  parallel.attend = [&](int64_t layer, const LayerHeads& heads) -> absl::Status {
    const bool wanted = visitor.wants(layer);
    LF_RETURN_IF_ERROR(scorer->AttendFully(heads, wanted));
    return wanted ? visitor.look(layer, heads, *scorer) : absl::OkStatus();
  };
  const LayerCallbacks callbacks = LoneCallbacks(options);
  absl::Status status = transformer->Embed(ids);
  for (int64_t layer = 0; layer < end_layer && status.ok(); ++layer) {
    status = transformer->RunLayer(layer, {}, parallel, callbacks);
    if (status.ok()) status = model.backend.stream().Sync();
    if (status.ok()) status = visitor.after_layer(layer);
  }
  // Memory of the prompt is given back behind the work that uses it.
  const absl::Status through = model.backend.stream().Sync();
  return status.ok() ? through : status;
}

}  // namespace longfill
