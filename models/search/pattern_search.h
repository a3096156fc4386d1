#ifndef LONGFILL_MODELS_SEARCH_PATTERN_SEARCH_H_
#define LONGFILL_MODELS_SEARCH_PATTERN_SEARCH_H_

// The offline, kernel-aware search (arXiv 2407.02490, section 3.2, algorithm 1): candidates of equal kernel
// time, scored on calibration prompts, and a pattern for each head under a target for all of them.
// models/search/README.md tells how.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "models/pattern_file.h"
#include "models/search/cost_table.h"
#include "models/search/pattern_solver.h"
#include "models/search/score_pass.h"

namespace longfill {

enum class SearchValue : uint8_t {
  // Recall over the last rows, from which decoding goes on, and over all sampled ones
  // (SearchOptions::end_share).
  kEnd,
  kRecall,  // mean recall over all sampled rows
  // The same; and heads that decide what the model says next (SearchOptions::answer_share) keep of the last
  // rows' recall at least what they have with the reference.
  kAnswers,
  kError,  // 1 - relative error of the output, not below 0
};

struct SearchOptions {
  std::vector<HeadPattern> families;
  // Kernel time of a candidate on the mean head, as a share of that of `reference`: each family is scaled to
  // each of them. Empty: families are candidates as they are.
  std::vector<double> budgets;
  HeadPattern reference = kUnlistedHeadPattern;  // always a candidate too, as it is; not dense
  // Lengths at which time counts, ascending, at least one; some sample has each. At the last one candidates
  // are of equal time, and its seconds are those of the result.
  std::vector<int64_t> target_lengths;
  SearchValue value = SearchValue::kEnd;
  double end_share = 0.5;  // of the value kEnd, from 0 to 1: what the last rows count
  // Of the value kAnswers, from 0 to 1: the part of all influence that the heads with most of it have
  // together, which keep what they have for the last rows. It is measured on the shortest samples.
  double answer_share = 0.95;
  // Exactly one: total time as a share of that of `reference` on all heads, kept at every target length, or
  // the mean value.
  std::optional<double> time_share;
  std::optional<double> mean_value;
  // Heads whose recall stays below are given more of their family, kRefinementFactor at a time, beyond the
  // target; 0: none is.
  double head_recall = 0;
};
inline constexpr double kRefinementFactor = 2;
inline constexpr int kRefinementRounds = 5;  // then the head is dense

struct Candidate {
  HeadPattern pattern;
  HeadPattern family;  // whose curve predicts its time
  friend bool operator==(const Candidate&, const Candidate&) = default;
};

// Families at equal kernel time, the reference first; of equal patterns the first stays. A budget that a
// family cannot go down to gives none. InvalidArgument: the table does not have a family at that length.
absl::StatusOr<std::vector<Candidate>> BalanceCandidates(const CostTable& table,
                                                         const SearchOptions& options);

// Of all heads together: their sum of seconds, the mean of the rest.
struct SearchTotals {
  // Predicted. With several target lengths each head counts with the length at which it takes the largest
  // share of the reference's total, so that the share of this sum is a bound of those of all lengths.
  double seconds = 0;
  double recall = 0;
  double last_recall = 0;
  double error = 0;
  double least_recall = 1;  // of a head
};

// Predicted, of all heads at one target length.
struct SearchSeconds {
  int64_t num_tokens = 0;
  double seconds = 0;
  double reference = 0;  // of the reference on all heads
};

struct SearchResult {
  PatternSet patterns;  // with the recall of each head as its score
  SearchTotals totals;
  SearchTotals reference;  // the same of the reference on all heads; its seconds are those of the last length
  std::vector<SearchSeconds> lengths;  // as target_lengths
  std::vector<Candidate> candidates;
  std::vector<TradeOffPoint> curve;  // before refinement
  TradeOffPoint chosen;              // on it
  int64_t num_refined = 0;           // heads
  // Of the value kAnswers: MeasureInfluence of all heads, [layer][head], and the places of those that decide.
  std::vector<double> influence;
  std::vector<size_t> decisive;
};

// Every rank calls this with equal arguments and gets an equal result. InvalidArgument: no sample has a
// target length, the table does not have it, or says that the reference takes no time there; other errors are
// those of BalanceCandidates, ScoreCandidates and ChoosePatterns.
absl::StatusOr<SearchResult> SearchPatterns(const SearchModel& model,
                                            std::span<const std::vector<int32_t>> samples,
                                            const CostTable& table, const SearchOptions& options,
                                            Communicator& world, const ScorePassOptions& pass);

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_PATTERN_SEARCH_H_
