// What `bench scaling` says of its runs.

#include "deploy/cli/scaling_report.h"

#include <nlohmann/json.hpp>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::HasSubstr;

ScalingRun RunOn(const Mesh& mesh, double seconds) {
  ScalingRun run{.mesh = mesh};
  run.figures.seconds = seconds;
  run.figures.imbalance = 1.25;
  run.figures.mean_seconds = {1, 2, 3, 4, 5};
  run.figures.bytes.network = 7e9;
  run.copied = {.bytes = 6'000'000'000, .seconds = 2};
  return run;
}

TEST(ScalingReportTest, EfficiencyIsAgainstOneRank) {
  ScalingReport report{.runs = {RunOn({2, 2}, 4)}};
  EXPECT_EQ(report.Efficiency(report.runs[0]), std::nullopt);
  EXPECT_TRUE(nlohmann::json::parse(report.ToJson())["runs"][0]["efficiency"].is_null());
  report.runs.push_back(RunOn({1, 1}, 12));
  EXPECT_EQ(report.Efficiency(report.runs[0]), 0.75);
  EXPECT_EQ(report.Efficiency(report.runs[1]), 1);
  const nlohmann::json json = nlohmann::json::parse(report.ToJson());
  EXPECT_EQ(json["runs"][0]["efficiency"], 0.75);
  EXPECT_EQ(json["runs"][0]["index_seconds"]["mean"], 3);
  EXPECT_EQ(json["runs"][0]["copied_gbs"], 3);
  EXPECT_TRUE(json["indices"].is_null());
}

TEST(ScalingReportTest, TheTextNamesTheMeshAndTheLinks) {
  ScalingReport report{.geometry = "llama3-8b",
                       .num_layers = 32,
                       .executed_layers = 8,
                       .runs = {RunOn({1, 1}, 12), RunOn({2, 2}, 4)}};
  EXPECT_THAT(report.HeadText(), HasSubstr("8 of 32 layers"));
  EXPECT_THAT(report.HeadText(), HasSubstr("nodes of 8"));
  const std::string text = report.RunText(report.runs[1]);
  for (const char* words : {"4 ranks, sequence=2,head=2: 4.000 s", "efficiency 0.750", "imbalance 1.250",
                            "7.000 GB between nodes", "6.000 GB copied at 3.0 GB/s"}) {
    EXPECT_THAT(text, HasSubstr(words));
  }
}

}  // namespace
}  // namespace longfill
