#ifndef LONGFILL_MODELS_SEARCH_INFLUENCE_H_
#define LONGFILL_MODELS_SEARCH_INFLUENCE_H_

// Which heads decide what a model says next. A head is cut to what streaming heads see, sinks and near keys,
// while all others stay as they are; its influence is how far that moves the distribution of the token after
// the prompt. Recall does not tell: a head may hold little mass that nothing else brings.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "models/search/sample_pass.h"
#include "models/search/score_pass.h"
#include "models/search/search_state.h"
#include "parallel/communicator.h"

namespace longfill {

// What a head is cut to: 64 sinks and the nearest 1024 keys, and in short prompts no more than a 32nd and an
// eighth of them, so that something is cut.
AShape CutPattern(int64_t num_tokens);

// Of all layers: [layer][head], the mean over the samples of KL(all heads have `base` || this one is cut), of
// the next token, in nats. Internal, naming layer and head, where that is no number. Costs as many forward
// passes as there are heads, of half the layers in the mean. The work is units, one for each layer of each
// sample, dealt to the ranks in turn; options.pass names them in the state, rows are not sampled. Every rank
// calls this with equal arguments and gets an equal result; errors are agreed on after the layer in which
// they struck.
absl::StatusOr<std::vector<double>> MeasureInfluence(const SearchModel& model,
                                                     std::span<const std::vector<int32_t>> samples,
                                                     const HeadPattern& base, Communicator& world,
                                                     const ScorePassOptions& options);

// Below, in nats, what a cut moves is taken for rounding, which in bfloat16 is 2e-5 to 3e-5.
inline constexpr double kLeastInfluence = 1e-4;

// Of the places from kLeastInfluence on, the fewest that have `share` of their sum together, ascending; of
// equal ones the lower.
std::vector<size_t> DecisiveHeads(std::span<const double> influence, double share);

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_INFLUENCE_H_
