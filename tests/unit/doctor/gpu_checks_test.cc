#include "deploy/doctor/gpu_checks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::Field;
using ::testing::HasSubstr;

auto Is(CheckResult result, const std::string& value = "", const std::string& advice = "") {
  return AllOf(Field(&Finding::result, result), Field(&Finding::value, HasSubstr(value)),
               Field(&Finding::advice, HasSubstr(advice)));
}
constexpr CheckResult kOk = CheckResult::kOk;
constexpr CheckResult kWarning = CheckResult::kWarning;
constexpr CheckResult kFailed = CheckResult::kFailed;
constexpr CheckResult kSkipped = CheckResult::kSkipped;

TEST(JudgeDriver, WantsTheMajorVersionOfTheToolkit) {
  EXPECT_THAT(JudgeDriver({.driver = 13000, .runtime = 13000}), Is(kOk, "CUDA 13.0"));
  EXPECT_THAT(JudgeDriver({.driver = 13010, .runtime = 12080}), Is(kOk, "CUDA 13.1"));
  EXPECT_THAT(JudgeDriver({.driver = 12060, .runtime = 12080}), Is(kWarning, "12.6", "update"));
  EXPECT_THAT(JudgeDriver({.driver = 12080, .runtime = 13000}), Is(kFailed, "12.8", "update"));
  EXPECT_THAT(JudgeDriver({.driver = 0, .runtime = 13000}), Is(kFailed, "no driver", "--gpus all"));
}

TEST(JudgeDevice, WantsWhatTheKernelsAreBuiltFor) {
  EXPECT_THAT(JudgeDevice(0, {.name = "H100", .compute_capability = 90, .ecc = true}),
              Is(kOk, "H100 (sm_90)"));
  EXPECT_THAT(JudgeDevice(1, {.name = "V100", .compute_capability = 70}),
              Is(kFailed, "GPU 1, V100", "sm_80"));
}

TEST(JudgeSharing, WantsAGpuForEachRank) {
  EXPECT_THAT(JudgeSharing({"a", "b", "c"}, 4), Is(kOk, "3 ranks on 3 GPUs"));
  EXPECT_THAT(JudgeSharing({"a", "b", "a"}, 2), Is(kWarning, "3 ranks on 2 GPUs", "up to 2 ranks"));
  EXPECT_THAT(JudgeSharing({"a", "a"}, 8), Is(kWarning, "", "while others idle"));  // --device cuda:0
}

TEST(JudgeDeviceMemory, ComparesTheWeightsWithARanksShare) {
  EXPECT_THAT(JudgeDeviceMemory(80'000'000'000, 1, 16'000'000'000), Is(kOk, "80.0 GB"));
  EXPECT_THAT(JudgeDeviceMemory(80'000'000'000, 8, 16'000'000'000), Is(kFailed, "10.0 GB", "sharded"));
}

TEST(JudgeHostCopy, FindsNarrowSlotsAndChangedBytes) {
  EXPECT_THAT(JudgeHostCopy({50e9, 50e9}), Is(kOk, "50.0 GB/s to the GPU"));
  EXPECT_THAT(JudgeHostCopy({50e9, 3e9}), Is(kWarning, "3.0 GB/s back", "lanes"));
  EXPECT_THAT(JudgeHostCopy({50e9, 50e9, false}), Is(kFailed, "changed"));
}

TEST(JudgePeers, FindsWaysThroughTheHostAndSlowOnes) {
  EXPECT_THAT(JudgePeers({}), Is(kSkipped));
  EXPECT_THAT(JudgePeers({{0, 1, true, 300e9}, {1, 0, true, 310e9}}), Is(kOk, "2 of 2 ways direct"));
  EXPECT_THAT(JudgePeers({{0, 1, false, 10e9}, {1, 0, true, 300e9}}), Is(kWarning, "1 of 2", "ACS"));
  EXPECT_THAT(JudgePeers({{0, 1, true, 20e9}, {1, 0, true, 300e9}}), Is(kWarning, "GPU 0 to 1", "slower"));
}

TEST(JudgeNccl, ComparesHeaderAndLibrary) {
  EXPECT_THAT(JudgeNccl(0, 0), Is(kSkipped, "LONGFILL_NCCL"));
  EXPECT_THAT(JudgeNccl(22809, 0), Is(kFailed));
  EXPECT_THAT(JudgeNccl(22809, 22703), Is(kFailed));  // below what longfill needs
  EXPECT_THAT(JudgeNccl(23003, 22809), Is(kWarning));
  EXPECT_THAT(JudgeNccl(22809, 23003), Is(kOk));
  EXPECT_THAT(JudgeNccl(22809, 30000), Is(kFailed));
}

TEST(JudgeDeviceExchange, SaysHowAndHowFast) {
  EXPECT_THAT(JudgeDeviceExchange({CommunicatorKind::kNccl, "as asked for"}, 100e9, ""),
              Is(kOk, "NCCL (as asked for)"));
  EXPECT_THAT(JudgeDeviceExchange({CommunicatorKind::kNccl, "x"}, 0.5e9, ""), Is(kWarning, "", "NCCL_DEBUG"));
  EXPECT_THAT(JudgeDeviceExchange({CommunicatorKind::kStaged, "x"}, 0.5e9, ""),
              Is(kWarning, "host memory", "GPU of its own"));
  EXPECT_THAT(JudgeDeviceExchange({CommunicatorKind::kNccl, "x"}, 100e9, "bytes of rank 1 came changed"),
              Is(kFailed, "rank 1"));
}

}  // namespace
}  // namespace longfill
