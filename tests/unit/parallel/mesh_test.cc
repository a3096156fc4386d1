#include "parallel/mesh.h"

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

TEST(ShardPlan, RankZeroHoldsTheMostTokensAndNobodyMoreThanABlockLess) {
  ForEachPlan([](const ShardPlan& plan) {
    for (int rank = 0; rank < plan.mesh().size(); ++rank) {
      EXPECT_LE(plan.NumTokens(rank), plan.NumTokens(0));
      EXPECT_LE(plan.NumTokens(0) - plan.NumTokens(rank), plan.deal_block());
    }
  });
}

TEST(ShardPlan, BlocksAreAsLongAsLeavesEveryRankEnoughOfThem) {
  const auto block = [](int ranks, int64_t num_tokens) {
    return ShardPlan({ranks, 1}, num_tokens).deal_block();
  };
  EXPECT_EQ(block(2, 2 * 2 * 128 * 64 - 1), 128);
  EXPECT_EQ(block(2, 2 * 2 * 128 * 64), 256);
  EXPECT_EQ(block(8, 131072), 256);
  EXPECT_EQ(block(8, 1 << 20), 2048);
  EXPECT_EQ(block(16, 1 << 20), 1024);
  EXPECT_EQ(block(1, int64_t{1} << 30), 4096);
  EXPECT_EQ(ShardPlan({2, 4}, 1 << 19).deal_block(), 1024);
  const ShardPlan prefix = ShardPlan({8, 1}, 1 << 20).Prefix(1000);
  EXPECT_EQ(prefix.deal_block(), 2048);
  EXPECT_EQ(prefix.num_tokens(), 1000);
}

}  // namespace
}  // namespace longfill
