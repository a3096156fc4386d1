#include <numeric>

#include "tests/contract/selection_chain.h"
#include "tests/testing/sanitized.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

class LastQueryTest : public SelectionChainTest {
 protected:
  ChainScores Run(const SelectionPrompt& prompt, const Deal& deal, std::span<const int32_t> heads,
                  int64_t row_gap = 0) {
    std::vector<Rank> ranks = MakeRanks(prompt, deal, heads, row_gap);
    ChainScores scores;
    ScoreOn(ranks, &scores);
    CollectScores(ranks, prompt, &scores);
    JoinWindows(ranks, prompt, &scores);
    return scores;
  }

  // Slash scores from the windows alone: each distance has at most two parts, so the order does not matter.
  void JoinWindows(const std::vector<Rank>& ranks, const SelectionPrompt& prompt, ChainScores* scores) {
    const int64_t n = prompt.shape.num_tokens;
    std::fill(scores->slash.begin(), scores->slash.end(), 0.0F);
    for (const Rank& rank : ranks) {
      const int64_t blocks = BlocksOf(rank.num_keys);
      const auto num_lists = static_cast<int64_t>(rank.params.heads.size());
      const std::vector<float> windows =
          Download<float>(rank.slash.data(), num_lists * blocks * kDiagonalWindow);
      for (int64_t i = 0; i < num_lists * blocks * kDiagonalWindow; ++i) {
        const int64_t block = i / kDiagonalWindow;
        const int64_t first_key = rank.positions.Position(block % blocks * kSelectionBlock);
        const int64_t distance = prompt.last_query() - first_key - i % kDiagonalWindow;
        if (distance >= 0) {
          scores->slash[block / blocks * n + distance] += windows[i];
        } else {
          EXPECT_EQ(windows[i], 0.0F) << "distance " << distance;
        }
      }
    }
  }

  void CheckAgainstDefinition(const SelectionShape& shape, std::span<const int32_t> heads);
};
LF_INSTANTIATE_BACKENDS(LastQueryTest);

std::vector<int32_t> AllHeads(int64_t count) {
  std::vector<int32_t> heads(static_cast<size_t>(count));
  std::iota(heads.begin(), heads.end(), 0);
  return heads;
}

// One head of the definition in fp64.
struct ExactScores {
  std::vector<double> row_max, row_sum;  // [num_queries]
  std::vector<double> vertical, slash;   // [num_tokens]
  double score_error = 0;                // bound of an fp32 score's
};

ExactScores Exact(const SelectionPrompt& prompt, int64_t head) {
  const int64_t n = prompt.shape.num_tokens;
  const int64_t dim = prompt.shape.head_dim;
  const float* k = prompt.k.data() + head / prompt.q_per_kv() * n * dim;
  ExactScores exact;
  exact.vertical.assign(static_cast<size_t>(n), 0);
  exact.slash.assign(static_cast<size_t>(n), 0);
  double largest_magnitude = 0;
  for (int64_t i = 0; i < prompt.num_queries; ++i) {
    const float* q = prompt.q.data() + (head * prompt.num_queries + i) * dim;
    const int64_t position = prompt.first_query + i;
    std::vector<double> p(static_cast<size_t>(position + 1));
    for (int64_t key = 0; key <= position; ++key) {
      double sum = 0, magnitude = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const double product = static_cast<double>(q[d]) * static_cast<double>(k[key * dim + d]);
        sum += product;
        magnitude += std::abs(product);
      }
      p[key] = sum * prompt.scale;
      largest_magnitude = std::max(largest_magnitude, magnitude);
    }
    const double max = *std::max_element(p.begin(), p.end());
    double sum = 0;
    for (double& value : p) sum += value = std::exp(value - max);
    exact.row_max.push_back(max);
    exact.row_sum.push_back(sum);
    for (int64_t key = 0; key <= position; ++key) {
      exact.vertical[key] += p[key] / sum;
      exact.slash[prompt.last_query() - key - (prompt.num_queries - 1 - i)] += p[key] / sum;
    }
  }
  // Tensor cores cut sums off after every eight products; and a score is scaled and has its maximum taken
  // off.
  exact.score_error = largest_magnitude * prompt.scale * 0x1p-23 * (static_cast<double>(dim) / 8 + 3);
  return exact;
}

void LastQueryTest::CheckAgainstDefinition(const SelectionShape& shape, std::span<const int32_t> heads) {
  SCOPED_TRACE(testing::Message() << shape.num_tokens << " tokens, " << shape.num_q_heads << " on "
                                  << shape.num_kv_heads << " heads of " << shape.head_dim);
  const SelectionPrompt prompt = MakePrompt(shape);
  const ChainScores got = Run(prompt, OnePiece(), heads, 8);
  for (size_t list = 0; list < heads.size(); ++list) {
    SCOPED_TRACE(testing::Message() << "head " << heads[list]);
    const ExactScores want = Exact(prompt, heads[list]);
    const double probability_error = 2 * want.score_error + 1e-5;
    for (size_t i = 0; i < kMaxSelectingQueries; ++i) {
      const size_t place = list * kMaxSelectingQueries + i;
      if (i >= want.row_max.size()) {
        EXPECT_EQ(got.row_max[place], -std::numeric_limits<float>::infinity()) << "query " << i;
        EXPECT_EQ(got.row_sum[place], 0U) << "query " << i;
        continue;
      }
      ASSERT_NEAR(got.row_max[place], want.row_max[i], want.score_error) << "query " << i;
      ASSERT_NEAR(static_cast<double>(got.row_sum[place]) * 0x1p-40, want.row_sum[i],
                  want.row_sum[i] * probability_error + static_cast<double>(shape.num_tokens) * 0x1p-41)
          << "query " << i;
    }
    const auto n = static_cast<size_t>(shape.num_tokens);
    for (size_t i = 0; i < n; ++i) {
      ASSERT_NEAR(got.vertical[list * n + i], want.vertical[i], want.vertical[i] * probability_error + 1e-30)
          << "key " << i;
      if (i > static_cast<size_t>(prompt.last_query())) continue;
      ASSERT_NEAR(got.slash[list * n + i], want.slash[i], want.slash[i] * probability_error + 1e-30)
          << "distance " << i;
    }
  }
}

TEST_P(LastQueryTest, MatchesTheDefinitionAtEveryLength) {
  for (const int64_t n : {1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, 1000}) {
    CheckAgainstDefinition({.num_tokens = n, .num_q_heads = 2, .num_kv_heads = 2, .head_dim = 64},
                           AllHeads(2));
  }
}

TEST_P(LastQueryTest, MatchesTheDefinitionForEveryHeadDim) {
  for (const int64_t dim : {64, 96, 128, 256}) {
    for (const int64_t n : {50, 700}) {
      CheckAgainstDefinition({.num_tokens = n, .num_q_heads = 4, .num_kv_heads = 1, .head_dim = dim},
                             AllHeads(4));
      CheckAgainstDefinition({.num_tokens = n, .num_q_heads = 2, .num_kv_heads = 2, .head_dim = dim},
                             AllHeads(2));
    }
  }
}

TEST_P(LastQueryTest, TakesAnyGroupOfQueryHeads) {
  for (const auto& [num_q_heads, num_kv_heads] : {std::pair{3, 1}, {5, 1}, {7, 1}, {8, 2}, {14, 2}, {6, 6}}) {
    CheckAgainstDefinition({.num_tokens = 300, .num_q_heads = num_q_heads, .num_kv_heads = num_kv_heads},
                           AllHeads(num_q_heads));
  }
  // Some heads only, in any order.
  const SelectionShape shape = {.num_tokens = 300, .num_q_heads = 14, .num_kv_heads = 2, .head_dim = 128};
  CheckAgainstDefinition(shape, std::vector<int32_t>{13, 0, 6, 7});
  CheckAgainstDefinition(shape, std::vector<int32_t>{12});
}

TEST_P(LastQueryTest, MatchesTheDefinitionWhereAttentionIsSharp) {
  CheckAgainstDefinition({.num_tokens = 1500, .head_dim = 128, .query_stddev = 8}, AllHeads(1));
}

TEST_P(LastQueryTest, KeysBehindTheQueriesCountNothing) {
  for (const int64_t after : {1, 64, 200}) {
    CheckAgainstDefinition({.num_tokens = 500, .head_dim = 128, .tokens_after = after}, AllHeads(1));
  }
  CheckAgainstDefinition({.num_tokens = 500, .head_dim = 256, .tokens_after = 470},
                         AllHeads(1));  // 30 queries
}

TEST_P(LastQueryTest, SameBitsHoweverKeysAreDealt) {
  for (const int64_t dim : {64, 96, 128, 256}) {
    for (const int64_t n : {1, 127, 129, 1000, 4111}) {
      if (kSanitized && n > 1000) continue;
      SCOPED_TRACE(testing::Message() << n << " tokens, head dim " << dim);
      const SelectionPrompt prompt =
          MakePrompt({.num_tokens = n, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = dim});
      const std::vector<int32_t> heads = AllHeads(4);
      const ChainScores one = Run(prompt, OnePiece(), heads);
      for (const int64_t ranks : {1, 2, 3, 4}) {
        EXPECT_TRUE(Run(prompt, ThereAndBack(ranks), heads) == one) << ranks << " ranks";
      }
      EXPECT_TRUE(Run(prompt, ThereAndBack(2, 384), heads) == one) << "blocks of 384";
      EXPECT_TRUE(Run(prompt, OnePiece(), heads, 8) == one) << "rows apart";
    }
  }
}

TEST_P(LastQueryTest, SameBitsWhicheverHeadsAreInTheCall) {
  for (const int64_t dim : {64, 128, 256}) {
    const int64_t n = 1000;
    const SelectionPrompt prompt =
        MakePrompt({.num_tokens = n, .num_q_heads = 8, .num_kv_heads = 2, .head_dim = dim});
    const ChainScores all = Run(prompt, OnePiece(), AllHeads(8));
    for (const std::vector<int32_t>& heads : {std::vector<int32_t>{3}, {3, 2}, {6, 3, 4}, {7, 6, 5, 4, 3}}) {
      const ChainScores some = Run(prompt, OnePiece(), heads);
      for (size_t list = 0; list < heads.size(); ++list) {
        const auto head = static_cast<size_t>(heads[list]);
        const auto equal = [&](const auto& a, const auto& b, size_t size) {
          return std::equal(a.begin() + list * size, a.begin() + (list + 1) * size, b.begin() + head * size);
        };
        EXPECT_TRUE(equal(some.row_max, all.row_max, 64)) << "head " << head << " of " << heads.size();
        EXPECT_TRUE(equal(some.row_sum, all.row_sum, 64)) << "head " << head << " of " << heads.size();
        EXPECT_TRUE(equal(some.vertical, all.vertical, n)) << "head " << head << " of " << heads.size();
        EXPECT_TRUE(equal(some.slash, all.slash, n)) << "head " << head << " of " << heads.size();
      }
    }
  }
}

TEST_P(LastQueryTest, ReachesKeysBehind32BitOffsets) {
  if (!on_gpu()) GTEST_SKIP() << "takes 4 GiB";
  const SelectionPrompt prompt =
      MakePrompt({.num_tokens = 1000, .num_q_heads = 2, .num_kv_heads = 2, .head_dim = 128});
  const std::vector<int32_t> heads = AllHeads(2);
  const ChainScores want = Run(prompt, OnePiece(), heads);
  std::vector<Rank> ranks = MakeRanks(prompt, OnePiece(), heads);
  LastQueryParams& params = ranks[0].params;
  const int64_t head_bytes = 2 * 1000 * 128;
  const int64_t far_bytes = 2 * ((int64_t{1} << 31) + 8);
  LF_ASSERT_OK_AND_ASSIGN(const Buffer far, backend().memory().Allocate(far_bytes + head_bytes, "far keys"));
  for (int64_t head = 0; head < 2; ++head) {
    const auto keys = Download<uint8_t>(ranks[0].k.as<uint8_t>() + head * head_bytes, head_bytes);
    LF_ASSERT_OK(kernels().CopyIn(far.as<uint8_t>() + head * far_bytes, keys.data(), head_bytes, stream()));
  }
  params.k = {far.data(), far_bytes / 2, 128};
  ChainScores got;
  ScoreOn(ranks, &got);
  CollectScores(ranks, prompt, &got);
  JoinWindows(ranks, prompt, &got);
  EXPECT_TRUE(got == want);
}

TEST_P(LastQueryTest, SaysWhatIsWrong) {
  const SelectionPrompt prompt = MakePrompt({.num_tokens = 300, .head_dim = 64});
  const std::vector<int32_t> heads = {0};
  std::vector<Rank> ranks = MakeRanks(prompt, OnePiece(), heads);
  const Buffer row_max = Bytes(64 * kFloat);
  const auto run = [&](const LastQueryParams& params, Workspace workspace) {
    return kernels().LastQueryRowMax(params, row_max.as<float>(), workspace, stream());
  };
  const auto invalid = [](const char* message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  LastQueryParams params = ranks[0].params;
  EXPECT_THAT(run(params, {ranks[0].workspace.data, 0}), invalid("workspace"));
  params.num_queries = 65;
  EXPECT_THAT(run(params, ranks[0].workspace), invalid("num_queries 65"));
  params = ranks[0].params;
  const std::vector<int32_t> wrong_heads = {1};
  params.heads = wrong_heads;
  EXPECT_THAT(run(params, ranks[0].workspace), invalid("query head 1 of 1"));
  params = ranks[0].params;
  params.key_positions = {.first = 64, .block = 128, .stride = 256};
  EXPECT_THAT(run(params, ranks[0].workspace), invalid("keys at first 64, block 128"));
  params = ranks[0].params;
  params.heads = {};
  LF_EXPECT_OK(run(params, {}));
  if (!on_gpu()) return;
  params = ranks[0].params;
  params.head_dim = 80;
  EXPECT_THAT(run(params, ranks[0].workspace),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("head_dim 80")));
}

}  // namespace
}  // namespace longfill
