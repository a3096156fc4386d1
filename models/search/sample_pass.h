#ifndef LONGFILL_MODELS_SEARCH_SAMPLE_PASS_H_
#define LONGFILL_MODELS_SEARCH_SAMPLE_PASS_H_

// The forward pass of one calibration prompt with full attention, and a look at every layer on the way.

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/api/backend.h"
#include "models/config.h"
#include "models/search/layer_scorer.h"
#include "models/weights.h"

namespace longfill {

// What a search works with; all of it outlives what uses it. Weights are in the backend's memory.
struct SearchModel {
  const ModelConfig& config;
  const ModelWeights& weights;
  Backend& backend;
};

struct SamplePassOptions {
  Coverage coverage = Coverage::kTiles;
  int64_t max_rows = 0;  // LayerScorerOptions
  int num_threads = 1;
  std::function<absl::Status()> should_stop;  // polled between pieces of compute
};

struct SampleVisitor {
  std::function<bool(int64_t layer)> wants;  // whether to look at the layer
  // Full attention of the layer has run, and is kept in the scorer.
  std::function<absl::Status(int64_t layer, const LayerHeads& heads, LayerScorer& scorer)> look;
  std::function<absl::Status(int64_t layer)> after_layer;  // whether it was looked at or not
};

// InvalidArgument, naming `what`, the value and the limit: fewer than kMinSampleTokens or more tokens than
// the model takes, ids outside of the vocabulary. Unimplemented: a layer whose window is shorter than the
// sample, where the window decides and not a pattern.
absl::Status CheckSample(const ModelConfig& config, std::span<const int32_t> ids, std::string_view what);
inline constexpr int64_t kMinSampleTokens = 256;  // below, every pattern covers nearly all

// Of a layer on a rank by itself, whose K and V nobody takes.
LayerCallbacks LoneCallbacks(const SamplePassOptions& options);

// Layers [0, end) on one rank, which owns the whole sample. Errors of the visitor and of should_stop end it.
absl::Status RunSample(const SearchModel& model, std::span<const int32_t> ids, int64_t end_layer,
                       const SamplePassOptions& options, const SampleVisitor& visitor);

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_SAMPLE_PASS_H_
