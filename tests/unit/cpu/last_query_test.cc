#include <array>
#include <map>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/unit/cpu/cpu_test_util.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kDim = 40;
constexpr int64_t kQHeads = 4;
constexpr int64_t kKvHeads = 2;

// Keys of a prompt and its selecting queries.
struct Prompt {
  explicit Prompt(int64_t n, int64_t after = 0)
      : num_tokens(n),
        num_queries(std::min<int64_t>(64, n - after)),
        first_query(n - after - num_queries),
        q(RandomFloats(kQHeads * n * kDim, 1)),
        k(RandomFloats(kKvHeads * n * kDim, 2)),
        scale(1 / std::sqrt(static_cast<double>(kDim))) {}
  int64_t num_tokens, num_queries, first_query;
  std::vector<float> q, k;  // [heads, num_tokens, kDim]
  double scale;
};

// One deal of the keys: a map for each rank.
using Deal = std::vector<PositionMap>;
Deal ThereAndBack(int64_t ranks, int64_t block) {
  Deal deal;
  for (int64_t p = 0; p < ranks; ++p) {
    deal.push_back({p * block, block, ranks * block, (ranks - 1 - 2 * p) * block});
  }
  return deal;
}

// Scores in global order, joined over the ranks as a caller does it.
struct Scores {
  std::vector<float> row_max;     // [heads, 64]
  std::vector<uint64_t> row_sum;  // [heads, 64]
  std::vector<float> vertical;    // [heads, num_tokens]
  std::vector<float> slash;       // [heads, SlashSize], by distance + SlashZero
};
int64_t SlashZero(int64_t num_tokens) { return num_tokens + kDiagonalWindow; }
int64_t SlashSize(int64_t num_tokens) { return 2 * SlashZero(num_tokens); }

constexpr std::array<int32_t, 3> kHeads = {3, 0, 2};

Scores Compute(CpuBackend& backend, const Prompt& prompt, const Deal& deal, int64_t row_gap) {
  struct Rank {
    StridedHeads k;
    int64_t num_keys;
    LastQueryParams params;
  };
  const size_t lists = kHeads.size() * 64;
  std::vector<float> last;
  for (int64_t h = 0; h < kQHeads; ++h) {
    const auto from = prompt.q.begin() + (h * prompt.num_tokens + prompt.first_query) * kDim;
    last.insert(last.end(), from, from + prompt.num_queries * kDim);
  }
  const StridedHeads q(last.data(), kQHeads, prompt.num_queries, kDim, row_gap, 2);
  std::vector<Rank> ranks;
  for (const PositionMap& map : deal) {
    const int64_t num_keys = map.RowsBelow(prompt.num_tokens);
    std::vector<float> k;
    for (int64_t h = 0; h < kKvHeads; ++h) {
      for (int64_t r = 0; r < num_keys; ++r) {
        const auto from = prompt.k.begin() + (h * prompt.num_tokens + map.Position(r)) * kDim;
        k.insert(k.end(), from, from + kDim);
      }
    }
    ranks.push_back({StridedHeads(k.data(), kKvHeads, num_keys, kDim, row_gap, 3), num_keys, {}});
  }
  const Workspace workspace =
      backend.WorkspaceOf(backend.kernels().LastQueryWorkspaceBytes(kHeads.size(), prompt.num_tokens, kDim));
  Scores scores;
  scores.row_max.assign(lists, -kTestInfinity);
  scores.row_sum.assign(lists, 0);
  for (size_t p = 0; p < ranks.size(); ++p) {
    LastQueryParams& params = ranks[p].params;
    params.q = q.view();
    params.num_queries = prompt.num_queries;
    params.first_query_position = prompt.first_query;
    params.k = ranks[p].k.view();
    params.num_keys = ranks[p].num_keys;
    params.key_positions = deal[p];
    params.heads = kHeads;
    params.num_q_heads = kQHeads;
    params.num_kv_heads = kKvHeads;
    params.head_dim = kDim;
    params.scale = static_cast<float>(prompt.scale);
    std::vector<float> row_max(lists, 5.0F);
    EXPECT_THAT(backend.kernels().LastQueryRowMax(params, row_max.data(), workspace, backend.stream()),
                IsOk());
    for (size_t i = 0; i < lists; ++i) scores.row_max[i] = std::max(scores.row_max[i], row_max[i]);
  }
  for (Rank& rank : ranks) {
    std::vector<uint64_t> row_sum(lists, 5);
    EXPECT_THAT(backend.kernels().LastQueryRowSum(rank.params, scores.row_max.data(), row_sum.data(),
                                                  workspace, backend.stream()),
                IsOk());
    for (size_t i = 0; i < lists; ++i) scores.row_sum[i] += row_sum[i];
  }
  const int64_t slash_size = SlashSize(prompt.num_tokens);
  scores.vertical.assign(kHeads.size() * prompt.num_tokens, 0.0F);
  scores.slash.assign(kHeads.size() * slash_size, 0.0F);
  for (size_t p = 0; p < ranks.size(); ++p) {
    const int64_t num_keys = ranks[p].num_keys;
    const int64_t blocks = (num_keys + 127) / 128;
    const int64_t stride = num_keys + 3;
    std::vector<float> vertical(kHeads.size() * stride, 9.0F);
    std::vector<float> slash(kHeads.size() * blocks * kDiagonalWindow + 1, 9.0F);
    EXPECT_THAT(backend.kernels().LastQueryScore(
                    ranks[p].params, scores.row_max.data(), scores.row_sum.data(),
                    {vertical.data(), stride, slash.data()}, workspace, backend.stream()),
                IsOk());
    EXPECT_EQ(slash.back(), 9.0F) << "written beyond the end";
    const int64_t last_query = prompt.first_query + prompt.num_queries - 1;
    for (int64_t list = 0; list < static_cast<int64_t>(kHeads.size()); ++list) {
      for (int64_t r = 0; r < num_keys; ++r) {
        scores.vertical[list * prompt.num_tokens + deal[p].Position(r)] = vertical[list * stride + r];
      }
      for (int64_t r = num_keys; r < stride; ++r) {
        EXPECT_EQ(vertical[list * stride + r], 9.0F) << "written beyond the end";
      }
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t kb = deal[p].Position(b * 128);
        for (int64_t e = 0; e < kDiagonalWindow; ++e) {
          const int64_t distance = last_query - kb - e;
          scores.slash[list * slash_size + distance + SlashZero(prompt.num_tokens)] +=
              slash[(list * blocks + b) * kDiagonalWindow + e];
        }
      }
    }
  }
  return scores;
}

class LastQueryTest : public TargetTest {};
LF_INSTANTIATE_TARGETS(LastQueryTest);

TEST_P(LastQueryTest, ScoresMatchTheOracle) {
  CpuBackend backend(2);
  for (int64_t n : {1, 2, 63, 64, 65, 127, 128, 129, 331, 1500}) {
    SCOPED_TRACE(n);
    const Prompt prompt(n);
    const Scores got = Compute(backend, prompt, {PositionMap::Contiguous(0)}, 0);
    for (size_t list = 0; list < kHeads.size(); ++list) {
      const int64_t head = kHeads[list];
      const oracle::VerticalSlashSelection want = oracle::SelectVerticalSlash(
          prompt.q.data() + head * n * kDim, prompt.k.data() + head / 2 * n * kDim, n, kDim, prompt.scale,
          {1000, 1000});
      const auto vertical = got.vertical.begin() + list * n;
      EXPECT_TRUE(Near(std::vector<float>(vertical, vertical + n), want.vertical_scores, 2e-5));
      const auto slash = got.slash.begin() + list * SlashSize(n);
      const auto zero = slash + SlashZero(n);
      EXPECT_TRUE(Near(std::vector<float>(zero, zero + n), want.slash_scores, 2e-5));
      for (auto entry = slash; entry != zero; ++entry) ASSERT_EQ(*entry, 0.0F) << "negative distance";
    }
  }
}

TEST_P(LastQueryTest, MaximaAndSumsMatchTheDefinition) {
  CpuBackend backend(1);
  const Prompt prompt(331);
  const Scores got = Compute(backend, prompt, {PositionMap::Contiguous(0)}, 0);
  for (size_t list = 0; list < kHeads.size(); ++list) {
    const int64_t head = kHeads[list];
    for (int64_t i = 0; i < 64; ++i) {
      std::vector<double> s;
      for (int64_t j = 0; j <= prompt.first_query + i; ++j) {
        double dot = 0;
        for (int64_t d = 0; d < kDim; ++d) {
          dot += double{prompt.q[(head * 331 + prompt.first_query + i) * kDim + d]} *
                 prompt.k[(head / 2 * 331 + j) * kDim + d];
        }
        s.push_back(dot * prompt.scale);
      }
      const double max = *std::max_element(s.begin(), s.end());
      ASSERT_NEAR(got.row_max[list * 64 + i], max, 4e-6);
      double sum = 0;
      for (double value : s) sum += std::exp(value - max);
      ASSERT_NEAR(static_cast<double>(got.row_sum[list * 64 + i]) * 0x1p-40, sum, 2e-5 * sum);
    }
  }
}

TEST_P(LastQueryTest, BitsAreTheSameForEveryDealStrideAndThreadCount) {
  for (int64_t n : {331, 1409}) {
    const Prompt prompt(n);
    CpuBackend one(1);
    const Scores want = Compute(one, prompt, {PositionMap::Contiguous(0)}, 0);
    for (int threads : {1, 2, 3}) {
      CpuBackend backend(threads);
      for (const Deal& deal :
           {ThereAndBack(1, 128), ThereAndBack(2, 128), ThereAndBack(3, 128), ThereAndBack(2, 256),
            ThereAndBack(16, 128), Deal{{0, 256, 1 << 20}, PositionMap::Contiguous(256)}}) {
        SCOPED_TRACE(testing::Message() << n << " tokens, " << threads << " threads, " << deal.size()
                                        << " ranks of blocks of " << deal[0].block);
        Deal clipped = deal;
        if (deal[0].stride == 1 << 20) clipped[0].block = 256;
        Scores got = Compute(backend, prompt, clipped, 1);
        EXPECT_TRUE(SameBits(got.row_max, want.row_max));
        EXPECT_TRUE(SameBits(got.row_sum, want.row_sum));
        EXPECT_TRUE(SameBits(got.vertical, want.vertical));
        EXPECT_TRUE(SameBits(got.slash, want.slash));
      }
    }
  }
}

TEST_P(LastQueryTest, KeysAfterAQueryDoNotCount) {
  CpuBackend backend(1);
  // Selecting queries in mid-prompt: 200 keys follow them.
  const Prompt prompt(600, 200);
  const Scores got = Compute(backend, prompt, {PositionMap::Contiguous(0)}, 0);
  for (size_t list = 0; list < kHeads.size(); ++list) {
    double total = 0;
    for (int64_t j = 0; j < 600; ++j) {
      const float value = got.vertical[list * 600 + j];
      ASSERT_TRUE(j < 400 || value == 0.0F) << j;
      total += value;
    }
    EXPECT_NEAR(total, 64.0, 1e-4);
  }
}

TEST_P(LastQueryTest, ARankWithoutVisibleKeysContributesNothing) {
  CpuBackend backend(1);
  const Prompt prompt(600, 200);
  const Scores got =
      Compute(backend, prompt, {PositionMap{0, 512, 1 << 20}, PositionMap::Contiguous(512)}, 0);
  const Scores want = Compute(backend, prompt, {PositionMap::Contiguous(0)}, 0);
  EXPECT_TRUE(SameBits(got.row_max, want.row_max));
  EXPECT_TRUE(SameBits(got.row_sum, want.row_sum));
  EXPECT_TRUE(SameBits(got.vertical, want.vertical));
  EXPECT_TRUE(SameBits(got.slash, want.slash));
}

TEST(LastQueryBits, AreTheSameOnEveryTargetWithFusedMultiplyAdd) {
  const Prompt prompt(700);
  CpuBackend backend(1);
  std::map<bool, Scores> first;  // by whether the target has FMA
  for (int64_t target : TestTargets()) {
    const ScopedTarget scoped(target);
    Scores got = Compute(backend, prompt, {PositionMap::Contiguous(0)}, 0);
    const auto [place, inserted] = first.try_emplace(HasFma(target), std::move(got));
    if (inserted) continue;
    got = Compute(backend, prompt, {PositionMap::Contiguous(0)}, 0);
    SCOPED_TRACE(hwy::TargetName(target));
    EXPECT_TRUE(SameBits(got.row_max, place->second.row_max));
    EXPECT_TRUE(SameBits(got.row_sum, place->second.row_sum));
    EXPECT_TRUE(SameBits(got.vertical, place->second.vertical));
    EXPECT_TRUE(SameBits(got.slash, place->second.slash));
  }
}

TEST(LastQueryErrors, NameWhatIsWrong) {
  CpuBackend backend(1);
  std::vector<float> data(64 * 64), row_max(64);
  const std::vector<int32_t> heads = {0};
  LastQueryParams good;
  good.q = good.k = {data.data(), 0, 8};
  good.num_queries = 1;
  good.num_keys = 4;
  good.heads = heads;
  good.num_q_heads = good.num_kv_heads = 1;
  good.head_dim = 8;
  const Workspace workspace = backend.WorkspaceOf(backend.kernels().LastQueryWorkspaceBytes(1, 4, 8));
  const auto run = [&](const LastQueryParams& params) {
    return backend.kernels().LastQueryRowMax(params, row_max.data(), workspace, backend.stream());
  };
  LF_EXPECT_OK(run(good));
  LastQueryParams params = good;
  params.num_queries = 65;
  EXPECT_THAT(run(params), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_queries 65")));
  params = good;
  params.key_positions = {64, 128, 256};
  EXPECT_THAT(run(params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("keys at first 64, block 128")));
  params = good;
  params.key_positions = {0, 2, 4};
  EXPECT_THAT(run(params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("keys at first 0, block 2")));
  params = good;
  params.head_dim = 12;
  EXPECT_THAT(run(params), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("head_dim 12")));
  params = good;
  params.num_keys = 0;
  LF_ASSERT_OK(run(params));
  EXPECT_EQ(row_max[0], -kTestInfinity);
  const std::vector<uint64_t> row_sum(64);
  EXPECT_THAT(backend.kernels().LastQueryScore(good, row_max.data(), row_sum.data(),
                                               {data.data(), 3, data.data()}, workspace, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("vertical_stride 3")));
}

}  // namespace
}  // namespace longfill
