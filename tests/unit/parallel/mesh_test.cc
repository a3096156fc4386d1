#include "parallel/mesh.h"

#include <algorithm>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::HasSubstr;

constexpr int kSizes[] = {1, 2, 3, 4, 5, 8};
constexpr int64_t kLengths[] = {0, 1, 63, 64, 127, 128, 129, 256, 1000, 1337, 5000};
constexpr int64_t kDealBlocks[] = {0, 256, 1024};  // 0: that of the length

template <typename Body>
void ForEachPlan(const Body& body) {
  for (const int sequence : kSizes) {
    for (const int head : kSizes) {
      for (const int64_t length : kLengths) {
        for (const int64_t deal_block : kDealBlocks) {
          SCOPED_TRACE(testing::Message() << "sequence " << sequence << " head " << head << " tokens "
                                          << length << " dealt in " << deal_block);
          const Mesh mesh{sequence, head};
          body(deal_block > 0 ? ShardPlan(mesh, length, deal_block) : ShardPlan(mesh, length));
        }
      }
    }
  }
}

TEST(Mesh, ParsesInAnyOrderWithDefaults) {
  LF_ASSERT_OK_AND_ASSIGN(const Mesh both, ParseMesh("sequence=2,head=3"));
  EXPECT_EQ(both, (Mesh{2, 3}));
  LF_ASSERT_OK_AND_ASSIGN(const Mesh turned, ParseMesh("head=3,sequence=2"));
  EXPECT_EQ(turned, both);
  LF_ASSERT_OK_AND_ASSIGN(const Mesh one, ParseMesh("head=4"));
  EXPECT_EQ(one, (Mesh{1, 4}));
  LF_ASSERT_OK_AND_ASSIGN(const Mesh again, ParseMesh(ToString(both)));
  EXPECT_EQ(again, both);
}

TEST(Mesh, RefusesWhatItCannotRead) {
  for (const char* text :
       {"", "2x2", "sequence", "sequence=", "sequence=0", "head=-1", "head=2,head=2", "depth=2",
        "sequence=2;head=2", "sequence=2 ,head=1", "sequence=1000000,head=1000000", "head=2,"}) {
    EXPECT_THAT(ParseMesh(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text))) << text;
  }
}

TEST(ShardPlan, EveryTokenIsOwnedOnceByTheRankThatIsNamed) {
  ForEachPlan([](const ShardPlan& plan) {
    std::vector<int> owner(plan.num_tokens(), -1);
    for (int rank = 0; rank < plan.mesh().size(); ++rank) {
      const PositionMap positions = plan.TokenPositions(rank);
      for (int64_t row = 0; row < plan.NumTokens(rank); ++row) {
        const int64_t position = positions.Position(row);
        ASSERT_LT(position, plan.num_tokens());
        ASSERT_EQ(owner[position], -1) << position;
        owner[position] = rank;
      }
    }
    for (int64_t t = 0; t < plan.num_tokens(); ++t) ASSERT_EQ(owner[t], plan.RankOfToken(t)) << t;
  });
}

TEST(ShardPlan, TokenRangesAreThePositionsInOrderAndJoined) {
  ForEachPlan([](const ShardPlan& plan) {
    for (int rank = 0; rank < plan.mesh().size(); ++rank) {
      int64_t row = 0;
      int64_t last_end = -1;
      for (const TokenRange& range : plan.TokenRanges(rank)) {
        ASSERT_LT(last_end, range.begin);
        ASSERT_LT(range.begin, range.end);
        last_end = range.end;
        for (int64_t t = range.begin; t < range.end; ++t)
          ASSERT_EQ(plan.TokenPositions(rank).Position(row++), t);
      }
      ASSERT_EQ(row, plan.NumTokens(rank));
    }
  });
}

TEST(ShardPlan, GroupRowsAreTheMembersTokensInAscendingOrder) {
  ForEachPlan([](const ShardPlan& plan) {
    int64_t all = 0;
    for (int s = 0; s < plan.mesh().sequence; ++s) {
      int64_t of_members = 0;
      for (int h = 0; h < plan.mesh().head; ++h) of_members += plan.NumTokens(s * plan.mesh().head + h);
      ASSERT_EQ(plan.GroupNumTokens(s), of_members);
      all += of_members;
      int64_t last = -1;
      for (int64_t row = 0; row < plan.GroupNumTokens(s); ++row) {
        const int64_t position = plan.GroupPositions(s).Position(row);
        ASSERT_LT(last, position);
        last = position;
        ASSERT_EQ(plan.SequenceIndex(plan.RankOfToken(position)), s);
        // Dealt block g of the group is block g / head of member g % head.
        ASSERT_EQ(plan.HeadIndex(plan.RankOfToken(position)), row / plan.deal_block() % plan.mesh().head);
      }
    }
    ASSERT_EQ(all, plan.num_tokens());
  });
}

TEST(ShardPlan, RowsBelowCountsRowsWhosePositionIsBelow) {
  ForEachPlan([](const ShardPlan& plan) {
    for (int rank = 0; rank < plan.mesh().size(); rank += 3) {
      const PositionMap positions = plan.TokenPositions(rank);
      int64_t below = 0;
      for (int64_t t = 0; t <= plan.num_tokens(); ++t) {
        ASSERT_EQ(positions.RowsBelow(t), below) << t;
        below += t < plan.num_tokens() && plan.RankOfToken(t) == rank;
      }
    }
  });
}

TEST(ShardPlan, NobodyHoldsMoreThanTheMostNorABlockLess) {
  ForEachPlan([](const ShardPlan& plan) {
    int64_t most = 0, least = plan.num_tokens(), most_of_group = 0;
    for (int rank = 0; rank < plan.mesh().size(); ++rank) {
      most = std::max(most, plan.NumTokens(rank));
      least = std::min(least, plan.NumTokens(rank));
      most_of_group = std::max(most_of_group, plan.GroupNumTokens(plan.SequenceIndex(rank)));
    }
    EXPECT_EQ(plan.MostTokens(), most);
    EXPECT_EQ(plan.MostGroupTokens(), most_of_group);
    EXPECT_LE(most - least, plan.deal_block());
  });
}

// Keys that causal rows see, summed over the rows of each group, where rows of every block are dealt.
TEST(ShardPlan, CausalWorkIsEqualOverWholeTurnsThereAndBack) {
  for (const int sequence : {2, 3, 8}) {
    for (const int head : {1, 2, 3}) {
      const ShardPlan plan({sequence, head}, int64_t{4} * sequence * 256, 256);
      for (int s = 0; s < sequence; ++s) {
        int64_t keys = 0;
        for (int64_t row = 0; row < plan.GroupNumTokens(s); ++row)
          keys += plan.GroupPositions(s).Position(row) + 1;
        EXPECT_EQ(keys * sequence, plan.num_tokens() * (plan.num_tokens() + 1) / 2) << "group " << s;
      }
    }
  }
}

TEST(ShardPlan, BlocksAreAsLongAsLeavesEveryRankEnoughOfThemAndNoneMuchMore) {
  const auto block = [](int ranks, int64_t num_tokens) {
    return ShardPlan({ranks, 1}, num_tokens).deal_block();
  };
  EXPECT_EQ(block(2, 2 * 2 * 128 * 32 - 128), 128);
  EXPECT_EQ(block(2, 2 * 2 * 128 * 32), 256);
  EXPECT_EQ(block(2, 1 << 20), 16384);
  EXPECT_EQ(block(8, 1 << 20), 4096);
  EXPECT_EQ(block(16, 1 << 20), 2048);
  EXPECT_EQ(block(1, int64_t{1} << 30), 16384);
  EXPECT_EQ(ShardPlan({2, 4}, 1 << 19).deal_block(), 2048);
  const ShardPlan prefix = ShardPlan({8, 1}, 1 << 20).Prefix(1000);
  EXPECT_EQ(prefix.deal_block(), 4096);
  EXPECT_EQ(prefix.num_tokens(), 1000);
  for (const int ranks : {2, 3, 4, 7, 8, 16}) {
    for (const int64_t num_tokens : {300'000, 524'289, 700'001, 1'000'000, 1'048'575}) {
      const ShardPlan plan({ranks, 1}, num_tokens);
      SCOPED_TRACE(testing::Message() << ranks << " ranks, " << num_tokens << " tokens");
      EXPECT_EQ(plan.deal_block() % kTokenBlock, 0);
      EXPECT_GE(plan.deal_block(), std::min<int64_t>(2048, num_tokens / ranks / 64));
      EXPECT_LE(static_cast<double>(plan.MostTokens()) * ranks, 1.01 * static_cast<double>(num_tokens));
    }
  }
}

}  // namespace
}  // namespace longfill
