#ifndef LONGFILL_MODELS_SEARCH_PATTERN_FAMILY_H_
#define LONGFILL_MODELS_SEARCH_PATTERN_FAMILY_H_

// A family is a base pattern and all that it becomes when its budget grows or shrinks: what lets candidates
// of different kinds be brought to equal kernel time (arXiv 2407.02490, algorithm 1, grows and shrinks
// parameters to equal FLOP).

#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/sparse/head_pattern.h"

namespace longfill {

// The member of the base's family at `scale` > 0; at 1 the base. Budgets are multiplied by the scale and
// rounded, the min_share of BlockShare is divided by it; both stay within what Validate takes (an A-shape
// keeps n_local >= 1, a vertical-slash at least one key, min_share <= 1). Dense is its own whole family.
// Monotone: a larger scale never selects less.
HeadPattern ScalePattern(const HeadPattern& base, double scale);

// What a search tries where it is told nothing: the budgets that MInference publishes most often, its A-shape
// and block-sparse candidates, and block-share.
std::vector<HeadPattern> DefaultFamilies();

// Specs as ParseHeadPattern reads them. InvalidArgument names the spec: no pattern, dense (always a
// candidate), or given twice.
absl::StatusOr<std::vector<HeadPattern>> ParseFamilies(const std::vector<std::string>& specs);

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_PATTERN_FAMILY_H_
