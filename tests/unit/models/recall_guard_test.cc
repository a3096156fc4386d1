// What is sampled, and how budgets grow.

#include "models/recall_guard.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/sparse/coverage.h"
#include "parallel/recall_monitor.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::HasSubstr;

constexpr int64_t kTokens = 100000;

TEST(RecallOptions, LeastRecallIsInItsRangeOrRefusedWithItsValue) {
  for (const double value : {0.0, 1e-9, 0.5, 1.0}) LF_EXPECT_OK(Validate(RecallOptions{false, value}));
  for (const double value : {-0.25, 1.5, std::numeric_limits<double>::infinity()}) {
    EXPECT_THAT(Validate(RecallOptions{true, value}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(absl::StrCat("min_recall ", value))));
  }
  EXPECT_THAT(Validate(RecallOptions{true, std::nan("")}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("nan")));
}

TEST(WidenedPattern, MultipliesBudgets) {
  EXPECT_EQ(WidenedPattern(VerticalSlash{1000, 6096}, 2, 0, kTokens),
            HeadPattern(VerticalSlash{2000, 12192}));
  EXPECT_EQ(WidenedPattern(AShape{128, 1024}, 4, 0, kTokens), HeadPattern(AShape{128, 4096}));
  EXPECT_EQ(WidenedPattern(BlockSparse{100}, 4, 0, kTokens), HeadPattern(BlockSparse{400}));
  EXPECT_EQ(WidenedPattern(BlockShare{4, 0.25}, 2, 0, kTokens), HeadPattern(BlockShare{4, 0.125}));
  EXPECT_EQ(WidenedPattern(BlockShare{4, 0.25, 8}, 2, 0, kTokens), HeadPattern(BlockShare{4, 0.125, 8}));
  EXPECT_EQ(WidenedPattern(BlockShare{4, 0.25, 0, 8}, 2, 0, kTokens),
            HeadPattern(BlockShare{4, 0.125, 0, 8}));
  EXPECT_EQ(WidenedPattern(BlockShare{4, 0.25, 8, 4, true}, 2, 0, kTokens),
            HeadPattern(BlockShare{4, 0.125, 8, 4, true}));
  EXPECT_EQ(WidenedPattern(Dense{}, 2, 0, kTokens), HeadPattern(Dense{}));
}

// Budgets below what is selected at the least would not grow otherwise.
TEST(WidenedPattern, MultipliesWhatIsSelectedAtTheLeast) {
  EXPECT_EQ(WidenedPattern(VerticalSlash{1, 1}, 2, 0, kTokens), HeadPattern(VerticalSlash{60, 100}));
}

TEST(WidenedPattern, IsDenseWhereABudgetReachesThePrompt) {
  EXPECT_EQ(WidenedPattern(VerticalSlash{50000, 60}, 2, 0, kTokens), HeadPattern(Dense{}));
  EXPECT_EQ(WidenedPattern(VerticalSlash{49999, 60}, 2, 0, kTokens), HeadPattern(VerticalSlash{99998, 120}));
  EXPECT_EQ(WidenedPattern(AShape{0, 25000}, 4, 0, kTokens), HeadPattern(Dense{}));
  EXPECT_EQ(WidenedPattern(BlockSparse{800}, 2, 0, kTokens), HeadPattern(Dense{}));
  // Products that would not fit are not formed.
  EXPECT_EQ(WidenedPattern(AShape{0, std::numeric_limits<int64_t>::max() / 2}, 4, 0, kTokens),
            HeadPattern(Dense{}));
}

TEST(WidenedPattern, StaysWithinTheWindow) {
  EXPECT_EQ(WidenedPattern(AShape{0, 100}, 2, 4096, kTokens), HeadPattern(AShape{0, 200}));
  EXPECT_EQ(WidenedPattern(AShape{0, 3000}, 2, 4096, kTokens), HeadPattern(AShape{0, 4096}));
  EXPECT_EQ(SeesAllPattern(4096, kTokens), HeadPattern(AShape{0, 4096}));
  EXPECT_EQ(SeesAllPattern(0, kTokens), HeadPattern(Dense{}));
}

TEST(SeesAllKeys, ByPatternOrByCount) {
  EXPECT_TRUE(SeesAllKeys(Dense{}, {}, 0, 10));
  EXPECT_TRUE(SeesAllKeys(AShape{0, 4096}, {}, 4096, kTokens));
  EXPECT_TRUE(SeesAllKeys(VerticalSlash{10, 10}, {.covered = CausalPairs(10)}, 0, 10));
  EXPECT_FALSE(SeesAllKeys(VerticalSlash{10, 10}, {.covered = CausalPairs(10) - 1}, 0, 10));
}

TEST(SampledPositions, SpreadOverThePromptAndItsEnd) {
  for (const auto& [q_per_kv, count] :
       {std::pair(1, 16), std::pair(4, 16), std::pair(7, 9), std::pair(16, 8)}) {
    const std::vector<int64_t> rows = SampledPositions(kTokens, q_per_kv);
    ASSERT_EQ(static_cast<int64_t>(rows.size()), count);
    EXPECT_TRUE(std::ranges::is_sorted(rows));
    EXPECT_GE(rows.front(), 0);
    EXPECT_EQ(rows.back(), kTokens - 1);
    const int64_t last = count / 4;
    const int64_t parts = count - last;
    EXPECT_GE(std::ranges::count_if(rows, [](int64_t row) { return row >= kTokens - 64; }), last);
    for (int64_t part = 0; part < parts; ++part) {
      EXPECT_TRUE(std::ranges::any_of(rows, [&](int64_t row) { return row * parts / kTokens == part; }))
          << "part " << part;
    }
  }
  EXPECT_TRUE(SampledPositions(0, 4).empty());
  EXPECT_EQ(SampledPositions(1, 4), std::vector<int64_t>{0});
}

// One row tile for each KV head, over all keys: what the monitor costs is known beforehand.
TEST(RecallMonitor, CostsOnePassOfOneTileOverTheKeys) {
  const AttentionGeometry llama{.num_q_heads = 32, .num_kv_heads = 8, .head_dim = 128, .scale = 0.1F};
  EXPECT_EQ(RecallMonitor::ComputedPairs(llama, 131072, 0), int64_t{64} * 131072 * 8);
  const double sparse = 0.1 * static_cast<double>(CausalPairs(131072)) * 32;
  EXPECT_LT(static_cast<double>(RecallMonitor::ComputedPairs(llama, 131072, 0)) / sparse, 0.02);
  // Windows: no more than the keys that the rows see.
  EXPECT_LE(RecallMonitor::ComputedPairs(llama, 131072, 4096), int64_t{64} * 16 * 4096 * 8);
}

}  // namespace
}  // namespace longfill
