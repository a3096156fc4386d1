// What ranks on GPUs do when one of them does not come to an exchange over NCCL. Skips where there are no two
// that can exchange.

#include <functional>
#include <thread>
#include <vector>

#include "tests/multirank/nccl_ranks.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::HasSubstr;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kSoon{20};
constexpr int64_t kCount = 1 << 20;

struct Rank {
  Communicator& host;
  Backend& gpu;
  Communicator& world;
};

class NcclOnCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (const absl::Status status = CheckNcclRanks(2); !status.ok()) GTEST_SKIP() << status.message();
    while (size_ < 4 && CheckNcclRanks(size_ + 1).ok()) ++size_;
  }

  void Play(std::chrono::milliseconds timeout, const std::function<void(const Rank&)>& body) const {
    auto hosts = CreateInProcessCommunicators(size_, {.timeout = std::chrono::seconds(60)});
    std::vector<std::thread> threads;
    threads.reserve(size_);
    for (int r = 0; r < size_; ++r) {
      threads.emplace_back([&, r] {
        LF_ASSERT_OK_AND_ASSIGN(const auto gpu, NcclRankBackend(r));
        NcclOptions options = NcclTestOptions();
        options.timeout = timeout;
        LF_ASSERT_OK_AND_ASSIGN(const auto world, CreateNcclCommunicator(*hosts[r], *gpu, options));
        body({*hosts[r], *gpu, *world});
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  // A rank that is to be missed. The last one.
  bool Missing(const Rank& rank) const { return rank.world.rank() == size_ - 1; }

  // Adds up ones; the sum has arrived at return.
  void ExpectSum(const Rank& rank) const {
    LF_ASSERT_OK_AND_ASSIGN(const Buffer data, rank.gpu.memory().Allocate(8 * kCount, "numbers"));
    std::vector<int64_t> numbers(kCount, 1);
    LF_ASSERT_OK(rank.gpu.kernels().CopyIn(data.data(), numbers.data(), 8 * kCount, rank.gpu.stream()));
    LF_ASSERT_OK(
        rank.world.AllReduce(data.data(), kCount, ReduceType::kInt64, ReduceOp::kSum, rank.gpu.stream()));
    LF_ASSERT_OK(rank.gpu.kernels().CopyOut(numbers.data(), data.data(), 8 * kCount, rank.gpu.stream()));
    LF_ASSERT_OK(rank.gpu.stream().Sync());
    EXPECT_EQ(numbers, std::vector<int64_t>(kCount, size_));
  }

  // An exchange for which a peer does not come: the wait for the stream ends soon, and later calls say why.
  void ExpectEndOf(const Rank& rank, absl::StatusCode code, const char* text) const {
    LF_ASSERT_OK_AND_ASSIGN(const Buffer data, rank.gpu.memory().Allocate(8 * kCount, "numbers"));
    const auto sum = [&] {
      return rank.world.AllReduce(data.data(), kCount, ReduceType::kInt64, ReduceOp::kSum, rank.gpu.stream());
    };
    const auto begin = Clock::now();
    absl::Status first = sum();
    LF_EXPECT_OK(rank.gpu.stream().Sync());
    EXPECT_LT(Clock::now() - begin, kSoon);
    EXPECT_THAT(rank.world.Health(), StatusIs(code, HasSubstr(text)));
    if (first.ok()) first = sum();
    EXPECT_THAT(first, StatusIs(code, HasSubstr(text)));
    EXPECT_THAT(sum(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(text)));
  }

  int size_ = 2;
};

TEST_F(NcclOnCuda, MissingRankEndsTheKernelsOfTheOthersAndTheGpusGoOn) {
  Play(std::chrono::seconds(10), [&](const Rank& rank) {
    ExpectSum(rank);
    if (!Missing(rank)) ExpectEndOf(rank, absl::StatusCode::kDeadlineExceeded, "10000 ms");
    while (rank.world.Health().ok()) std::this_thread::yield();
  });
  Play(std::chrono::seconds(60), [&](const Rank& rank) { ExpectSum(rank); });
}

TEST_F(NcclOnCuda, RankThatIsMissingFromTheStartEndsTheCall) {
  Play(std::chrono::seconds(10), [&](const Rank& rank) {
    if (!Missing(rank)) ExpectEndOf(rank, absl::StatusCode::kDeadlineExceeded, "10000 ms");
    while (rank.world.Health().ok()) std::this_thread::yield();
  });
}

TEST_F(NcclOnCuda, AbortEndsTheKernelsOfTheOthers) {
  Play(std::chrono::minutes(2), [&](const Rank& rank) {
    ExpectSum(rank);
    if (!Missing(rank)) return ExpectEndOf(rank, absl::StatusCode::kDataLoss, "given up");
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    rank.world.Abort(absl::DataLossError("given up"));
  });
  Play(std::chrono::seconds(60), [&](const Rank& rank) { ExpectSum(rank); });
}

}  // namespace
}  // namespace longfill
