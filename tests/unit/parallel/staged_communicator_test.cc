// What a staged communicator adds to the contract of tests/multirank: what it takes, and how it fails.

#include "parallel/staged_communicator.h"

#include <thread>
#include <vector>

#include "tests/testing/guarded_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::HasSubstr;

class LostStream final : public Stream {
 public:
  DeviceKind device() const override { return DeviceKind::kCuda; }
  absl::Status Sync() override { return absl::UnavailableError("the device is lost"); }
  absl::Status WaitFor(const Event&) override { return absl::OkStatus(); }
};

TEST(StagedCommunicator, TakesItsStagingOnceAndForSeveralRanksOnly) {
  const auto backend = CreateGuardedBackend();
  const auto single = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(const auto alone, CreateStagedCommunicator(*single, *backend, 1000));
  EXPECT_EQ(alone->name(), "staged single");
  EXPECT_EQ(backend->host_memory().bytes_in_use(), 0);
  {
    const auto hosts = CreateInProcessCommunicators(2, {});
    LF_ASSERT_OK_AND_ASSIGN(const auto staged, CreateStagedCommunicator(*hosts[0], *backend, 1000));
    EXPECT_EQ(staged->name(), "staged in-process");
    EXPECT_EQ(backend->host_memory().bytes_in_use(), 2000);
  }
  EXPECT_EQ(backend->host_memory().bytes_in_use(), 0);
}

TEST(StagedCommunicator, AGroupOfOneCopiesOnTheDevice) {
  const auto backend = CreateGuardedBackend();
  const auto single = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(const auto world, CreateStagedCommunicator(*single, *backend));
  KernelSet& kernels = backend->kernels();
  Stream& stream = backend->stream();
  LF_ASSERT_OK_AND_ASSIGN(const Buffer from, backend->memory().Allocate(8, "sent"));
  LF_ASSERT_OK_AND_ASSIGN(const Buffer to, backend->memory().Allocate(8, "received"));
  const std::vector<int64_t> bytes{8};
  for (int64_t value = 1; value <= 2; ++value) {
    LF_ASSERT_OK(kernels.CopyIn(from.data(), &value, 8, stream));
    LF_ASSERT_OK(value == 1 ? world->AllGather(from.data(), to.data(), bytes, stream)
                            : world->AllToAll(from.data(), bytes, to.data(), bytes, stream));
    LF_ASSERT_OK(world->AllReduce(to.data(), 1, ReduceType::kInt64, ReduceOp::kSum, stream));
    LF_ASSERT_OK(world->Broadcast(to.data(), 8, 0, stream));
    int64_t got = 0;
    LF_ASSERT_OK(kernels.CopyOut(&got, to.data(), 8, stream));
    LF_ASSERT_OK(stream.Sync());
    EXPECT_EQ(got, value);
  }
  world->Abort(absl::CancelledError("enough"));
  EXPECT_THAT(world->AllGather(from.data(), to.data(), bytes, stream),
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("enough")));
  EXPECT_THAT(single->Barrier(stream).code(), absl::StatusCode::kFailedPrecondition);
}

TEST(StagedCommunicator, RefusesSlicesThatDoNotHoldAnElementOfEachRank) {
  const auto backend = CreateGuardedBackend();
  const auto hosts = CreateInProcessCommunicators(3, {});
  EXPECT_THAT(CreateStagedCommunicator(*hosts[0], *backend, 23).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("23")));
  LF_EXPECT_OK(CreateStagedCommunicator(*hosts[0], *backend, 24).status());
}

TEST(StagedCommunicator, ADeviceThatIsLostEndsTheGroup) {
  const auto hosts = CreateInProcessCommunicators(2, {.timeout = std::chrono::seconds(60)});
  std::vector<std::thread> threads;
  threads.reserve(2);
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      const auto backend = CreateGuardedBackend();
      LF_ASSERT_OK_AND_ASSIGN(const auto world, CreateStagedCommunicator(*hosts[rank], *backend));
      LostStream lost;
      Stream& stream = rank == 0 ? static_cast<Stream&>(lost) : backend->stream();
      EXPECT_THAT(world->Barrier(stream),
                  StatusIs(absl::StatusCode::kUnavailable, HasSubstr("the device is lost")));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// The copies to the host and back are part of what an exchange takes.
TEST(StagedCommunicator, CountsTheTimeOfItsCopies) {
  const auto hosts = CreateInProcessCommunicators(2, {.timeout = std::chrono::seconds(60)});
  std::vector<std::thread> threads;
  threads.reserve(2);
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      const auto slow_copies = [](std::string_view call) {
        if (call.starts_with("Copy")) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        return absl::OkStatus();
      };
      const auto backend = CreateGuardedBackend({.fault = slow_copies});
      LF_ASSERT_OK_AND_ASSIGN(const auto world, CreateStagedCommunicator(*hosts[rank], *backend));
      LF_ASSERT_OK_AND_ASSIGN(const Buffer data, backend->memory().Allocate(80, "an exchange"));
      Stream& stream = backend->stream();
      LF_ASSERT_OK(backend->kernels().Zero(data.data(), 80, stream));
      EXPECT_EQ(world->seconds(), 0);
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < 3; ++i) {
        LF_ASSERT_OK(world->AllReduce(data.data(), 10, ReduceType::kInt64, ReduceOp::kSum, stream));
      }
      const std::chrono::duration<double> all = std::chrono::steady_clock::now() - begin;
      EXPECT_GE(world->seconds(), hosts[rank]->seconds() + 6 * 0.020);
      EXPECT_LE(world->seconds(), all.count());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Bad arguments are what the communicator below says of them.
TEST(StagedCommunicator, MismatchedCallsAreNamed) {
  const auto hosts = CreateInProcessCommunicators(2, {.timeout = std::chrono::seconds(60)});
  std::vector<std::thread> threads;
  threads.reserve(2);
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      const auto backend = CreateGuardedBackend();
      LF_ASSERT_OK_AND_ASSIGN(const auto world, CreateStagedCommunicator(*hosts[rank], *backend));
      LF_ASSERT_OK_AND_ASSIGN(const Buffer data, backend->memory().Allocate(80, "an exchange"));
      EXPECT_THAT(
          world->AllReduce(data.data(), 9 + rank, ReduceType::kInt64, ReduceOp::kSum, backend->stream()),
          StatusIs(absl::StatusCode::kInternal, HasSubstr("9 elements")));
      EXPECT_EQ(world->Broadcast(data.data(), -1, 0, backend->stream()).code(),
                absl::StatusCode::kFailedPrecondition);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace longfill
