#include "models/search/pattern_search.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "kernels/sparse/coverage.h"
#include "models/search/influence.h"
#include "models/search/pattern_family.h"

namespace longfill {
namespace {

// What is computed for heads of a layer that is scored for others.
constexpr AShape kCheapest{0, 1};

// A pattern that one head may have.
struct ScoredPattern {
  Candidate candidate;
  std::vector<double> seconds_at;  // of each target length
  double recall = 0, last_recall = 0, error = 0;
};

// What the table says of one target length.
struct LengthCosts {
  int64_t num_tokens = 0;
  std::vector<CostCurve> curves;  // of the candidates
  CostCurve dense;
  double reference_seconds = 0;  // of the reference on all heads
};

class PatternSearch {
 public:
  PatternSearch(const SearchModel& model, std::span<const std::vector<int32_t>> samples,
                const CostTable& table, const SearchOptions& options, Communicator& world,
                const ScorePassOptions& pass)
      : model_(model),
        samples_(samples),
        table_(table),
        options_(options),
        world_(world),
        pass_(pass),
        num_layers_(model.config.num_layers),
        num_heads_(model.config.num_q_heads) {}

  absl::StatusOr<SearchResult> Run() {
    LF_ASSIGN_OR_RETURN(result_.candidates, BalanceCandidates(table_, options_));
    LF_RETURN_IF_ERROR(FindCurves());
    LF_RETURN_IF_ERROR(ScoreAll());
    if (options_.value == SearchValue::kAnswers) LF_RETURN_IF_ERROR(FindDecisiveHeads());
    LF_RETURN_IF_ERROR(Choose());
    if (options_.head_recall > 0) LF_RETURN_IF_ERROR(Refine());
    Conclude();
    return std::move(result_);
  }

 private:
  // Of a place in the list of all heads.
  int64_t LayerOf(size_t place) const { return static_cast<int64_t>(place) / num_heads_; }
  int64_t HeadOf(size_t place) const { return static_cast<int64_t>(place) % num_heads_; }
  size_t num_all_heads() const { return static_cast<size_t>(num_layers_ * num_heads_); }

  absl::Status FindCurves() {
    for (const int64_t num_tokens : options_.target_lengths) {
      LengthCosts costs{.num_tokens = num_tokens};
      for (const Candidate& candidate : result_.candidates) {
        LF_ASSIGN_OR_RETURN(CostCurve curve, table_.CurveAt(candidate.family, num_tokens));
        costs.curves.push_back(std::move(curve));
      }
      LF_ASSIGN_OR_RETURN(costs.dense, table_.CurveAt(Dense(), num_tokens));
      costs_.push_back(std::move(costs));
    }
    return absl::OkStatus();
  }

  const CostCurve& CurveOf(const HeadPattern& family, const LengthCosts& costs) const {
    for (size_t i = 0; i < costs.curves.size(); ++i) {
      if (result_.candidates[i].family == family) return costs.curves[i];
    }
    return costs.dense;
  }

  // SearchTotals::seconds of one head.
  double SecondsOf(const ScoredPattern& pattern) const {
    double share = 0;
    for (size_t i = 0; i < costs_.size(); ++i) {
      share = std::max(share, pattern.seconds_at[i] / costs_[i].reference_seconds);
    }
    return share * costs_.back().reference_seconds;
  }

  // The means over samples of one head under one candidate of a cube.
  ScoredPattern MeanOf(const ScoreCube& cube, int64_t layer, int64_t candidate, int64_t head,
                       const Candidate& of) const {
    ScoredPattern mean{.candidate = of};
    std::vector<double> pairs(costs_.size());
    std::vector<double> num_samples(costs_.size());
    for (int64_t sample = 0; sample < cube.num_samples(); ++sample) {
      const HeadScore& score = cube.at(sample, layer, candidate, head);
      mean.recall += score.recall;
      mean.last_recall += score.last_recall;
      mean.error += score.error;
      for (size_t i = 0; i < costs_.size(); ++i) {
        if (std::ssize(samples_[static_cast<size_t>(sample)]) != costs_[i].num_tokens) continue;
        pairs[i] += static_cast<double>(score.pairs);
        ++num_samples[i];
      }
    }
    const auto count = static_cast<double>(cube.num_samples());
    mean.recall /= count;
    mean.last_recall /= count;
    mean.error /= count;
    for (size_t i = 0; i < costs_.size(); ++i) {
      mean.seconds_at.push_back(PredictSeconds(CurveOf(of.family, costs_[i]), pairs[i] / num_samples[i]));
    }
    return mean;
  }

  ScoredPattern DensePattern() const {
    ScoredPattern dense{.candidate = {Dense(), Dense()}};
    dense.recall = dense.last_recall = 1;
    for (const LengthCosts& costs : costs_) {
      dense.seconds_at.push_back(
          PredictSeconds(costs.dense, static_cast<double>(CausalPairs(costs.num_tokens))));
    }
    return dense;
  }

  absl::Status ScoreAll() {
    std::vector<PatternSet> sets;
    for (const Candidate& candidate : result_.candidates) {
      sets.push_back(PatternSet::Uniform(candidate.pattern, num_layers_, num_heads_));
    }
    LF_ASSIGN_OR_RETURN(const ScoreCube cube, ScoreCandidates(model_, samples_, sets, world_, pass_));
    scored_.resize(num_all_heads());
    for (size_t place = 0; place < scored_.size(); ++place) {
      for (int64_t c = 0; c < cube.num_candidates(); ++c) {
        scored_[place].push_back(
            MeanOf(cube, LayerOf(place), c, HeadOf(place), result_.candidates[static_cast<size_t>(c)]));
      }
      scored_[place].push_back(DensePattern());
    }
    return SumReference();
  }

  absl::Status SumReference() {
    for (size_t i = 0; i < costs_.size(); ++i) {
      for (const std::vector<ScoredPattern>& patterns : scored_) {
        costs_[i].reference_seconds += patterns.front().seconds_at[i];
      }
      if (costs_[i].reference_seconds > 0) continue;
      return absl::InvalidArgumentError(absl::StrCat("by the cost table ", ToString(options_.reference),
                                                     " takes no time at ", costs_[i].num_tokens, " tokens"));
    }
    return absl::OkStatus();
  }

  absl::Status FindDecisiveHeads() {
    const auto shorter = [](const auto& a, const auto& b) { return a.size() < b.size(); };
    const size_t shortest = std::min_element(samples_.begin(), samples_.end(), shorter)->size();
    std::vector<std::vector<int32_t>> samples;
    std::copy_if(samples_.begin(), samples_.end(), std::back_inserter(samples),
                 [shortest](const auto& sample) { return sample.size() == shortest; });
    ScorePassOptions pass = pass_;
    pass.pass = "influence";
    LF_ASSIGN_OR_RETURN(result_.influence,
                        MeasureInfluence(model_, samples, options_.reference, world_, pass));
    result_.decisive = DecisiveHeads(result_.influence, options_.answer_share);
    for (const size_t place : result_.decisive) {
      std::erase_if(scored_[place], [&](const ScoredPattern& pattern) { return !Serves(place, pattern); });
    }
    return absl::OkStatus();
  }
  // Whether a head may have the pattern: the reference, which is the first, and dense always. Recalls may
  // differ by rounding, and be above 1.
  bool Serves(size_t place, const ScoredPattern& pattern) const {
    constexpr double kRounding = 1e-6;
    if (!std::ranges::binary_search(result_.decisive, place)) return true;
    if (std::holds_alternative<Dense>(pattern.candidate.pattern)) return true;
    return pattern.last_recall >= std::min(1.0, scored_[place].front().last_recall) - kRounding;
  }

  double ValueOf(const ScoredPattern& pattern) const {
    switch (options_.value) {
      case SearchValue::kEnd:
        return options_.end_share * pattern.last_recall + (1 - options_.end_share) * pattern.recall;
      case SearchValue::kRecall:
      case SearchValue::kAnswers:
        return pattern.recall;
      case SearchValue::kError:
        return std::max(0.0, 1 - pattern.error);
    }
    return 0;
  }

  absl::Status Choose() {
    std::vector<std::vector<HeadOption>> heads;
    std::vector<ScoredPattern> reference;
    for (const std::vector<ScoredPattern>& patterns : scored_) {
      heads.emplace_back();
      for (const ScoredPattern& pattern : patterns)
        heads.back().push_back({SecondsOf(pattern), ValueOf(pattern)});
      reference.push_back(patterns.front());
    }
    result_.reference = Total(reference);
    result_.reference.seconds = costs_.back().reference_seconds;
    SolverTarget target{.least_value = options_.mean_value};
    if (options_.time_share) target.most_seconds = *options_.time_share * result_.reference.seconds;
    result_.curve = TradeOffCurve(heads);
    absl::StatusOr<PatternChoice> chosen = ChoosePatterns(heads, target);
    if (!chosen.ok() && !result_.decisive.empty()) {
      return Annotate(chosen.status(),
                      absl::StrCat(result_.decisive.size(), " heads decide answers and keep what ",
                                   ToString(options_.reference), " gives them"));
    }
    LF_ASSIGN_OR_RETURN(const PatternChoice choice, std::move(chosen));
    result_.chosen = choice.reached;
    for (size_t place = 0; place < scored_.size(); ++place) {
      chosen_.push_back(scored_[place][choice.options[place]]);
    }
    return absl::OkStatus();
  }

  // Heads below head_recall: twice as much of what they have, scored anew, until one of all that were scored
  // reaches it; the cheapest such one is taken.
  absl::Status Refine() {
    std::vector<size_t> missing;
    std::vector<ScoredPattern> next = chosen_;
    for (size_t place = 0; place < chosen_.size(); ++place) {
      if (chosen_[place].recall < options_.head_recall) missing.push_back(place);
    }
    result_.num_refined = std::ssize(missing);
    const double dense_seconds = SecondsOf(DensePattern());
    for (int round = 1; round <= kRefinementRounds; ++round) {
      std::vector<size_t> left;
      for (const size_t place : missing) {
        const bool may_pay = SecondsOf(next[place]) < dense_seconds;
        if (next[place].recall < options_.head_recall && may_pay) left.push_back(place);
      }
      if (left.empty()) break;
      LF_RETURN_IF_ERROR(ScoreGrown(round, left, &next));
    }
    for (const size_t place : missing) TakeCheapest(place);
    return absl::OkStatus();
  }

  absl::Status ScoreGrown(int round, const std::vector<size_t>& places, std::vector<ScoredPattern>* next) {
    PatternSet set = PatternSet::Uniform(kCheapest, num_layers_, num_heads_);
    for (const size_t place : places) {
      Candidate& candidate = (*next)[place].candidate;
      candidate.pattern = ScalePattern(candidate.pattern, kRefinementFactor);
      set.Set(LayerOf(place), HeadOf(place), candidate.pattern);
    }
    ScorePassOptions pass = pass_;
    pass.pass = absl::StrCat("refine-", round);
    pass.state = nullptr;  // what is grown depends on the target, which the state does not know of
    LF_ASSIGN_OR_RETURN(const ScoreCube cube, ScoreCandidates(model_, samples_, {&set, 1}, world_, pass));
    for (const size_t place : places) {
      (*next)[place] = MeanOf(cube, LayerOf(place), 0, HeadOf(place), (*next)[place].candidate);
      scored_[place].push_back((*next)[place]);
    }
    return absl::OkStatus();
  }

  void TakeCheapest(size_t place) {
    const ScoredPattern* best = nullptr;
    for (const ScoredPattern& pattern : scored_[place]) {
      if (pattern.recall < options_.head_recall || !Serves(place, pattern)) continue;
      if (best == nullptr || SecondsOf(pattern) < SecondsOf(*best)) best = &pattern;
    }
    LF_CHECK(best != nullptr);  // dense has recall 1
    chosen_[place] = *best;
  }

  SearchTotals Total(const std::vector<ScoredPattern>& heads) const {
    SearchTotals totals;
    for (const ScoredPattern& head : heads) {
      totals.seconds += SecondsOf(head);
      totals.recall += head.recall;
      totals.last_recall += head.last_recall;
      totals.error += head.error;
      totals.least_recall = std::min(totals.least_recall, head.recall);
    }
    const auto count = static_cast<double>(heads.size());
    totals.recall /= count;
    totals.last_recall /= count;
    totals.error /= count;
    return totals;
  }

  void Conclude() {
    result_.totals = Total(chosen_);
    for (size_t i = 0; i < costs_.size(); ++i) {
      SearchSeconds sum{.num_tokens = costs_[i].num_tokens, .reference = costs_[i].reference_seconds};
      for (const ScoredPattern& head : chosen_) sum.seconds += head.seconds_at[i];
      result_.lengths.push_back(sum);
    }
    result_.patterns = PatternSet::Uniform(Dense(), num_layers_, num_heads_);
    for (size_t place = 0; place < chosen_.size(); ++place) {
      result_.patterns.Set(LayerOf(place), HeadOf(place), chosen_[place].candidate.pattern,
                           std::clamp(chosen_[place].recall, 0.0, 1.0));
    }
  }

  const SearchModel& model_;
  const std::span<const std::vector<int32_t>> samples_;
  const CostTable& table_;
  const SearchOptions& options_;
  Communicator& world_;
  const ScorePassOptions& pass_;
  const int64_t num_layers_, num_heads_;

  std::vector<LengthCosts> costs_;                  // of the target lengths
  std::vector<std::vector<ScoredPattern>> scored_;  // [head of all layers][candidates, dense, refinements]
  std::vector<ScoredPattern> chosen_;
  SearchResult result_;
};

}  // namespace

absl::StatusOr<std::vector<Candidate>> BalanceCandidates(const CostTable& table,
                                                         const SearchOptions& options) {
  std::vector<Candidate> candidates = {{options.reference, options.reference}};
  const auto add = [&candidates](const HeadPattern& pattern, const HeadPattern& family) {
    const auto same = [&pattern](const Candidate& candidate) { return candidate.pattern == pattern; };
    if (std::none_of(candidates.begin(), candidates.end(), same)) candidates.push_back({pattern, family});
  };
  LF_ASSIGN_OR_RETURN(const CostCurve reference,
                      table.CurveAt(options.reference, options.target_lengths.back()));
  const auto whole = std::find_if(reference.points.begin(), reference.points.end(),
                                  [](const CostPoint& point) { return point.scale == 1; });
  if (whole == reference.points.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the cost table has ", ToString(options.reference), " not at its own size (scale 1)"));
  }
  for (const HeadPattern& family : options.families) {
    LF_ASSIGN_OR_RETURN(const CostCurve curve, table.CurveAt(family, options.target_lengths.back()));
    if (options.budgets.empty()) add(family, family);
    for (const double budget : options.budgets) {
      const double scale = ScaleForSeconds(curve, budget * whole->seconds());
      if (scale > 0) add(ScalePattern(family, scale), family);
    }
  }
  return candidates;
}

absl::StatusOr<SearchResult> SearchPatterns(const SearchModel& model,
                                            std::span<const std::vector<int32_t>> samples,
                                            const CostTable& table, const SearchOptions& options,
                                            Communicator& world, const ScorePassOptions& pass) {
  LF_CHECK(options.time_share.has_value() != options.mean_value.has_value());
  LF_CHECK(!std::holds_alternative<Dense>(options.reference));
  LF_CHECK(!options.target_lengths.empty());
  for (const int64_t length : options.target_lengths) {
    const auto has = [length](const std::vector<int32_t>& sample) { return std::ssize(sample) == length; };
    if (std::any_of(samples.begin(), samples.end(), has)) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("no sample has ", length, " tokens, a length at which time counts"));
  }
  return PatternSearch(model, samples, table, options, world, pass).Run();
}

}  // namespace longfill
