#include "deploy/cli/attention_measurement.h"

#include <cmath>
#include <memory>
#include <utility>

#include "kernels/sparse/coverage.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

constexpr int64_t kTokens = 700;

AttentionCase CaseOf(const HeadPattern& pattern, std::vector<SparseIndex> indices) {
  return {.name = ToString(pattern),
          .num_tokens = kTokens,
          .head_dim = 32,
          .num_q_heads = 2,
          .num_kv_heads = 1,
          .patterns = std::vector<HeadPattern>(4, pattern),
          .indices = std::move(indices)};
}

class Measurement : public ::testing::Test {
 protected:
  absl::StatusOr<AttentionFigures> Measure(AttentionCase of) {
    return AttentionMeasurement::Run(*backend_, nullptr, threads_, scratch_, std::move(of),
                                     {.repeat = 2, .bit_runs = 2, .sample_rows = 400});
  }
  std::unique_ptr<Backend> backend_ = CreateCpuBackend(2);
  ThreadPool threads_{2};
  HostScratch scratch_{*backend_};
};

TEST_F(Measurement, CountsThePairsOfAllCallsAndChecksThem) {
  LF_ASSERT_OK_AND_ASSIGN(const AttentionFigures figures,
                          Measure(CaseOf(Dense{}, std::vector<SparseIndex>(4, MakeDenseIndex()))));
  EXPECT_EQ(figures.num_calls, 2);
  EXPECT_EQ(figures.pairs.covered, 4 * CausalPairs(kTokens));
  EXPECT_EQ(figures.pairs.published, figures.pairs.covered);
  EXPECT_GE(figures.computed_pairs, figures.pairs.covered);
  EXPECT_FALSE(figures.index_built);
  EXPECT_EQ(figures.check->rows, 400);
  EXPECT_EQ(figures.check->compared_heads, 4);
  EXPECT_TRUE(figures.check->Passed());
  EXPECT_GT(figures.check->max_error, 0);
  EXPECT_GT(figures.attention.median, 0);
}

TEST_F(Measurement, TakesWhatIsBuiltWhereNothingIsGiven) {
  LF_ASSERT_OK_AND_ASSIGN(const AttentionFigures figures, Measure(CaseOf(VerticalSlash{40, 60}, {})));
  EXPECT_TRUE(figures.index_built);
  EXPECT_TRUE(figures.check->Passed());
  EXPECT_LT(figures.pairs.covered, 4 * CausalPairs(kTokens));
  EXPECT_NEAR(figures.sum.least, figures.index.least + figures.attention.least, 1e-2);
}

TEST(AttentionChecks, FailOnWhatIsWrong) {
  const AttentionCheck right = {.rows = 4,
                                .max_error = 0.003,
                                .naive_max_error = 0.002,
                                .square_sum = 4e-6,
                                .naive_square_sum = 4e-6,
                                .lse_error = 1e-6,
                                .lse_limit = 1e-5,
                                .generic_difference = 0.004};
  EXPECT_TRUE(right.Passed());
  const auto fails = [&right](const auto& change) {
    AttentionCheck wrong = right;
    change(wrong);
    return !wrong.Passed();
  };
  EXPECT_TRUE(fails([](AttentionCheck& check) { check.max_error = 0.0041; }));
  EXPECT_TRUE(fails([](AttentionCheck& check) { check.max_error = std::nan(""); }));
  EXPECT_TRUE(fails([](AttentionCheck& check) { check.square_sum = 17e-6; }));
  EXPECT_TRUE(fails([](AttentionCheck& check) { check.lse_error = 1e-4; }));
  EXPECT_TRUE(fails([](AttentionCheck& check) { check.bits_equal = false; }));
  EXPECT_TRUE(fails([](AttentionCheck& check) { check.pairs_equal = false; }));
  EXPECT_TRUE(fails([](AttentionCheck& check) { check.generic_difference = 0.0081; }));
}

TEST_F(Measurement, NoticesResultsThatAreNotThose) {
  constexpr int64_t kDim = 8;
  std::vector<float> q(kTokens * kDim, 0.5F), k = q, v = q, out = q, lse(kTokens);
  for (int64_t row = 0; row < kTokens; ++row)
    lse[row] = std::log(static_cast<float>(row + 1)) + 2 / std::sqrt(8.0F);
  const SparseIndex index = MakeDenseIndex();
  const PackedIndices packed({&index, 1});
  AttentionChecker checker(*backend_, threads_, scratch_,
                           {.num_tokens = kTokens,
                            .head_dim = kDim,
                            .num_q_heads = 1,
                            .num_kv_heads = 1,
                            .q = q.data(),
                            .k = k.data(),
                            .v = v.data(),
                            .out = out.data(),
                            .lse = lse.data()});
  const auto check = [&] {
    AttentionCheck found;
    EXPECT_TRUE(checker.CheckRows(packed.Views(packed.data()), kTokens, 1, &found).ok());
    return found;
  };
  EXPECT_TRUE(check().Passed());
  LF_ASSERT_OK(checker.KeepResults());
  LF_ASSERT_OK_AND_ASSIGN(bool kept, checker.ResultsAreKept());
  EXPECT_TRUE(kept);

  out[350 * kDim + 3] += 0.01F;
  EXPECT_FALSE(check().Passed());
  LF_ASSERT_OK_AND_ASSIGN(kept, checker.ResultsAreKept());
  EXPECT_FALSE(kept);
  LF_ASSERT_OK_AND_ASSIGN(const double difference, checker.LargestRowDifference());
  EXPECT_NEAR(difference, 0.01 / (0.5 * std::sqrt(8.0)), 1e-4);

  out[350 * kDim + 3] = 0.5F;
  lse[10] = std::nanf("");
  EXPECT_FALSE(check().Passed());
}

}  // namespace
}  // namespace longfill
