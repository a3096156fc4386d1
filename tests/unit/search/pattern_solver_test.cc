#include "models/search/pattern_solver.h"

#include <gtest/gtest.h>

#include <random>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;
using Heads = std::vector<std::vector<HeadOption>>;

constexpr double kTiny = 1e-12;

Heads RandomHeads(uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> draw(0, 1);
  Heads heads(4);
  for (std::vector<HeadOption>& options : heads) {
    for (int i = 0; i < 5; ++i) options.push_back({draw(random), draw(random)});
  }
  return heads;
}

// Every choice of options, by counting.
template <typename Visit>
void ForEveryChoice(const Heads& heads, Visit visit) {
  std::vector<size_t> options(heads.size(), 0);
  while (true) {
    TradeOffPoint point;
    for (size_t head = 0; head < heads.size(); ++head) {
      point.seconds += heads[head][options[head]].seconds;
      point.mean_value += heads[head][options[head]].value / static_cast<double>(heads.size());
    }
    visit(point);
    size_t head = 0;
    while (head < heads.size() && ++options[head] == heads[head].size()) options[head++] = 0;
    if (head == heads.size()) return;
  }
}

double BestWithin(const Heads& heads, double seconds) {
  double best = -1;
  ForEveryChoice(heads, [&](const TradeOffPoint& point) {
    if (point.seconds <= seconds + kTiny) best = std::max(best, point.mean_value);
  });
  return best;
}

TEST(PatternSolver, EveryPointOfTheCurveIsTheBestForItsSeconds) {
  for (uint32_t seed = 0; seed < 30; ++seed) {
    const Heads heads = RandomHeads(seed);
    const std::vector<TradeOffPoint> curve = TradeOffCurve(heads);
    ASSERT_GT(curve.size(), 1U);
    for (size_t i = 0; i < curve.size(); ++i) {
      EXPECT_NEAR(curve[i].mean_value, BestWithin(heads, curve[i].seconds), 1e-9)
          << "seed " << seed << " point " << i;
      if (i == 0) continue;
      EXPECT_GT(curve[i].seconds, curve[i - 1].seconds);
      EXPECT_GT(curve[i].mean_value, curve[i - 1].mean_value);
    }
    EXPECT_NEAR(curve.back().mean_value, BestWithin(heads, 1e9), 1e-9);
  }
}

TEST(PatternSolver, StaysWithinTheSecondsAndBeatsTheCurveBelowThem) {
  for (uint32_t seed = 0; seed < 30; ++seed) {
    const Heads heads = RandomHeads(seed);
    const std::vector<TradeOffPoint> curve = TradeOffCurve(heads);
    for (const double share : {0.0, 0.2, 0.5, 0.9, 1.0}) {
      const double seconds =
          curve.front().seconds + share * (curve.back().seconds - curve.front().seconds) + kTiny;
      LF_ASSERT_OK_AND_ASSIGN(const PatternChoice choice, ChoosePatterns(heads, {.most_seconds = seconds}));
      EXPECT_LE(choice.reached.seconds, seconds);
      EXPECT_LE(choice.reached.mean_value, BestWithin(heads, seconds) + 1e-9);
      double below = 0;
      double step = 0;
      for (size_t i = 0; i < curve.size() && curve[i].seconds <= seconds; ++i) {
        below = curve[i].mean_value;
        step = i + 1 < curve.size() ? curve[i + 1].mean_value - below : 0;
      }
      EXPECT_GE(choice.reached.mean_value, below - 1e-9);
      EXPECT_GE(choice.reached.mean_value, BestWithin(heads, seconds) - step - 1e-9) << "seed " << seed;
    }
  }
}

TEST(PatternSolver, ReachesTheValueForFewSeconds) {
  for (uint32_t seed = 0; seed < 30; ++seed) {
    const Heads heads = RandomHeads(seed);
    const std::vector<TradeOffPoint> curve = TradeOffCurve(heads);
    for (const TradeOffPoint& point : curve) {
      LF_ASSERT_OK_AND_ASSIGN(const PatternChoice choice,
                              ChoosePatterns(heads, {.least_value = point.mean_value - 1e-9}));
      EXPECT_GE(choice.reached.mean_value, point.mean_value - 1e-9);
      EXPECT_LE(choice.reached.seconds, point.seconds + 1e-9);
    }
  }
}

TEST(PatternSolver, UsesWhatIsLeftOffTheHull) {
  // The step of head 0 does not fit; its option below the hull does.
  const Heads heads = {{{1, 0}, {2, 0.1}, {5, 1}}, {{1, 0.5}}};
  LF_ASSERT_OK_AND_ASSIGN(const PatternChoice choice, ChoosePatterns(heads, {.most_seconds = 4}));
  EXPECT_EQ(choice.options, (std::vector<size_t>{1, 0}));
  EXPECT_DOUBLE_EQ(choice.reached.seconds, 3);
  EXPECT_DOUBLE_EQ(choice.reached.mean_value, 0.3);
}

TEST(PatternSolver, EqualGainsGoToTheLowerHead) {
  const Heads heads(3, {{1, 0}, {2, 0.5}});
  LF_ASSERT_OK_AND_ASSIGN(const PatternChoice choice, ChoosePatterns(heads, {.most_seconds = 5}));
  EXPECT_EQ(choice.options, (std::vector<size_t>{1, 1, 0}));
}

TEST(PatternSolver, TargetsOutOfReachNameBothNumbers) {
  const Heads heads = {{{2, 0.5}, {3, 0.75}}};
  EXPECT_THAT(ChoosePatterns(heads, {.most_seconds = 1.5}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("take 2 s, and the target is 1.5 s")));
  EXPECT_THAT(ChoosePatterns(heads, {.least_value = 0.8}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("reach 0.75, and the target is 0.8")));
}

}  // namespace
}  // namespace longfill
