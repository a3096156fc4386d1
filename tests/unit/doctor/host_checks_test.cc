#include "deploy/doctor/host_checks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "deploy/doctor/host_probe.h"

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::Field;
using ::testing::HasSubstr;

constexpr int64_t kMiB = int64_t{1} << 20;

auto Is(CheckResult result, const std::string& value = "", const std::string& advice = "") {
  return AllOf(Field(&Finding::result, result), Field(&Finding::value, HasSubstr(value)),
               Field(&Finding::advice, HasSubstr(advice)));
}
constexpr CheckResult kOk = CheckResult::kOk;
constexpr CheckResult kWarning = CheckResult::kWarning;
constexpr CheckResult kFailed = CheckResult::kFailed;
constexpr CheckResult kSkipped = CheckResult::kSkipped;

HostFacts Host(int cores, double quota = 0) {
  HostFacts facts;
  facts.cores = cores;
  facts.quota_cores = quota;
  return facts;
}

TEST(JudgeCores, WantsACoreForEachRank) {
  EXPECT_THAT(JudgeCores(Host(8), 8, 8), Is(kOk, "8 ranks on 8 cores"));
  EXPECT_THAT(JudgeCores(Host(2), 2, 3), Is(kWarning, "3 ranks on 2 cores", "at most 2"));
  // All ranks were bound to one core.
  EXPECT_THAT(JudgeCores(Host(8), 1, 4), Is(kWarning, "4 ranks on 1 core of 8", "--bind-to none"));
}

TEST(JudgeCores, SeesTheLimitOfAControlGroup) {
  EXPECT_THAT(JudgeCores(Host(64, 4), 64, 2), Is(kWarning, "time of 4.0", "--threads 2"));
  EXPECT_THAT(JudgeCores(Host(64, 1.5), 64, 2), Is(kWarning, "time of 1.5", "at most 1"));
  EXPECT_THAT(JudgeCores(Host(4, 4), 4, 2), Is(kOk));
}

TEST(JudgeBinding, WantsARanksShareOfTheHost) {
  EXPECT_THAT(JudgeBinding({0, 1, 2, 3}, 4, 1), Is(kOk, "not bound"));
  EXPECT_THAT(JudgeBinding({5}, 64, 2), Is(kWarning, "core 5 of 64", "share of the host is 32"));
  EXPECT_THAT(JudgeBinding({0, 1, 2, 3}, 8, 2), Is(kOk, "cores 0-3 of 8"));
  EXPECT_THAT(JudgeBinding({1}, 2, 3), Is(kOk));  // more ranks than cores: a core is its share
  EXPECT_THAT(JudgeBinding({}, 8, 1), Is(kSkipped));
}

TEST(JudgeInstructionSet, WarnsBelowAvx2) {
  for (const char* slow : {"SSE4", "SSSE3", "SSE2", "EMU128", "SCALAR"}) {
    EXPECT_THAT(JudgeInstructionSet(slow), Is(kWarning, slow)) << slow;
  }
  for (const char* fast : {"AVX2", "AVX3", "AVX3_ZEN4", "NEON", "SVE"}) {
    EXPECT_THAT(JudgeInstructionSet(fast), Is(kOk)) << fast;
  }
}

TEST(JudgeMemory, ComparesTheWeightsWithARanksShare) {
  const int64_t gib = 1024 * kMiB;
  EXPECT_THAT(JudgeMemory(20 * gib, 16 * gib, 2), Is(kOk));
  EXPECT_THAT(JudgeMemory(15 * gib, 16 * gib, 2), Is(kFailed, "weights take 17.2 GB", "--weights sharded"));
  EXPECT_THAT(JudgeMemory(16 * gib + 1, 16 * gib, 2), Is(kWarning, "", "inspect"));
  EXPECT_THAT(JudgeMemory(100 * kMiB, 0, 1), Is(kWarning));
}

TEST(JudgeLockedMemory, CountsForRdmaAlone) {
  EXPECT_THAT(JudgeLockedMemory(64 << 10, true), Is(kWarning, "65.5 kB", "ulimit -l unlimited"));
  EXPECT_THAT(JudgeLockedMemory(64 << 10, false), Is(kOk));
  EXPECT_THAT(JudgeLockedMemory(kUnlimited, true), Is(kOk, "unlimited"));
  EXPECT_THAT(JudgeLockedMemory(kUnknown, true), Is(kSkipped));
}

TEST(JudgeSharedMemory, KnowsWhatContainersGetByDefault) {
  EXPECT_THAT(JudgeSharedMemory(64 * kMiB, 64 * kMiB, 8, true), Is(kFailed, "free of 67.1 MB", "--shm-size"))
      << "eight GPUs do not fit";
  EXPECT_THAT(JudgeSharedMemory(64 * kMiB, 64 * kMiB, 4, false), Is(kWarning, "", "--shm-size"));
  EXPECT_THAT(JudgeSharedMemory(64 * kMiB, 64 * kMiB, 1, false), Is(kOk));
  EXPECT_THAT(JudgeSharedMemory(32768 * kMiB, 32000 * kMiB, 8, true), Is(kOk));
  EXPECT_THAT(JudgeSharedMemory(32768 * kMiB, 1 * kMiB, 8, true), Is(kFailed, "", "remove what"));
  EXPECT_THAT(JudgeSharedMemory(kUnknown, kUnknown, 2, false), Is(kFailed, "no /dev/shm"));
}

TEST(JudgeOpenFiles, WarnsAtTheUsualDefault) {
  EXPECT_THAT(JudgeOpenFiles(1024), Is(kWarning, "1024", "ulimit -n 4096"));
  EXPECT_THAT(JudgeOpenFiles(64), Is(kFailed));
  EXPECT_THAT(JudgeOpenFiles(1 << 20), Is(kOk));
  EXPECT_THAT(JudgeOpenFiles(kUnlimited), Is(kOk, "unlimited"));
}

TEST(JudgeHostNames, FindsTwoMachinesOfOneName) {
  EXPECT_THAT(JudgeHostNames({"a", "a", "b"}, {"1", "1", "2"}), Is(kOk, "2 hosts"));
  EXPECT_THAT(JudgeHostNames({"a", "b"}, {"1", "1"}), Is(kOk));  // containers of one machine
  EXPECT_THAT(JudgeHostNames({"node", "node", "node"}, {"1", "1", "2"}),
              Is(kFailed, "another machine, of rank 2, is called node as well", "a name of its own"));
}

TEST(QuotaOf, ReadsBothFormsOfControlGroups) {
  EXPECT_EQ(QuotaOf("150000 100000"), 1.5);
  EXPECT_EQ(QuotaOf("max 100000"), 0);
  EXPECT_EQ(QuotaOf("-1 100000"), 0);
  EXPECT_EQ(QuotaOf("100000 0"), 0);
  EXPECT_EQ(QuotaOf(" "), 0);
}

TEST(HostFacts, OfThisHostAreThere) {
  const HostFacts facts = ReadHostFacts();
  EXPECT_THAT(facts.kernel, HasSubstr("Linux "));
  EXPECT_GE(facts.cores, static_cast<int>(AllowedCores().size()));
  EXPECT_FALSE(AllowedCores().empty());
  EXPECT_GT(facts.memory_bytes, 0);
  EXPECT_NE(facts.open_files_limit, kUnknown);
  EXPECT_NE(facts.locked_limit_bytes, kUnknown);
  EXPECT_FALSE(facts.instruction_set.empty());
}

}  // namespace
}  // namespace longfill
