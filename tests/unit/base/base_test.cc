#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/memory.h"
#include "kernels/base/stream.h"
#include "kernels/base/thread_pool.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;

// Every 16-bit pattern survives widening and narrowing, NaN as some NaN.
TEST(DTypeTest, SixteenBitFormatsRoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float from_f16 = Float16ToFloat(half);
    if (std::isnan(from_f16)) {
      EXPECT_TRUE(std::isnan(Float16ToFloat(FloatToFloat16(from_f16)))) << bits;
    } else {
      ASSERT_EQ(FloatToFloat16(from_f16), half) << bits;
    }
    const float from_bf16 = BFloat16ToFloat(half);
    if (std::isnan(from_bf16)) {
      EXPECT_TRUE(std::isnan(BFloat16ToFloat(FloatToBFloat16(from_bf16)))) << bits;
    } else {
      ASSERT_EQ(FloatToBFloat16(from_bf16), half) << bits;
    }
  }
}

// Between two neighbouring values narrowing takes the nearer, at the midpoint the even one.
TEST(DTypeTest, NarrowingRoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7BFF; ++bits) {
    const double low = Float16ToFloat(static_cast<uint16_t>(bits));
    const double high = Float16ToFloat(static_cast<uint16_t>(bits + 1));
    const uint16_t even = static_cast<uint16_t>(bits + (bits & 1));
    const float middle = static_cast<float>((low + high) / 2);
    ASSERT_EQ(FloatToFloat16(middle), even) << bits;
    ASSERT_EQ(FloatToFloat16(std::nextafter(middle, 0.0F)), bits) << bits;
    ASSERT_EQ(FloatToFloat16(std::nextafter(middle, 1e9F)), bits + 1) << bits;
  }
  for (uint32_t bits = 0x80; bits < 0x7F7F; ++bits) {
    const float middle = std::bit_cast<float>((bits << 16) | 0x8000);
    ASSERT_EQ(FloatToBFloat16(middle), bits + (bits & 1)) << bits;
    ASSERT_EQ(FloatToBFloat16(std::nextafter(middle, 0.0F)), bits) << bits;
  }
}

TEST(DTypeTest, OverflowGoesToInfinity) {
  EXPECT_EQ(FloatToFloat16(65519.0F), 0x7BFF);
  EXPECT_EQ(FloatToFloat16(65520.0F), 0x7C00);
  EXPECT_EQ(FloatToFloat16(-std::numeric_limits<float>::infinity()), 0xFC00);
  EXPECT_EQ(FloatToBFloat16(std::numeric_limits<float>::max()), 0x7F80);
}

TEST(DTypeTest, UnknownNameIsNamed) {
  EXPECT_THAT(ParseDType("int7"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("int7")));
}

TEST(MemoryTest, CountsUseAndPeakAndReturnsBytes) {
  CpuMemoryResource memory;
  {
    LF_ASSERT_OK_AND_ASSIGN(Buffer first, memory.Allocate(1000, "first"));
    LF_ASSERT_OK_AND_ASSIGN(Buffer second, memory.Allocate(24, "second"));
    EXPECT_EQ(memory.bytes_in_use(), 1024);
    first = std::move(second);
    EXPECT_EQ(memory.bytes_in_use(), 24);
    EXPECT_EQ(first.size_bytes(), 24);
  }
  EXPECT_EQ(memory.bytes_in_use(), 0);
  EXPECT_EQ(memory.peak_bytes(), 1024);
}

TEST(MemoryTest, LimitIsResourceExhaustedNamingWhatAndHowMuch) {
  CpuMemoryResource memory(100);
  EXPECT_THAT(memory.Allocate(101, "scores"),
              StatusIs(absl::StatusCode::kResourceExhausted, AllOf(HasSubstr("scores"), HasSubstr("101"))));
  EXPECT_THAT(memory.Allocate(-1, "x"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1")));
  LF_EXPECT_OK(memory.Allocate(0, "nothing"));
}

TEST(MemoryTest, LostDeviceIsNotTakenForMissingMemory) {
  class LostMemory final : public MemoryResource {
    void* DoAllocate(int64_t) override { return nullptr; }
    void DoDeallocate(void*, int64_t) override {}
    absl::Status DeviceHealth() const override { return absl::InternalError("device 3 is lost"); }
  };
  LostMemory memory;
  EXPECT_THAT(memory.Allocate(100, "scores"),
              StatusIs(absl::StatusCode::kInternal, AllOf(HasSubstr("scores"), HasSubstr("device 3"))));
  EXPECT_EQ(memory.bytes_in_use(), 0);
}

class OtherDeviceStream final : public Stream {
 public:
  DeviceKind device() const override { return DeviceKind::kCuda; }
  absl::Status Sync() override { return absl::OkStatus(); }
  absl::Status WaitFor(const Event&) override { return absl::OkStatus(); }
};

TEST(CpuEventTest, MeasuresTheTimeBetweenTwoRecords) {
  CpuStream stream;
  CpuEvent first, second;
  EXPECT_THAT(second.SecondsSince(first),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("never recorded")));
  LF_ASSERT_OK(first.Record(stream));
  EXPECT_THAT(second.SecondsSince(first),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("never recorded")));
  const auto start = std::chrono::steady_clock::now();
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  LF_ASSERT_OK(second.Record(stream));
  const std::chrono::duration<double> most = std::chrono::steady_clock::now() - start;
  LF_ASSERT_OK_AND_ASSIGN(const double seconds, second.SecondsSince(first));
  EXPECT_GE(seconds, 0.002);
  EXPECT_LT(seconds, most.count() + 1);
  LF_EXPECT_OK(second.Wait());
}

TEST(CpuEventTest, IsOfItsOwnDeviceOnly) {
  OtherDeviceStream stream;
  CpuEvent event;
  EXPECT_THAT(event.Record(stream),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("another device")));
}

TEST(ThreadPoolTest, RunsEveryTaskOnce) {
  for (int num_threads : {1, 2, 5}) {
    ThreadPool pool(num_threads);
    for (int64_t num_tasks : {0, 1, 2, 257}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(num_tasks));
      std::atomic<bool> worker_ok{true};
      pool.ParallelFor(num_tasks, [&](int64_t task, int worker) {
        runs[static_cast<size_t>(task)].fetch_add(1);
        if (worker < 0 || worker >= num_threads) worker_ok = false;
      });
      EXPECT_THAT(std::vector<int>(runs.begin(), runs.end()), Each(1));
      EXPECT_TRUE(worker_ok);
    }
  }
}

TEST(ThreadPoolTest, NestedLoopsRunOnTheirCaller) {
  ThreadPool pool(3);
  std::atomic<int> runs{0};
  pool.ParallelFor(4, [&](int64_t, int) { pool.ParallelFor(5, [&](int64_t, int) { ++runs; }); });
  EXPECT_EQ(runs, 20);
}

}  // namespace
}  // namespace longfill
