// Shares that were worked out by hand.

#include "runtime/scaling/referenced_keys.h"

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::DoubleNear;
using testing::ElementsAre;

constexpr double kEpsilon = 1e-12;
constexpr int64_t kTokens = 1024;  // 8 blocks

// Two query heads for each of two KV heads: the first pair sees itself, then key 0 as well, the second pair
// everything and itself.
PackedIndices Heads() {
  return PackedIndices(std::vector<SparseIndex>{
      MakeVerticalSlashIndex({}, {0}, Coverage::kTiles), MakeVerticalSlashIndex({0}, {0}, Coverage::kTiles),
      MakeDenseIndex(), MakeVerticalSlashIndex({}, {0}, Coverage::kTiles)});
}

TEST(ReferencedKeysTest, AreOfTheBlocksOfOtherRanks) {
  const PackedIndices packed = Heads();
  const std::vector<IndexView> heads = packed.Views(packed.data());
  // Group 0 has the blocks 0 3 4 7, group 1 the blocks 1 2 5 6. All of group 1's come before block 7, and of
  // group 0's only block 7 does not come before block 6. The window of distance 0 reaches no other block.
  const ShardPlan plan({.sequence = 2, .head = 1}, kTokens, kTokenBlock);
  EXPECT_THAT(ReferencedShares(plan, 0, heads, 2), ElementsAre(0, 1));
  EXPECT_THAT(ReferencedShares(plan, 1, heads, 2), ElementsAre(0.25, 0.75));
  // Other ranks of a head group hold the same keys: four ranks, equal groups.
  const ShardPlan both({.sequence = 2, .head = 2}, kTokens, kTokenBlock);
  EXPECT_THAT(ReferencedShares(both, 1, heads, 2), ElementsAre(0.25, 0.75));
}

TEST(ReferencedKeysTest, OfLongerBlocksAndAnUnevenPrompt) {
  const PackedIndices packed = Heads();
  const std::vector<IndexView> heads = packed.Views(packed.data());
  // Group 0 has the tokens from 0 to 256 and from 768, group 1 those between: 4 blocks against 3.
  const ShardPlan plan({.sequence = 2, .head = 1}, kTokens - 200, 256);
  EXPECT_THAT(ReferencedShares(plan, 0, heads, 2), ElementsAre(0, 1));
  EXPECT_THAT(ReferencedShares(plan, 1, heads, 2),
              ElementsAre(DoubleNear(1 / 3.0, kEpsilon), DoubleNear(2 / 3.0, kEpsilon)));
}

TEST(ReferencedKeysTest, AreSummarized) {
  const ShardPlan plan({.sequence = 2, .head = 1}, kTokens, kTokenBlock);
  const PackedIndices all(std::vector<SparseIndex>(4, MakeDenseIndex()));
  const ReferencedKeys keys = SummarizeReferencedKeys(plan, std::vector<PackedIndices>{Heads(), all}, 2);
  const double of_all = (1 + 0.75) / 2;
  EXPECT_THAT(keys.by_kv_head,
              ElementsAre(DoubleNear((0.125 + of_all) / 2, kEpsilon), DoubleNear(of_all, kEpsilon)));
  EXPECT_THAT(keys.mean, DoubleNear((0.125 + 3 * of_all) / 4, kEpsilon));
  EXPECT_EQ(keys.least, 0);
  EXPECT_THAT(keys.under_half, DoubleNear(0.25, kEpsilon));
}

TEST(ReferencedKeysTest, OfAPromptThatOneRankHolds) {
  const PackedIndices packed = Heads();
  const std::vector<IndexView> heads = packed.Views(packed.data());
  const ShardPlan plan({.sequence = 2, .head = 1}, 100, kTokenBlock);
  EXPECT_THAT(ReferencedShares(plan, 0, heads, 2), ElementsAre(0, 0));  // the other holds nothing
  EXPECT_THAT(ReferencedShares(plan, 1, heads, 2), ElementsAre(0, 0));  // has no rows
  const ReferencedKeys keys = SummarizeReferencedKeys(plan, std::vector<PackedIndices>{Heads()}, 2);
  EXPECT_EQ(keys.under_half, 0);
  EXPECT_EQ(keys.least, 1);
}

}  // namespace
}  // namespace longfill
