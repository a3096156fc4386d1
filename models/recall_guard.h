#ifndef LONGFILL_MODELS_RECALL_GUARD_H_
#define LONGFILL_MODELS_RECALL_GUARD_H_

// What is done about heads whose recall (parallel/recall_monitor.h) falls short: they are computed again with
// twice their budgets, then with four times, then over all keys, until the recall is there.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/sparse/head_pattern.h"
#include "kernels/sparse/index_view.h"

namespace longfill {

// Of a request.
struct RecallOptions {
  bool monitor = false;   // measure and report
  double min_recall = 0;  // 0: no guard; else in (0, 1]: heads below it are computed again, and all reported
  bool on() const { return monitor || min_recall != 0; }
  friend bool operator==(const RecallOptions&, const RecallOptions&) = default;
};
// InvalidArgument with the value where min_recall is neither 0 nor in (0, 1].
absl::Status Validate(const RecallOptions& options);

// A head that was computed again, and its last pattern.
struct RecomputedHead {
  int64_t head = 0;
  HeadPattern pattern;
  double recall_before = 0;  // with the pattern that was asked for
  double recall = 0;
  double density = 0;  // covered causal pairs over all causal pairs, with the last pattern
};

// One layer, equal on all ranks.
struct LayerRecall {
  bool watched = false;                    // false: all heads see all keys by their patterns
  std::vector<double> heads;               // [num_q_heads], after recomputation; 1 of heads that see all keys
  std::vector<RecomputedHead> recomputed;  // ascending by head
};

// By what the budgets of a pattern are multiplied, one after the other; what still falls short is then
// computed over all keys.
inline constexpr int64_t kBudgetFactors[] = {2, 4};

// The pattern with `factor` times its budgets (VerticalSlash, AShape's local part, BlockSparse) or that part
// of its share (BlockShare), or SeesAllPattern() where a budget then reaches the prompt; in layers with a
// window, bounded by it. Has passed Validate if `pattern` has.
HeadPattern WidenedPattern(const HeadPattern& pattern, int64_t factor, int64_t window, int64_t num_tokens);
// Dense, bounded by the window of the layer.
HeadPattern SeesAllPattern(int64_t window, int64_t num_tokens);
// Whether some head of a layer is another pattern than that: such a layer is watched.
bool SomeLeaveOutKeys(std::span<const HeadPattern> patterns, int64_t window, int64_t num_tokens);

// Heads whose recall is 1 by definition: all keys that the model lets them see are covered.
bool SeesAllKeys(const HeadPattern& pattern, const PairCounts& pairs, int64_t window, int64_t num_tokens);

}  // namespace longfill

#endif  // LONGFILL_MODELS_RECALL_GUARD_H_
