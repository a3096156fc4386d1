#include "parallel/head_placement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

#include "tests/testing/sanitized.h"

namespace longfill {
namespace {

struct Score {
  int64_t max_load = 0;
  int64_t kv_copies = 0;
  // NOLINTNEXTLINE(modernize-use-nullptr): clang-tidy 14 takes the 0 in the generated code for a pointer
  auto operator<=>(const Score&) const = default;
};

Score ScoreOf(const std::vector<std::vector<int32_t>>& heads, const std::vector<int64_t>& cost,
              const std::vector<int32_t>& kv) {
  Score score;
  for (const auto& mine : heads) {
    int64_t load = 0;
    std::set<int32_t> kv_heads;
    for (const int32_t h : mine) {
      load += cost[h];
      kv_heads.insert(kv[h]);
    }
    score.max_load = std::max(score.max_load, load);
    score.kv_copies += static_cast<int64_t>(kv_heads.size());
  }
  return score;
}

Score BruteForce(const std::vector<int64_t>& cost, const std::vector<int32_t>& kv, int num_ranks) {
  Score best{INT64_MAX, INT64_MAX};
  std::vector<int> rank(cost.size(), 0);
  while (true) {
    std::vector<std::vector<int32_t>> heads(num_ranks);
    for (size_t h = 0; h < rank.size(); ++h) heads[rank[h]].push_back(static_cast<int32_t>(h));
    best = std::min(best, ScoreOf(heads, cost, kv));
    size_t h = 0;
    while (h < rank.size() && ++rank[h] == num_ranks) rank[h++] = 0;
    if (h == rank.size()) return best;
  }
}

void ExpectEveryHeadOnce(const HeadPlacement& placement, size_t num_heads) {
  std::vector<int32_t> all;
  for (const auto& heads : placement.heads) {
    EXPECT_TRUE(std::is_sorted(heads.begin(), heads.end()));
    all.insert(all.end(), heads.begin(), heads.end());
  }
  std::sort(all.begin(), all.end());
  ASSERT_EQ(all.size(), num_heads);
  for (size_t h = 0; h < num_heads; ++h) EXPECT_EQ(all[h], static_cast<int32_t>(h));
}

void ExpectBest(const std::vector<int64_t>& cost, const std::vector<int32_t>& kv, int num_ranks) {
  const HeadPlacement placement = PlaceHeads(cost, kv, num_ranks);
  ASSERT_EQ(placement.heads.size(), static_cast<size_t>(num_ranks));
  ExpectEveryHeadOnce(placement, cost.size());
  const Score got = ScoreOf(placement.heads, cost, kv);
  EXPECT_EQ(got, (Score{placement.max_load, placement.kv_copies}));
  const Score best = BruteForce(cost, kv, num_ranks);
  EXPECT_EQ(got.max_load, best.max_load);
  EXPECT_EQ(got.kv_copies, best.kv_copies);
}

std::vector<int32_t> KvHeads(int num_heads, int group) {
  std::vector<int32_t> kv(num_heads);
  for (int h = 0; h < num_heads; ++h) kv[h] = h / group;
  return kv;
}

TEST(HeadPlacement, NeverWorseThanBruteForceForRandomCosts) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 60; ++round) {
    const int num_ranks = 1 + round % 4;
    const int num_heads = 1 + static_cast<int>(random() % (num_ranks == 4 ? 8 : 10));
    const int64_t spread = round % 3 == 0 ? 3 : 1000000;  // many ties, or none
    std::vector<int64_t> cost(num_heads);
    for (int64_t& c : cost) c = static_cast<int64_t>(random() % spread);
    SCOPED_TRACE(testing::Message() << "round " << round << " heads " << num_heads << " ranks " << num_ranks);
    ExpectBest(cost, KvHeads(num_heads, 1 + round % 3), num_ranks);
  }
}

TEST(HeadPlacement, TenHeadsOnFourRanksAreExact) {
  std::mt19937_64 random(2);
  for (int round = 0; round < (kSanitized ? 1 : 2); ++round) {
    std::vector<int64_t> cost(10);
    for (int64_t& c : cost) c = static_cast<int64_t>(random() % 100000);
    ExpectBest(cost, KvHeads(10, 5), 4);
  }
}

TEST(HeadPlacement, EightHeadsOnEightRanksGetOneEach) {
  const HeadPlacement placement = PlaceHeads(std::vector<int64_t>{5, 9, 1, 7, 7, 3, 2, 8}, KvHeads(8, 4), 8);
  ExpectEveryHeadOnce(placement, 8);
  EXPECT_EQ(placement.max_load, 9);
}

TEST(HeadPlacement, FewerHeadsThanRanksLeaveRanksIdle) {
  const HeadPlacement placement = PlaceHeads(std::vector<int64_t>{4, 6, 5}, KvHeads(3, 1), 8);
  ExpectEveryHeadOnce(placement, 3);
  EXPECT_EQ(placement.max_load, 6);
  EXPECT_EQ(
      std::count_if(placement.heads.begin(), placement.heads.end(), [](const auto& h) { return h.empty(); }),
      5);
}

TEST(HeadPlacement, EqualCostsKeepKvGroupsTogether) {
  for (const int num_ranks : {1, 2, 4, 8}) {
    const HeadPlacement placement = PlaceHeads(std::vector<int64_t>(32, 1000), KvHeads(32, 4), num_ranks);
    EXPECT_EQ(placement.max_load, 32 / num_ranks * 1000);
    EXPECT_EQ(placement.kv_copies, 8) << num_ranks << " ranks";
  }
}

TEST(HeadPlacement, ManyHeadsStayWithinAPercentOfTheAverage) {
  std::mt19937_64 random(3);
  std::vector<int64_t> cost(64);
  int64_t total = 0;
  for (int64_t& c : cost) total += c = 1000 + static_cast<int64_t>(random() % 100000);
  const HeadPlacement placement = PlaceHeads(cost, KvHeads(64, 8), 8);
  ExpectEveryHeadOnce(placement, 64);
  EXPECT_LE(static_cast<double>(placement.max_load), 1.01 * static_cast<double>(total) / 8);
}

TEST(HeadPlacement, NoHeadsAndNoCostsAreLegal) {
  EXPECT_EQ(PlaceHeads({}, {}, 3).heads.size(), 3u);
  const HeadPlacement placement = PlaceHeads(std::vector<int64_t>(6, 0), KvHeads(6, 2), 3);
  ExpectEveryHeadOnce(placement, 6);
  EXPECT_EQ(placement.kv_copies, 3);
}

}  // namespace
}  // namespace longfill
