#ifndef LONGFILL_MODELS_SEARCH_EVALUATION_H_
#define LONGFILL_MODELS_SEARCH_EVALUATION_H_

// What whole pattern sets keep of attention on given prompts, and what they take: how a result of the search
// is judged on prompts that it has not seen.

#include <functional>
#include <span>
#include <vector>

#include "models/pattern_file.h"
#include "models/search/sample_pass.h"

namespace longfill {

// Of one pattern set over all samples: means over heads and samples, seconds of all layers of all samples.
struct PatternEvaluation {
  double recall = 0;
  double last_recall = 0;
  double error = 0;
  double least_recall = 1;  // of a head on a sample
  double density = 0;       // covered causal pairs over all causal pairs
  double index_seconds = 0;
  double attention_seconds = 0;
};

struct EvaluationOptions {
  SamplePassOptions pass;
  int runs = 1;  // timed, after one that warms up; the median counts
  std::function<void(int64_t layers_done, int64_t num_layers)> on_progress;  // of all samples; may be empty
};

// Recall and error are against full attention on what a dense prefill computes up to the layer, so that
// layers are judged each for itself. One rank. sets: each a pattern for every layer and head; a sample takes
// For its length.
absl::StatusOr<std::vector<PatternEvaluation>> EvaluatePatterns(const SearchModel& model,
                                                                std::span<const std::vector<int32_t>> samples,
                                                                std::span<const PatternSet> sets,
                                                                const EvaluationOptions& options);

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_EVALUATION_H_
