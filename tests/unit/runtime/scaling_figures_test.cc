// Figures of recordings that were worked out by hand.

#include "runtime/scaling/scaling_figures.h"

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using Kind = ScheduleStep::Kind;
using testing::DoubleNear;
using testing::ElementsAre;

constexpr double kEpsilon = 1e-9;

// 1 GB/s on every link and no latency.
constexpr LinkRates kLinks{.node_gbs = 1, .network_gbs = 1, .node_latency_us = 0, .network_latency_us = 0};

// A layer of one rank of two: a gather of 1 GB on the main stream, then attention.
RecordedSteps Layer(double attention_seconds) {
  RecordedSteps layer;
  layer.schedule.steps = {{.kind = Kind::kExchange}, {.kind = Kind::kWork, .seconds = attention_seconds}};
  layer.schedule.exchanges = {
      {.group = 0, .call = {.kind = ExchangeKind::kAllGather, .sent = {1'000'000'000, 1'000'000'000}}}};
  layer.seconds[static_cast<size_t>(WorkPart::kAttention)] = attention_seconds;
  return layer;
}

RankRecording Rank(double start_seconds, std::vector<RecordedSteps> layers) {
  RankRecording rank{.layers = std::move(layers)};
  rank.start.schedule.steps = {{.kind = Kind::kWork, .seconds = start_seconds}};
  rank.start.seconds[static_cast<size_t>(WorkPart::kOther)] = start_seconds;
  return rank;
}

TEST(ScalingFiguresTest, AreThoseOfTheScheduleOfAllLayers) {
  // Layers 0 and 2 are the first recorded one, layer 1 the second.
  const std::vector<RankRecording> ranks = {Rank(1, {Layer(2), Layer(5)}), Rank(0.5, {Layer(4), Layer(3)})};
  const LayerChoice choice{.executed = {0, 1}, .stand_in = {0, 1, 0}};
  LF_ASSERT_OK_AND_ASSIGN(const ScalingFigures figures,
                          ComputeScalingFigures(ranks, choice, {{0, 1}}, kLinks));
  // Gathers begin when both are there: 1 to 2, 6 to 7, 12 to 13; the slower rank ends at 17.
  EXPECT_THAT(figures.seconds, DoubleNear(17, kEpsilon));
  EXPECT_THAT(figures.exposed_communication_seconds, DoubleNear(3, kEpsilon));
  EXPECT_THAT(figures.communication_seconds, DoubleNear(3, kEpsilon));
  EXPECT_THAT(figures.bytes.node, DoubleNear(3e9, 1));
  EXPECT_THAT(figures.imbalance, DoubleNear((4 + 5 + 4) / (3.0 + 4.0 + 3.0), kEpsilon));
  EXPECT_THAT(figures.mean_seconds[static_cast<size_t>(WorkPart::kAttention)], DoubleNear(10, kEpsilon));
  EXPECT_THAT(figures.slowest_seconds[static_cast<size_t>(WorkPart::kAttention)], DoubleNear(11, kEpsilon));
  EXPECT_THAT(figures.slowest_seconds[static_cast<size_t>(WorkPart::kOther)], DoubleNear(1, kEpsilon));
}

TEST(ScalingFiguresTest, WithoutAttentionThereIsNoImbalance) {
  const std::vector<RankRecording> ranks = {Rank(1, {Layer(0)}), Rank(1, {Layer(0)})};
  LF_ASSERT_OK_AND_ASSIGN(const ScalingFigures figures,
                          ComputeScalingFigures(ranks, {.executed = {0}, .stand_in = {0}}, {{0, 1}}, kLinks));
  EXPECT_EQ(figures.imbalance, 1);
}

TEST(ScalingFiguresTest, RanksThatDoNotFitAreNamed) {
  const std::vector<RankRecording> ranks = {Rank(1, {Layer(1)}), Rank(1, {RecordedSteps{}})};
  EXPECT_THAT(ComputeScalingFigures(ranks, {.executed = {0}, .stand_in = {0}}, {{0, 1}}, kLinks),
              StatusIs(absl::StatusCode::kInternal, testing::HasSubstr("rank 0 waits in all-gather")));
}

TEST(ChooseLayers, RunsEachKindOnce) {
  PatternSet patterns = PatternSet::Uniform(Dense{}, 6, 2);
  LayerChoice choice = ChooseLayers(patterns, 0, 0);
  EXPECT_THAT(choice.executed, ElementsAre(0));
  EXPECT_THAT(choice.stand_in, ElementsAre(0, 0, 0, 0, 0, 0));
  patterns.Set(4, 1, AShape{.n_init = 1, .n_local = 2});
  choice = ChooseLayers(patterns, 0, 0);
  EXPECT_THAT(choice.executed, ElementsAre(0, 4));
  EXPECT_THAT(choice.stand_in, ElementsAre(0, 0, 0, 0, 1, 0));
  // Recorded selections come again after two layers.
  choice = ChooseLayers(patterns, 2, 0);
  EXPECT_THAT(choice.executed, ElementsAre(0, 1, 4));
  EXPECT_THAT(choice.stand_in, ElementsAre(0, 1, 0, 1, 2, 1));
}

TEST(ChooseLayers, SpreadsFewerEvenly) {
  const PatternSet patterns = PatternSet::Uniform(Dense{}, 8, 1);
  LayerChoice choice = ChooseLayers(patterns, 8, 2);
  EXPECT_THAT(choice.executed, ElementsAre(2, 6));
  EXPECT_THAT(choice.stand_in, ElementsAre(0, 0, 0, 0, 1, 1, 1, 1));
  choice = ChooseLayers(patterns, 8, 3);
  EXPECT_THAT(choice.executed, ElementsAre(1, 4, 6));
  EXPECT_THAT(choice.stand_in, ElementsAre(0, 0, 0, 1, 1, 1, 2, 2));
  EXPECT_EQ(ChooseLayers(patterns, 8, 100).executed.size(), 8);
}

}  // namespace
}  // namespace longfill
