// What ranks as threads do when something goes wrong; the same over MPI is tests/multirank/mpi_faults.sh.

#include <atomic>
#include <thread>

#include "parallel/communicator.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;
using Clock = std::chrono::steady_clock;

CpuStream g_stream;

void Play(int size, milliseconds timeout, const std::function<void(Communicator&)>& body) {
  auto ranks = CreateInProcessCommunicators(size, {.timeout = timeout});
  std::vector<std::thread> threads;
  threads.reserve(size);
  for (int r = 0; r < size; ++r) threads.emplace_back([&, r] { body(*ranks[r]); });
  for (std::thread& thread : threads) thread.join();
}

TEST(SingleCommunicator, CopiesAndReportsAnAbort) {
  const auto single = CreateSingleCommunicator();
  int32_t from = 7, to = 0;
  LF_ASSERT_OK(single->AllGather(&from, &to, std::vector<int64_t>{4}, g_stream));
  EXPECT_EQ(to, 7);
  LF_ASSERT_OK_AND_ASSIGN(const auto child, single->Split(3, 1));
  child->Abort(absl::CancelledError("enough"));
  EXPECT_THAT(single->Barrier(g_stream), StatusIs(absl::StatusCode::kCancelled, "enough"));
  EXPECT_THAT(single->Barrier(g_stream),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("enough")));
}

TEST(InProcessCommunicator, MissingRankIsNamedAtTheDeadline) {
  Play(4, milliseconds(200), [](Communicator& world) {
    if (world.rank() == 2) return;
    const auto start = Clock::now();
    EXPECT_THAT(world.Barrier(g_stream), StatusIs(absl::StatusCode::kDeadlineExceeded,
                                                  AllOf(HasSubstr("Barrier"), HasSubstr("for rank 2"))));
    EXPECT_LT(Clock::now() - start, std::chrono::seconds(5));
    int64_t value = 0;
    EXPECT_THAT(world.AllReduce(&value, 1, ReduceType::kInt64, ReduceOp::kSum, g_stream),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("DEADLINE_EXCEEDED")));
  });
}

TEST(InProcessCommunicator, AbortWakesWaitingRanksAndTheFirstReasonWins) {
  Play(3, std::chrono::minutes(10), [](Communicator& world) {
    if (world.rank() == 1) {
      std::this_thread::sleep_for(milliseconds(50));
      world.Abort(absl::DataLossError("first"));
      world.Abort(absl::InternalError("second"));
    }
    EXPECT_THAT(world.Barrier(g_stream), StatusIs(absl::StatusCode::kDataLoss, "first"));
    EXPECT_THAT(world.Barrier(g_stream), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("first")));
    EXPECT_THAT(world.Split(0, 0), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("first")));
  });
}

TEST(InProcessCommunicator, AbortOfASplitGroupEndsParentAndSiblings) {
  Play(4, std::chrono::minutes(10), [](Communicator& world) {
    LF_ASSERT_OK_AND_ASSIGN(const auto half, world.Split(world.rank() / 2, 0));
    if (world.rank() == 3) half->Abort(absl::UnavailableError("gone"));
    Communicator& waits_on = world.rank() == 0 ? world : *half;
    absl::Status status;
    while (status.ok()) status = waits_on.Barrier(g_stream);
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, "gone"));
  });
}

TEST(InProcessCommunicator, AbortOfTheParentEndsSplitGroups) {
  Play(4, std::chrono::minutes(10), [](Communicator& world) {
    LF_ASSERT_OK_AND_ASSIGN(const auto half, world.Split(world.rank() % 2, 0));
    if (world.rank() == 0) world.Abort(absl::UnavailableError("gone"));
    absl::Status status;
    while (status.ok()) status = half->Barrier(g_stream);
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, "gone"));
  });
}

TEST(InProcessCommunicator, OtherOperationsAreReportedWithBothCalls) {
  Play(2, std::chrono::minutes(10), [](Communicator& world) {
    int64_t value = 0;
    const absl::Status status =
        world.rank() == 0 ? world.Barrier(g_stream)
                          : world.AllReduce(&value, 1, ReduceType::kInt64, ReduceOp::kSum, g_stream);
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kInternal, AllOf(HasSubstr("rank 0 called Barrier"),
                                                                    HasSubstr("rank 1 called AllReduce"))));
  });
}

TEST(InProcessCommunicator, OtherSizesAreReportedWithBothCalls) {
  Play(3, std::chrono::minutes(10), [](Communicator& world) {
    std::vector<uint8_t> data(64);
    std::vector<int64_t> counts{4, 4, world.rank() == 2 ? 8 : 4};
    EXPECT_THAT(world.AllGather(data.data(), data.data() + 16, counts, g_stream),
                StatusIs(absl::StatusCode::kInternal, AllOf(HasSubstr("{4, 4, 4}"), HasSubstr("{4, 4, 8}"))));
  });
  Play(2, std::chrono::minutes(10), [](Communicator& world) {
    std::vector<uint8_t> data(64);
    const std::vector<int64_t> send{1, world.rank() == 0 ? 2 : 1};
    const std::vector<int64_t> recv{1, 1};
    EXPECT_THAT(world.AllToAll(data.data(), send, data.data() + 32, recv, g_stream),
                StatusIs(absl::StatusCode::kInternal, HasSubstr("AllToAll")));
  });
}

TEST(InProcessCommunicator, BadArgumentOfOneRankEndsTheGroupForAll) {
  Play(2, std::chrono::minutes(10), [](Communicator& world) {
    int64_t value = 0;
    const int root = world.rank() == 0 ? 0 : 2;
    EXPECT_THAT(world.Broadcast(&value, 8, root, g_stream),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("root 2 of 2")));
  });
}

}  // namespace
}  // namespace longfill
