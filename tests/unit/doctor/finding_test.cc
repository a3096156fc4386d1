#include "deploy/doctor/finding.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

Finding Of(std::vector<int> ranks, Finding finding) {
  finding.ranks = std::move(ranks);
  return finding;
}

TEST(RankList, JoinsNeighbours) {
  EXPECT_EQ(RankList({}), "");
  EXPECT_EQ(RankList({3}), "3");
  EXPECT_EQ(RankList({0, 1, 2, 5, 7, 8}), "0-2,5,7-8");
}

TEST(ByRank, SaysEqualTextsOnce) {
  EXPECT_EQ(ByRank({"a", "a", "a"}), "a");
  EXPECT_EQ(ByRank({"a", "b", "a"}), "ranks 0,2: a; rank 1: b");
}

TEST(ByHost, NamesHostsInTheOrderOfTheirFirstRank) {
  EXPECT_EQ(ByHost({"b", "b", "a", "b"}, {0, 1, 2, 3}), "b 0-1,3, a 2");
  EXPECT_EQ(ByHost({"b", "b", "a", "b"}, {2}), "a 2");
}

TEST(Scaled, HasOneDigitAndPowersOfThousand) {
  EXPECT_EQ(Scaled(0, "B"), "0 B");
  EXPECT_EQ(Scaled(999, "B"), "999 B");
  EXPECT_EQ(Scaled(1000, "B"), "1.0 kB");
  EXPECT_EQ(Scaled(12.34e9, "B/s"), "12.3 GB/s");
  EXPECT_EQ(Scaled(5e17, "B"), "500000.0 TB");
}

TEST(Findings, GoFromRankToRankUnchanged) {
  const std::vector<Finding> findings = {Of({0, 2}, Warning("a.b", "line\n\"quoted\"", "do ä")),
                                         Of({}, Skipped("c.d", "why"))};
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<Finding> got, FindingsFromText(FindingsToText(findings)));
  EXPECT_EQ(got, findings);
}

TEST(Findings, OfAnotherFormAreRefused) {
  for (const char* text : {"", "nonsense", "[[1,2,3]]", R"([["a",9,"v","",[0]]])", R"([["a",-1,"v","",[0]]])",
                           R"([["a",0,"v","",["x"]]])"}) {
    EXPECT_THAT(FindingsFromText(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("finding")))
        << text;
  }
}

TEST(DoctorReport, JoinsEqualFindingsAndKeepsChecksTogether) {
  DoctorReport report;
  report.Add({Of({0}, Ok("x", "1")), Of({0}, Ok("y", "1"))});
  report.Add({Of({2}, Ok("x", "1")), Of({1}, Ok("x", "2")), Of({1}, Ok("y", "1"))});
  EXPECT_THAT(report.findings(),
              ElementsAre(Of({0, 2}, Ok("x", "1")), Of({1}, Ok("x", "2")), Of({0, 1}, Ok("y", "1"))));
}

TEST(DoctorReport, SaysPlaceValueAndAdvice) {
  DoctorReport report;
  report.Add(
      {Of({0, 1, 2}, Ok("cpu.cores", "plenty")), Of({2}, Failed("memory.shm", "64 MB", "enlarge it"))});
  const ReportHeader header{"1.2", "abc", "mpirun", "cpu", {"a", "a", "b"}};
  const std::string text = report.ToText(header);
  EXPECT_THAT(text,
              HasSubstr("longfill 1.2 (commit abc), device cpu, started by mpirun; ranks: a 0-1, b 2\n"));
  EXPECT_THAT(text, HasSubstr("ok       cpu.cores   all  plenty\n"));
  EXPECT_THAT(text, HasSubstr("failed   memory.shm  b 2  64 MB\n         -> enlarge it\n"));
  EXPECT_THAT(text, HasSubstr("1 failed, 0 warnings, 1 ok, 0 skipped\n"));

  const nlohmann::json json = nlohmann::json::parse(report.ToJson(header));
  EXPECT_EQ(json["ranks"], 3);
  EXPECT_EQ(json["failed"], 1);
  EXPECT_EQ(json["ok"], 1);
  EXPECT_EQ(json["hosts"], nlohmann::json::parse(R"([{"host":"a","ranks":[0,1]},{"host":"b","ranks":[2]}])"));
  EXPECT_EQ(json["findings"][1]["where"], nlohmann::json::parse(R"([{"host":"b","ranks":[2]}])"));
  EXPECT_EQ(json["findings"][1]["result"], "failed");
}

TEST(DoctorReport, IsJsonAlsoWhereANameIsNotUtf8) {
  DoctorReport report;
  report.Add({Of({0}, Ok("x", "\xff"))});
  EXPECT_NO_THROW(nlohmann::json::parse(report.ToJson({"1", "c", "", "cpu", {"h\xfe"}})));
}

}  // namespace
}  // namespace longfill
