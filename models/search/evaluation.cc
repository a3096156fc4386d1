#include "models/search/evaluation.h"

#include <algorithm>

#include "kernels/sparse/coverage.h"

namespace longfill {

absl::StatusOr<std::vector<PatternEvaluation>> EvaluatePatterns(const SearchModel& model,
                                                                std::span<const std::vector<int32_t>> samples,
                                                                std::span<const PatternSet> sets,
                                                                const EvaluationOptions& options) {
  std::vector<PatternEvaluation> evaluations(sets.size());
  const int64_t num_layers = model.config.num_layers;
  const int64_t num_heads = model.config.num_q_heads;
  double all_pairs = 0;
  int64_t layers_done = 0;
  for (const std::vector<int32_t>& sample : samples) {
    all_pairs += static_cast<double>(CausalPairs(std::ssize(sample)) * num_layers * num_heads);
    SampleVisitor visitor;
    visitor.wants = [](int64_t) { return true; };
    visitor.look = [&](int64_t layer, const LayerHeads& heads, LayerScorer& scorer) -> absl::Status {
      for (size_t i = 0; i < sets.size(); ++i) {
        PatternEvaluation& sum = evaluations[i];
        const PatternSet& set = sets[i].For(std::ssize(sample));
        LF_ASSIGN_OR_RETURN(const std::vector<HeadScore> scores, scorer.Score(heads, set.layer(layer)));
        LF_ASSIGN_OR_RETURN(const LayerTime time, scorer.Measure(heads, set.layer(layer), options.runs));
        for (const HeadScore& score : scores) {
          sum.recall += score.recall;
          sum.last_recall += score.last_recall;
          sum.error += score.error;
          sum.least_recall = std::min(sum.least_recall, score.recall);
        }
        sum.density += static_cast<double>(time.pairs);
        sum.index_seconds += time.index_seconds;
        sum.attention_seconds += time.attention_seconds;
      }
      return absl::OkStatus();
    };
    visitor.after_layer = [&](int64_t) {
      ++layers_done;
      if (options.on_progress) options.on_progress(layers_done, num_layers * std::ssize(samples));
      return absl::OkStatus();
    };
    LF_RETURN_IF_ERROR(RunSample(model, sample, num_layers, options.pass, visitor));
  }
  const auto count = static_cast<double>(std::ssize(samples) * num_layers * num_heads);
  for (PatternEvaluation& evaluation : evaluations) {
    evaluation.recall /= count;
    evaluation.last_recall /= count;
    evaluation.error /= count;
    evaluation.density /= all_pairs;
  }
  return evaluations;
}

}  // namespace longfill
