#include "models/search/pattern_search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <variant>

#include "kernels/sparse/coverage.h"
#include "models/search/calibration.h"
#include "models/search/evaluation.h"
#include "models/search/pattern_family.h"
#include "models/search/score_pass.h"
#include "tests/unit/search/search_fixture.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kTokens = 1024;
std::vector<std::vector<int32_t>> Samples() { return {PromptOf(kTokens, 11), PromptOf(700, 5)}; }
constexpr HeadPattern kReference = VerticalSlash{64, 400};

// Pairs cost the same in every family, so that costs can be checked by hand; `a_shape` times as much in
// those.
void AddPairCosts(const std::vector<HeadPattern>& families, int64_t num_tokens, double a_shape,
                  CostTable* table) {
  const auto all = static_cast<double>(CausalPairs(num_tokens));
  table->Add({Dense(), num_tokens, {{1, all, all, 0}}});
  for (const HeadPattern& family : families) {
    CostCurve curve{.family = family, .num_tokens = num_tokens};
    const double factor = std::holds_alternative<AShape>(family) ? a_shape : 1;
    for (const double scale : {0.0625, 0.125, 0.25, 0.5, 1.0, 2.0}) {
      curve.points.push_back({scale, all * scale / 2, factor * all * scale / 2, 0});
    }
    table->Add(curve);
  }
}

CostTable PairTable(const SmallModel& model, const std::vector<HeadPattern>& families) {
  CostTable table(TableDeviceOf(model.view(), Coverage::kTiles));
  AddPairCosts(families, kTokens, 1, &table);
  return table;
}

SearchOptions Options() {
  return {.families = {kReference, AShape{64, 256}, BlockShare{2, 0.1}},
          .budgets = {0.25, 0.5, 1},
          .reference = kReference,
          .target_lengths = {kTokens},
          .time_share = 0.5};
}

absl::StatusOr<SearchResult> Search(const SearchOptions& options) {
  const SmallModel model;
  const auto world = CreateSingleCommunicator();
  return SearchPatterns(model.view(), Samples(), PairTable(model, options.families), options, *world,
                        {.sample = SmallPass()});
}

TEST(PatternSearch, CandidatesTakeEqualTimeByTheTable) {
  const SmallModel model;
  SearchOptions options = Options();
  const CostTable table = PairTable(model, options.families);
  LF_ASSERT_OK_AND_ASSIGN(const auto candidates, BalanceCandidates(table, options));
  // The reference, three families at a quarter and a half, and at its whole time the two that are not it.
  const std::vector<HeadPattern> want = {kReference,         VerticalSlash{16, 100}, VerticalSlash{32, 200},
                                         AShape{16, 64},     AShape{32, 128},        AShape{64, 256},
                                         BlockShare{2, 0.4}, BlockShare{2, 0.2},     BlockShare{2, 0.1}};
  ASSERT_EQ(candidates.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) EXPECT_EQ(candidates[i].pattern, want[i]) << i;

  options.budgets = {0.01};  // below what the table has
  LF_ASSERT_OK_AND_ASSIGN(const auto few, BalanceCandidates(table, options));
  EXPECT_EQ(few.size(), 1U);
  options.budgets = {};
  LF_ASSERT_OK_AND_ASSIGN(const auto given, BalanceCandidates(table, options));
  EXPECT_EQ(given.size(), 3U);
  options.target_lengths = {2 * kTokens};
  EXPECT_THAT(BalanceCandidates(table, options).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("2048 is beyond")));
}

TEST(PatternSearch, StaysWithinTheTimeAndIsTheSameTwice) {
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult first, Search(Options()));
  EXPECT_LE(first.totals.seconds, 0.5 * first.reference.seconds * (1 + 1e-12));
  EXPECT_GT(first.totals.seconds, 0);
  EXPECT_EQ(first.patterns.num_layers(), 3);
  double sum = 0;
  for (int64_t layer = 0; layer < 3; ++layer) {
    for (int64_t head = 0; head < 4; ++head) sum += first.patterns.score(layer, head).value();
  }
  EXPECT_NEAR(sum / 12, first.totals.recall, 1e-6);
  EXPECT_NEAR(first.chosen.mean_value, (first.totals.recall + first.totals.last_recall) / 2, 1e-9);
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult second, Search(Options()));
  EXPECT_EQ(first.patterns, second.patterns);
}

// The scores in the result are what a measurement of its patterns says.
TEST(PatternSearch, RecallIsThatOfTheEvaluation) {
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult result, Search(Options()));
  const SmallModel model;
  const std::vector<PatternSet> sets = {result.patterns, PatternSet::Uniform(kReference, 3, 4)};
  LF_ASSERT_OK_AND_ASSIGN(const auto judged,
                          EvaluatePatterns(model.view(), Samples(), sets, {.pass = SmallPass()}));
  EXPECT_NEAR(judged[0].recall, result.totals.recall, 1e-9);
  EXPECT_NEAR(judged[0].error, result.totals.error, 1e-9);
  EXPECT_NEAR(judged[1].recall, result.reference.recall, 1e-9);
  EXPECT_NEAR(judged[1].last_recall, result.reference.last_recall, 1e-9);
  EXPECT_GT(judged[1].attention_seconds, 0);
}

TEST(PatternSearch, ReachesARecallAndLeavesNoHeadBelowTheLeast) {
  SearchOptions options = Options();
  options.value = SearchValue::kRecall;
  options.time_share.reset();
  options.mean_value = 0.9;
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult mean, Search(options));
  EXPECT_GE(mean.totals.recall, 0.9);
  ASSERT_LT(mean.totals.least_recall, 0.99);
  options.head_recall = 0.99;
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult refined, Search(options));
  EXPECT_GE(refined.totals.least_recall, 0.99);
  EXPECT_GT(refined.num_refined, 0);
  EXPECT_GT(refined.totals.seconds, mean.totals.seconds);
  // Whoever reached it before has what it had.
  for (int64_t layer = 0; layer < 3; ++layer) {
    for (int64_t head = 0; head < 4; ++head) {
      if (mean.patterns.score(layer, head) < 0.99) continue;
      EXPECT_EQ(refined.patterns.at(layer, head), mean.patterns.at(layer, head));
    }
  }
}

TEST(PatternSearch, EachValueIsServedBestByItself) {
  SearchOptions options = Options();
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult by_end, Search(options));
  options.value = SearchValue::kError;
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult by_error, Search(options));
  options.value = SearchValue::kRecall;
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult by_recall, Search(options));
  EXPECT_LE(by_error.totals.error, by_recall.totals.error + 1e-9);
  EXPECT_GE(by_recall.totals.recall, by_error.totals.recall - 1e-9);
  EXPECT_GE(by_recall.totals.recall, by_end.totals.recall - 1e-9);
  const auto end_value = [](const SearchResult& result) {
    return result.totals.recall + result.totals.last_recall;
  };
  EXPECT_GE(end_value(by_end), end_value(by_recall) - 1e-9);
}

// Of each head: the mean over samples of the last rows' recall under one set.
std::vector<double> LastRecalls(const SmallModel& model, const PatternSet& set) {
  const auto world = CreateSingleCommunicator();
  const auto samples = Samples();
  const ScoreCube cube = *ScoreCandidates(model.view(), samples, {&set, 1}, *world, {.sample = SmallPass()});
  std::vector<double> recalls;
  for (int64_t layer = 0; layer < cube.num_layers(); ++layer) {
    for (int64_t head = 0; head < cube.num_heads(); ++head) {
      recalls.push_back((cube.at(0, layer, 0, head).last_recall + cube.at(1, layer, 0, head).last_recall) /
                        2);
    }
  }
  return recalls;
}

TEST(PatternSearch, DecisiveHeadsKeepWhatTheReferenceKeepsForTheLastRows) {
  const SmallModel model;
  SearchOptions options = Options();
  options.value = SearchValue::kRecall;
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult by_recall, Search(options));
  EXPECT_TRUE(by_recall.influence.empty());
  options.value = SearchValue::kAnswers;
  options.answer_share = 0;
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult without, Search(options));
  EXPECT_EQ(without.patterns, by_recall.patterns);
  EXPECT_EQ(without.influence.size(), 12U);
  options.answer_share = 0.5;
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult found, Search(options));
  ASSERT_FALSE(found.decisive.empty());
  EXPECT_LT(found.decisive.size(), 12U);
  EXPECT_LE(found.totals.seconds, 0.5 * found.reference.seconds * (1 + 1e-12));
  const std::vector<double> kept = LastRecalls(model, found.patterns);
  const std::vector<double> reference = LastRecalls(model, PatternSet::Uniform(kReference, 3, 4));
  const std::vector<double> else_kept = LastRecalls(model, by_recall.patterns);
  bool would_lose = false;
  for (const size_t place : found.decisive) {
    EXPECT_GE(kept[place], std::min(1.0, reference[place]) - 1e-6) << place;
    would_lose |= else_kept[place] < reference[place];
  }
  EXPECT_TRUE(would_lose) << "recall alone chose nothing worse, so this shows nothing";
  options.head_recall = 0.99;  // refinement keeps to it
  options.time_share = 0.8;
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult refined, Search(options));
  const std::vector<double> after = LastRecalls(model, refined.patterns);
  for (const size_t place : refined.decisive) {
    EXPECT_GE(after[place], std::min(1.0, reference[place]) - 1e-6) << place;
  }
}

// Of a reference that keeps everything, but for rounding; and of one that is too dear.
TEST(PatternSearch, DecisiveHeadsMayAlwaysBeDense) {
  SearchOptions options = Options();
  options.value = SearchValue::kAnswers;
  options.answer_share = 1;
  options.reference = VerticalSlash{1000, 6096};
  options.families = {options.reference, AShape{64, 256}};
  options.head_recall = 1;
  options.time_share = 1;
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult found, Search(options));
  EXPECT_GE(found.totals.least_recall, 0.999);
  EXPECT_FALSE(found.decisive.empty());
  options.time_share = 0.01;
  EXPECT_THAT(Search(options).status(),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("heads decide answers and keep what vertical-slash:1000,6096 gives them")));
}

// A-shapes are dear in the shorter sample and cheap in the longer one, so that the longer one alone chooses
// them.
TEST(PatternSearch, TheTimeHoldsAtEveryTargetLength) {
  const SmallModel model;
  SearchOptions options = Options();
  const auto shorter = static_cast<int64_t>(Samples()[1].size());
  CostTable table(TableDeviceOf(model.view(), Coverage::kTiles));
  AddPairCosts(options.families, kTokens, 0.5, &table);
  AddPairCosts(options.families, shorter, 8, &table);
  const auto world = CreateSingleCommunicator();
  const auto search = [&] {
    return SearchPatterns(model.view(), Samples(), table, options, *world, {.sample = SmallPass()});
  };
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult of_one, search());
  ASSERT_EQ(of_one.lengths.size(), 1U);
  EXPECT_NEAR(of_one.lengths[0].seconds, of_one.totals.seconds, 1e-9 * of_one.totals.seconds);
  options.target_lengths = {shorter, kTokens};
  LF_ASSERT_OK_AND_ASSIGN(const SearchResult of_both, search());
  ASSERT_EQ(of_both.lengths.size(), 2U);
  for (const SearchSeconds& length : of_both.lengths) {
    EXPECT_LE(length.seconds, 0.5 * length.reference * (1 + 1e-12)) << length.num_tokens;
    EXPECT_LE(length.seconds / length.reference,
              of_both.totals.seconds / of_both.reference.seconds * (1 + 1e-12))
        << length.num_tokens;
  }
  EXPECT_NE(of_both.patterns, of_one.patterns);
}

TEST(PatternSearch, LengthsThatCountAreThoseOfSamples) {
  SearchOptions options = Options();
  options.target_lengths = {512, kTokens};
  EXPECT_THAT(Search(options).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("512 tokens")));
}

TEST(Calibration, MeasuresEveryFamilyAtEveryLength) {
  const SmallModel model;
  const std::vector<HeadPattern> families = {kReference, AShape{64, 256}};
  int64_t last_done = 0, last_total = 0;
  LF_ASSERT_OK_AND_ASSIGN(const CostTable table,
                          MeasureCosts(model.view(), Samples(),
                                       {.families = families,
                                        .num_layers = 2,
                                        .runs = 1,
                                        .pass = SmallPass(),
                                        .on_progress = [&](int64_t done, int64_t total) {
                                          last_done = done;
                                          last_total = total;
                                        }}));
  EXPECT_EQ(last_done, last_total);
  EXPECT_EQ(last_total, 2 * 2 * 3);
  EXPECT_EQ(table.curves().size(), 6U);
  LF_EXPECT_OK(table.CheckIsFor(TableDeviceOf(model.view(), Coverage::kTiles)));
  LF_ASSERT_OK_AND_ASSIGN(const CostCurve dense, table.CurveAt(Dense(), kTokens));
  ASSERT_EQ(dense.points.size(), 1U);
  EXPECT_EQ(dense.points[0].pairs, static_cast<double>(CausalPairs(kTokens)));
  LF_ASSERT_OK_AND_ASSIGN(const CostCurve a_shape, table.CurveAt(AShape{64, 256}, kTokens));
  ASSERT_EQ(a_shape.points.size(), CalibrationScales().size());
  // Pairs of an A-shape are known: at scale 1/4 the keys below 16 and the nearest 64.
  double pairs = 0;
  for (int64_t row = 0; row < kTokens; ++row) {
    for (int64_t key = 0; key <= row; ++key) pairs += key < 16 || row - key < 64 ? 1 : 0;
  }
  const auto quarter = std::find_if(a_shape.points.begin(), a_shape.points.end(),
                                    [](const CostPoint& point) { return point.scale == 0.25; });
  ASSERT_NE(quarter, a_shape.points.end());
  EXPECT_EQ(quarter->pairs, pairs);
  for (const CostPoint& point : a_shape.points) EXPECT_GT(point.seconds(), 0);
  LF_ASSERT_OK_AND_ASSIGN(const CostTable read, ParseCostTable(table.ToJson(), "t"));
  EXPECT_EQ(read.curves(), table.curves());
}

}  // namespace
}  // namespace longfill
