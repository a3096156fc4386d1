#ifndef LONGFILL_MODELS_SEARCH_PATTERN_SOLVER_H_
#define LONGFILL_MODELS_SEARCH_PATTERN_SOLVER_H_

// Which heads deserve the budget: one option for each head, so that the sum of seconds or the mean of values
// meets a target. Pure arithmetic, deterministic: equal gains go to the lower head.

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "kernels/base/status.h"

namespace longfill {

struct HeadOption {
  double seconds = 0;
  double value = 0;  // what is worth having, such as the recall
};

// Exactly one of the two.
struct SolverTarget {
  std::optional<double> most_seconds;  // the largest mean value within so many seconds in all
  std::optional<double> least_value;   // the fewest seconds at a mean value of at least so much
};

struct TradeOffPoint {
  double seconds = 0;     // of all heads
  double mean_value = 0;  // over the heads
};

struct PatternChoice {
  std::vector<size_t> options;  // one for each head
  TradeOffPoint reached;
};

// The lower right border of what can be reached: from the cheapest choice to the most valuable one, always
// the step with the most value for its seconds next. Each point is optimal for its seconds among all choices
// (the steps are those of the heads' convex hulls, so it is the solution of the relaxation by Lagrange
// multipliers wherever that is whole). heads: at least one, each with at least one option; LF_CHECKed.
std::vector<TradeOffPoint> TradeOffCurve(std::span<const std::vector<HeadOption>> heads);

// The last point of that curve that is within the seconds, or the first that has the value; then single heads
// take another option, also off their hull, as long as that wins value within the seconds, or saves seconds
// at the value. What is lost to the optimum is less than one step of the curve. InvalidArgument, with both
// numbers: the cheapest choice takes longer, or the most valuable one has less.
absl::StatusOr<PatternChoice> ChoosePatterns(std::span<const std::vector<HeadOption>> heads,
                                             const SolverTarget& target);

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_PATTERN_SOLVER_H_
