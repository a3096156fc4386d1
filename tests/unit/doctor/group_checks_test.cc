#include "deploy/doctor/group_checks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
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

TEST(JudgeBuilds, NamesTheRanksThatDiffer) {
  EXPECT_THAT(JudgeBuilds({"0.1 (a)", "0.1 (a)"}), Is(kOk, "0.1 (a)"));
  EXPECT_THAT(JudgeBuilds({"0.1 (a)", "0.1 (b)", "0.1 (a)"}),
              Is(kFailed, "ranks 0,2: 0.1 (a); rank 1: 0.1 (b)", "one build"));
}

TEST(JudgeMpiLibrary, ComparesNameAndVersion) {
  EXPECT_THAT(JudgeMpiLibrary("Open MPI 4.1.4", "Open MPI v4.1.4"), Is(kOk, "Open MPI v4.1.4"));
  EXPECT_THAT(JudgeMpiLibrary("Open MPI 4.1.4", "Open MPI v5.0.2rc1"),
              Is(kWarning, "compiled with Open MPI 4.1.4"));
  EXPECT_THAT(JudgeMpiLibrary("Open MPI 4.1.4", "MPICH Version: 4.0.2"),
              Is(kFailed, "MPICH", "LD_LIBRARY_PATH"));
  EXPECT_THAT(JudgeMpiLibrary("MPICH 4.0.2", "MPICH Version:      4.0.2"), Is(kOk));
  EXPECT_THAT(JudgeMpiLibrary("MPICH 4.0.2", "Intel(R) MPI Library 2021.11"), Is(kWarning));
  EXPECT_THAT(JudgeMpiLibrary("MPI 3.1", "Some MPI 9"), Is(kOk));  // a header without a name
  EXPECT_THAT(JudgeMpiLibrary("", ""), Is(kSkipped, "LONGFILL_MPI"));
}

TEST(JudgeMpiAgreement, WantsOneLibrary) {
  EXPECT_THAT(JudgeMpiAgreement({"a", "a"}), Is(kOk));
  EXPECT_THAT(JudgeMpiAgreement({"a", "a", "b"}), Is(kFailed, "ranks 0-1: a; rank 2: b"));
}

TEST(JudgeThreadLevel, WantsSerialized) {
  EXPECT_THAT(JudgeThreadLevel("MPI_THREAD_SERIALIZED"), Is(kOk));
  EXPECT_THAT(JudgeThreadLevel("MPI_THREAD_MULTIPLE"), Is(kOk));
  EXPECT_THAT(JudgeThreadLevel("MPI_THREAD_SINGLE"), Is(kFailed, "SINGLE"));
  EXPECT_THAT(JudgeThreadLevel(""), Is(kSkipped));
}

TEST(JudgeReduction, SaysWhatIsWrong) {
  EXPECT_THAT(JudgeReduction("", 3), Is(kOk, "3 ranks"));
  EXPECT_THAT(JudgeReduction("a sum of integers is 5", 3), Is(kFailed, "is 5", "corrupts"));
}

TEST(JudgeLatency, HasALimitForEachDistance) {
  EXPECT_THAT(JudgeLatency(20e-6, false), Is(kOk, "20 us"));
  EXPECT_THAT(JudgeLatency(10e-3, false), Is(kWarning, "10000 us", "cpu.cores"));
  EXPECT_THAT(JudgeLatency(10e-3, true), Is(kOk));
  EXPECT_THAT(JudgeLatency(50e-3, true), Is(kWarning));
}

TEST(JudgeLinks, TellsThoseInsideHostsFromThoseBetween) {
  const std::vector<std::string> hosts = {"a", "a", "b"};
  EXPECT_THAT(
      JudgeLinks({{0, 1, 5e9}, {1, 0, 6e9}, {0, 2, 1e9}, {2, 0, 1e9}}, hosts),
      ElementsAre(Is(kOk, "inside hosts: 5.0 GB/s (rank 0 to 1)"), Is(kOk, "between hosts: 1.0 GB/s")));
  EXPECT_THAT(JudgeLinks({{0, 2, 11e6}}, hosts),
              ElementsAre(Is(kWarning, "11.0 MB/s", "btl_tcp_if_include")));
  EXPECT_THAT(JudgeLinks({{0, 1, 100e6}}, hosts), ElementsAre(Is(kWarning, "inside hosts", "shared memory")));
}

TEST(JudgeLinks, NamesOneThatIsMuchSlower) {
  const std::vector<std::string> hosts = {"a", "b", "c", "d"};
  EXPECT_THAT(JudgeLinks({{0, 1, 12e9}, {1, 2, 12e9}, {2, 3, 1e9}, {3, 0, 12e9}}, hosts),
              ElementsAre(Is(kWarning, "1.0 GB/s (rank 2 to 3)", "from rank 2 to 3")));
}

TEST(JudgeLinks, FailsWhereBytesChange) {
  EXPECT_THAT(JudgeLinks({{0, 1, 5e9}, {1, 0, 5e9, false}}, {"a", "a"}),
              ElementsAre(Is(kFailed, "from rank 1 to 0 came changed")));
}

TEST(JudgeClock, AllowsASecondAndItsOwnUncertainty) {
  EXPECT_THAT(JudgeClock({0.2, 0.001}), Is(kOk, "+0.200 s"));
  EXPECT_THAT(JudgeClock({5, 0.001}), Is(kWarning, "+5.000 s", "NTP"));
  EXPECT_THAT(JudgeClock({-5, 0.001}), Is(kWarning, "-5.000 s"));
  EXPECT_THAT(JudgeClock({1.5, 2}), Is(kOk));  // a slow network, not a wrong clock
}

}  // namespace
}  // namespace longfill
