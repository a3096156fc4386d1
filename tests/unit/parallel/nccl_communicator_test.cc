// How a group over NCCL begins, fails and ends, over a stand-in for the library. What it promises while
// nothing fails is tests/multirank/communicator_contract_test.cc.

#include "parallel/nccl_communicator.h"

#include <functional>
#include <thread>
#include <vector>

#include "tests/testing/fake_nccl.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;
using Clock = std::chrono::steady_clock;

// One rank over NCCL.
struct Rank {
  Communicator& host;
  Backend& gpu;
  Communicator& world;

  absl::Status Sum(int64_t count = 1) const {
    LF_ASSIGN_OR_RETURN(const Buffer data, gpu.memory().Allocate(8 * count, "numbers"));
    return world.AllReduce(data.data(), count, ReduceType::kInt64, ReduceOp::kSum, gpu.stream());
  }
};

class NcclCommunicatorTest : public testing::Test {
 protected:
  void SetUp() override { FakeNccl::Reset(); }
  // What was made has come to an end.
  void TearDown() override { EXPECT_EQ(FakeNccl::made(), FakeNccl::destroyed() + FakeNccl::aborted()); }

  static void Play(int size, milliseconds timeout, const std::function<void(const Rank&)>& body) {
    auto hosts = CreateInProcessCommunicators(size, {.timeout = std::chrono::seconds(60)});
    std::vector<std::thread> threads;
    threads.reserve(size);
    for (int r = 0; r < size; ++r) {
      threads.emplace_back([&, r] {
        const auto gpu = CreateFakeGpu();
        LF_ASSERT_OK_AND_ASSIGN(const auto world,
                                CreateNcclCommunicator(*hosts[r], *gpu, {.timeout = timeout}));
        body({*hosts[r], *gpu, *world});
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

TEST_F(NcclCommunicatorTest, IntactGroupsEndInOrder) {
  Play(3, std::chrono::seconds(60), [](const Rank& rank) {
    EXPECT_EQ(rank.world.name(), "nccl");
    LF_ASSERT_OK_AND_ASSIGN(const auto pair, rank.world.Split(rank.world.rank() == 2 ? 1 : 0, 0));
    LF_EXPECT_OK(rank.Sum());
    LF_EXPECT_OK((Rank{rank.host, rank.gpu, *pair}.Sum(1000)));
    EXPECT_EQ(rank.world.bytes_sent() - rank.host.bytes_sent(), 2 * 2 * 8 / 3);
    EXPECT_GE(rank.world.seconds(), rank.host.seconds());
    LF_EXPECT_OK(rank.world.Barrier(rank.gpu.stream()));
  });
  EXPECT_EQ(FakeNccl::made(), 3 + 2) << "a rank alone needs no NCCL";
  EXPECT_EQ(FakeNccl::aborted(), 0);
}

TEST_F(NcclCommunicatorTest, MissingRankEndsTheCallAtItsDeadline) {
  Play(3, milliseconds(200), [](const Rank& rank) {
    if (rank.world.rank() != 1) {
      const auto begin = Clock::now();
      EXPECT_THAT(rank.Sum(), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("200 ms")));
      EXPECT_LT(Clock::now() - begin, std::chrono::seconds(5));
      EXPECT_THAT(rank.Sum(),
                  StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("DEADLINE_EXCEEDED")));
    }
    // The one that was missing learns of it without a call.
    while (rank.world.Health().ok()) std::this_thread::yield();
    EXPECT_THAT(rank.world.Health(), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("200 ms")));
  });
  EXPECT_EQ(FakeNccl::aborted(), 3);
}

// A call was enqueued, its kernel waits for a peer that never comes: only the watch sees that.
TEST_F(NcclCommunicatorTest, KernelThatWaitsForAPeerIsStoppedAtTheDeadline) {
  Play(2, milliseconds(100), [](const Rank& rank) {
    LF_EXPECT_OK(rank.Sum());
    LF_ASSERT_OK(rank.host.Barrier(rank.gpu.stream()));
    FakeNccl::HoldEnds(true);
    LF_ASSERT_OK(rank.host.Barrier(rank.gpu.stream()));
    const absl::Status enqueued = rank.Sum();
    while (rank.world.Health().ok()) std::this_thread::yield();
    EXPECT_THAT(rank.world.Health(), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("on its GPU")));
    if (enqueued.ok()) {
      EXPECT_THAT(rank.Sum(), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("on its GPU")));
    }
    EXPECT_THAT(rank.Sum(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("DEADLINE_EXCEEDED")));
  });
  EXPECT_EQ(FakeNccl::aborted(), 2);
}

TEST_F(NcclCommunicatorTest, AbortEndsACallInProgressOnEveryRank) {
  Play(3, std::chrono::minutes(10), [](const Rank& rank) {
    if (rank.world.rank() == 2) {
      std::this_thread::sleep_for(milliseconds(50));
      rank.world.Abort(absl::DataLossError("first"));
      rank.world.Abort(absl::InternalError("second"));
    }
    EXPECT_THAT(rank.Sum(), StatusIs(absl::StatusCode::kDataLoss, "first"));
    EXPECT_THAT(rank.Sum(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("first")));
  });
  EXPECT_EQ(FakeNccl::aborted(), 3);
}

TEST_F(NcclCommunicatorTest, ErrorThatNcclReportsLaterEndsTheGroup) {
  Play(2, std::chrono::minutes(10), [](const Rank& rank) {
    LF_EXPECT_OK(rank.Sum());
    LF_ASSERT_OK_AND_ASSIGN(const auto child, rank.world.Split(0, 0));
    LF_ASSERT_OK(rank.host.Barrier(rank.gpu.stream()));
    FakeNccl::FailLater(1);
    while (rank.world.Health().ok()) std::this_thread::yield();
    EXPECT_THAT((Rank{rank.host, rank.gpu, *child}.Sum()),
                StatusIs(absl::StatusCode::kUnavailable, HasSubstr("remote process exited")));
  });
  EXPECT_EQ(FakeNccl::aborted(), 4);
}

TEST_F(NcclCommunicatorTest, RankThatCannotJoinIsNamedOnAll) {
  FakeNccl::FailInit(1);
  const auto hosts = CreateInProcessCommunicators(3, {.timeout = std::chrono::seconds(60)});
  std::vector<std::thread> threads;
  threads.reserve(3);
  for (int r = 0; r < 3; ++r) {
    threads.emplace_back([&, r] {
      const auto gpu = CreateFakeGpu();
      EXPECT_THAT(CreateNcclCommunicator(*hosts[r], *gpu, {}).status(),
                  StatusIs(absl::StatusCode::kUnavailable, AllOf(HasSubstr("rank 1 cannot join its 3 ranks"),
                                                                 HasSubstr("ncclCommInitRankConfig"))));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(NcclCommunicatorTest, BadArgumentsEndTheGroupAndBadOptionsDoNot) {
  Play(2, std::chrono::seconds(60), [](const Rank& rank) {
    EXPECT_THAT(CreateNcclCommunicator(rank.host, rank.gpu, {.max_ctas = 0}).status(),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("0 thread blocks")));
    LF_EXPECT_OK(rank.Sum());
    LF_ASSERT_OK(rank.host.Barrier(rank.gpu.stream()));
    if (rank.world.rank() == 1) {
      EXPECT_THAT(rank.world.AllGather(nullptr, nullptr, std::vector<int64_t>{1}, rank.gpu.stream()),
                  StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1 entries for 2 ranks")));
    }
    while (rank.world.Health().ok()) std::this_thread::yield();
    EXPECT_THAT(rank.world.Health(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1 entries")));
  });
}

TEST_F(NcclCommunicatorTest, VersionsAreReadable) {
  const auto gpu = CreateFakeGpu();
  LF_ASSERT_OK_AND_ASSIGN(const int version, NcclVersionCode(*gpu));
  EXPECT_GE(version, 22800);
  EXPECT_EQ(NcclVersionText(22809), "2.28.9");
  EXPECT_EQ(NcclVersionText(23003), "2.30.3");
}

}  // namespace
}  // namespace longfill
