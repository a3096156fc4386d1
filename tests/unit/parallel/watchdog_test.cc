// Watchdogs of ranks that are threads: sockets are real, deaths are played by closing. Processes that die or
// stop are in tests/multirank/mpi_faults.sh.

#include "parallel/watchdog.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using testing::ElementsAre;
using testing::HasSubstr;

CpuStream g_stream;

// What the callbacks of one rank have said.
class Log {
 public:
  WatchdogCallbacks Callbacks() {
    return {.on_peer_lost =
                [this](int rank, const absl::Status&) {
                  std::lock_guard<std::mutex> lock(mutex_);
                  lost_.push_back(rank);
                  changed_.notify_all();
                },
            .on_flag =
                [this](uint64_t value) {
                  std::lock_guard<std::mutex> lock(mutex_);
                  flags_.push_back(value);
                  changed_.notify_all();
                }};
  }
  bool WaitForFlags(size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [&] { return flags_.size() >= count; });
  }
  std::vector<uint64_t> flags() {
    std::lock_guard<std::mutex> lock(mutex_);
    return flags_;
  }
  std::vector<int> lost() {
    std::lock_guard<std::mutex> lock(mutex_);
    return lost_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int> lost_;
  std::vector<uint64_t> flags_;
};

void Play(int size, const std::function<void(Communicator&)>& body) {
  auto ranks = CreateInProcessCommunicators(size, {.timeout = std::chrono::seconds(30)});
  std::vector<std::thread> threads;
  threads.reserve(size);
  for (int r = 0; r < size; ++r) threads.emplace_back([&, r] { body(*ranks[r]); });
  for (std::thread& thread : threads) thread.join();
}

TEST(Watchdog, GroupOfOneHasNothingToWatch) {
  const auto world = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(const auto watchdog, Watchdog::Start(*world, {}, {}, g_stream));
  watchdog->SetFlag(1);
  watchdog->Close();
}

TEST(Watchdog, OrderlyCloseInAnyOrderIsNoLoss) {
  for (const bool root_first : {false, true}) {
    Play(4, [&](Communicator& world) {
      Log log;
      LF_ASSERT_OK_AND_ASSIGN(
          const auto watchdog,
          Watchdog::Start(world, {.interval = milliseconds(20), .timeout = milliseconds(5000)},
                          log.Callbacks(), g_stream));
      std::this_thread::sleep_for(milliseconds(100));
      if ((world.rank() == 0) != root_first) std::this_thread::sleep_for(milliseconds(100));
      watchdog->Close();
      watchdog->Close();
      LF_ASSERT_OK(world.Barrier(g_stream));
      EXPECT_THAT(log.lost(), ElementsAre());
    });
  }
}

TEST(Watchdog, FlagsReachEveryOtherRankInOrder) {
  Play(4, [](Communicator& world) {
    Log log;
    LF_ASSERT_OK_AND_ASSIGN(const auto watchdog, Watchdog::Start(world, {}, log.Callbacks(), g_stream));
    if (world.rank() == 0) {
      for (const uint64_t value : {uint64_t{7}, uint64_t{8}, uint64_t{1} << 63}) watchdog->SetFlag(value);
    } else {
      EXPECT_TRUE(log.WaitForFlags(3));
      EXPECT_THAT(log.flags(), ElementsAre(7, 8, uint64_t{1} << 63));
    }
    LF_ASSERT_OK(world.Barrier(g_stream));
    watchdog->Close();
    EXPECT_THAT(log.lost(), ElementsAre());
  });
}

TEST(Watchdog, BadOptionsAndAddressesAreTheSameErrorOnAllRanks) {
  Play(3, [](Communicator& world) {
    EXPECT_THAT(
        Watchdog::Start(world, {.interval = milliseconds(100), .timeout = milliseconds(100)}, {}, g_stream),
        StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("interval 100 ms, timeout 100 ms")));
    WatchdogOptions options;
    if (world.rank() == 0) options.advertise_host = "no such host";
    EXPECT_THAT(Watchdog::Start(world, options, {}, g_stream),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no such host")));
    LF_EXPECT_OK(world.Barrier(g_stream)) << "the group stays usable";
  });
}

}  // namespace
}  // namespace longfill
