// The probes over ranks that are threads, with a communicator in between that does wrong what they look for.

#include "deploy/doctor/exchange_probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <set>
#include <thread>

#include "deploy/doctor/gpu_probe.h"
#include "kernels/api/backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

constexpr std::chrono::seconds kTimeout{60};

// Passes everything on, then changes results of this rank as it is told to.
class Faulty final : public Communicator {
 public:
  explicit Faulty(Communicator& inner) : inner_(inner) {}
  bool change_integers = false;
  bool change_floats = false;
  bool change_bytes = false;

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  std::string_view name() const override { return inner_.name(); }
  absl::Status AllGather(const void* send, void* recv, std::span<const int64_t> counts,
                         Stream& stream) override {
    return inner_.AllGather(send, recv, counts, stream);
  }
  absl::Status AllReduce(void* data, int64_t count, ReduceType type, ReduceOp op, Stream& stream) override {
    LF_RETURN_IF_ERROR(inner_.AllReduce(data, count, type, op, stream));
    const bool change = type == ReduceType::kInt64 ? change_integers : change_floats;
    if (change) static_cast<uint8_t*>(data)[8 * (count - 1)] ^= 1;
    return absl::OkStatus();
  }
  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& stream) override {
    return inner_.Broadcast(data, bytes, root, stream);
  }
  absl::Status AllToAll(const void* send, std::span<const int64_t> send_bytes, void* recv,
                        std::span<const int64_t> recv_bytes, Stream& stream) override {
    LF_RETURN_IF_ERROR(inner_.AllToAll(send, send_bytes, recv, recv_bytes, stream));
    if (change_bytes) static_cast<uint8_t*>(recv)[100] ^= 1;
    return absl::OkStatus();
  }
  absl::Status Barrier(Stream& stream) override { return inner_.Barrier(stream); }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    return inner_.Split(color, key);
  }
  void Abort(const absl::Status& reason) override { inner_.Abort(reason); }
  absl::Status Health() override { return inner_.Health(); }
  int64_t bytes_sent() const override { return inner_.bytes_sent(); }
  double seconds() const override { return inner_.seconds(); }

 private:
  Communicator& inner_;
};

void OnRanks(int size, const std::function<void(Faulty& communicator)>& body) {
  const auto ranks = CreateInProcessCommunicators(size, {.timeout = kTimeout});
  std::vector<std::thread> threads;
  for (const auto& rank : ranks) {
    threads.emplace_back([&] {
      Faulty communicator(*rank);
      body(communicator);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(CheckReductions, FindsNothingWhereAllIsRight) {
  for (const int size : {2, 3, 5}) {
    OnRanks(size, [](Faulty& communicator) {
      LF_ASSERT_OK_AND_ASSIGN(const std::string wrong, CheckReductions(communicator));
      EXPECT_EQ(wrong, "");
    });
  }
}

TEST(CheckReductions, FindsOneWrongBitOnTheRankThatHasIt) {
  for (const bool floats : {false, true}) {
    OnRanks(3, [floats](Faulty& communicator) {
      (floats ? communicator.change_floats : communicator.change_integers) = communicator.rank() == 1;
      LF_ASSERT_OK_AND_ASSIGN(const std::string wrong, CheckReductions(communicator));
      if (communicator.rank() != 1) {
        EXPECT_EQ(wrong, "");
      } else {
        EXPECT_THAT(wrong, HasSubstr(floats ? "a sum of floats" : "a sum of integers"));
        EXPECT_THAT(wrong, HasSubstr("at place 999"));
      }
    });
  }
}

TEST(MeasureLinks, MeasuresEveryPairOnce) {
  OnRanks(4, [](Faulty& communicator) {
    LF_ASSERT_OK_AND_ASSIGN(const std::vector<LinkRate> links, MeasureLinks(communicator, 10000));
    std::set<std::pair<int, int>> pairs;
    for (const LinkRate& link : links) {
      EXPECT_NE(link.from, link.to);
      EXPECT_GT(link.bytes_per_second, 0);
      EXPECT_TRUE(link.intact);
      pairs.emplace(link.from, link.to);
    }
    EXPECT_EQ(links.size(), 12u);
    EXPECT_EQ(pairs.size(), 12u);
  });
}

TEST(MeasureLinks, FindsAChangedByteAndWhoseItIs) {
  OnRanks(3, [](Faulty& communicator) {
    communicator.change_bytes = communicator.rank() == 2;
    LF_ASSERT_OK_AND_ASSIGN(const std::vector<LinkRate> links, MeasureLinks(communicator, 1000));
    for (const LinkRate& link : links) EXPECT_EQ(link.intact, link.to != 2);
  });
}

TEST(MeasureClocks, FindsAClockThatIsAhead) {
  OnRanks(3, [](Faulty& communicator) {
    const double ahead = communicator.rank() == 2 ? 5 : communicator.rank() == 1 ? -3 : 0;
    LF_ASSERT_OK_AND_ASSIGN(const std::vector<ClockOffset> clocks,
                            MeasureClocks(communicator, [ahead] { return WallSeconds() + ahead; }));
    ASSERT_EQ(clocks.size(), 3u);
    EXPECT_EQ(clocks[0].seconds, 0);
    EXPECT_NEAR(clocks[1].seconds, -3, clocks[1].uncertainty + 1e-5);
    EXPECT_NEAR(clocks[2].seconds, 5, clocks[2].uncertainty + 1e-5);
    EXPECT_LT(clocks[2].uncertainty, 1);
  });
}

TEST(MeasureLatency, IsThatOfTheSlowestOnAllRanks) {
  std::vector<double> seconds(3);
  OnRanks(3, [&seconds](Faulty& communicator) {
    LF_ASSERT_OK_AND_ASSIGN(seconds[communicator.rank()], MeasureLatency(communicator));
  });
  EXPECT_GT(seconds[0], 0);
  EXPECT_EQ(seconds[0], seconds[1]);
  EXPECT_EQ(seconds[0], seconds[2]);
}

TEST(MeasureLatency, EndsWhereARankDoesNotCome) {
  const auto ranks = CreateInProcessCommunicators(2, {.timeout = std::chrono::milliseconds(100)});
  EXPECT_THAT(MeasureLatency(*ranks[0]), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("100 ms")));
}

// On the CPU's backend, whose host memory is its device memory.
TEST(MeasureHostCopy, BringsBackWhatWentThere) {
  const std::unique_ptr<Backend> backend = CreateCpuBackend(1);
  LF_ASSERT_OK_AND_ASSIGN(const HostCopyRates rates, MeasureHostCopy(*backend, 1 << 16));
  EXPECT_GT(rates.to_device, 0);
  EXPECT_GT(rates.to_host, 0);
  EXPECT_TRUE(rates.intact);
}

TEST(MeasureDeviceExchange, ChecksSumsAndBytes) {
  OnRanks(3, [](Faulty& communicator) {
    const std::unique_ptr<Backend> backend = CreateCpuBackend(1);
    LF_ASSERT_OK_AND_ASSIGN(const DeviceExchange right, MeasureDeviceExchange(communicator, *backend, 5000));
    EXPECT_EQ(right.wrong, "");
    EXPECT_GT(right.bytes_per_second, 0);
    communicator.change_integers = communicator.rank() == 1;
    LF_ASSERT_OK_AND_ASSIGN(const DeviceExchange wrong, MeasureDeviceExchange(communicator, *backend, 5000));
    EXPECT_EQ(wrong.wrong, communicator.rank() == 1 ? "a sum of integers is 7, expected is 6" : "");
  });
}

}  // namespace
}  // namespace longfill
