// Floor times of a prefill: counted here from the definition, for one shape by hand.

#include "deploy/cli/bench_report.h"

#include <nlohmann/json.hpp>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::HasSubstr;
using testing::Not;

// 2 layers, hidden 8, 4 query heads and 2 KV heads of 16, MLP 24, vocabulary 100.
ModelConfig SmallConfig() {
  ModelConfig config;
  config.num_layers = 2;
  config.hidden_size = 8;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.intermediate_size = 24;
  config.vocab_size = 100;
  return config;
}

PrefillFigures SmallFigures() {
  PrefillFigures figures;
  figures.tokens = 1000;
  figures.ranks = 1;
  figures.device = "a card";
  figures.attention = "dense";
  figures.compute_dtype = DType::kBFloat16;
  figures.covered_pairs = 500;
  figures.kv_bytes = 55'000'000'000;
  figures.seconds = 2;
  figures.attention_seconds = 1;
  figures.gemm_seconds = 0.5;
  return figures;
}

TEST(BenchFloor, CountsTheWorkOfEveryPart) {
  const CardRates rates = {.gemm_tflops = 1, .attention_tflops = 2, .memory_tbs = 1, .copy_gbs = 55};
  const FloorFigures floor = ComputeFloor(SmallConfig(), SmallFigures(), /*selecting_heads=*/4, rates);
  // Weights of a layer: Q 64 x 8, K and V 32 x 8 each, output 8 x 64, gate, up and down 24 x 8 each.
  const double weights = 512 + 2 * 256 + 512 + 3 * 192;
  EXPECT_DOUBLE_EQ(floor.gemm_flop, 2 * 1000 * 2 * weights + 2 * 8 * 100);
  EXPECT_DOUBLE_EQ(floor.gemm_seconds, floor.gemm_flop / 1e12);
  EXPECT_DOUBLE_EQ(floor.attention_flop, 4.0 * 16 * 500);  // q k and p v, a product and a sum each
  EXPECT_DOUBLE_EQ(floor.attention_seconds, floor.attention_flop / 2e12);
  // One layer's worth of heads selects: 64 queries against 1000 keys, twice; the keys are 1000 x 32 bf16.
  EXPECT_DOUBLE_EQ(floor.index_seconds, 2 * std::max(2.0 * 64 * 1000 * 16 * 4, 1000.0 * 32 * 2) / 1e12);
  // Two norms read and write 8, rotary Q 64 and K, V 32; the activation reads 48 and writes 24.
  EXPECT_DOUBLE_EQ(floor.other_bytes, 2.0 * 1000 * 2 * (2 * 16 + 2 * (64 + 64) + 72));
  EXPECT_DOUBLE_EQ(floor.copy_seconds, 1.0);
}

TEST(BenchFloor, IsThatOfOneRank) {
  PrefillFigures figures = SmallFigures();
  const FloorFigures one = ComputeFloor(SmallConfig(), figures, 4, {});
  figures.ranks = 2;
  const FloorFigures two = ComputeFloor(SmallConfig(), figures, 4, {});
  EXPECT_DOUBLE_EQ(two.gemm_seconds, one.gemm_seconds / 2);
  EXPECT_DOUBLE_EQ(two.attention_seconds, one.attention_seconds / 2);
  EXPECT_DOUBLE_EQ(two.index_seconds, one.index_seconds / 2);
  EXPECT_DOUBLE_EQ(two.copy_seconds, one.copy_seconds / 2);
}

BenchReport Report(const std::vector<std::pair<bool, double>>& attention_seconds) {
  BenchReport report;
  report.geometry = "small";
  report.config = SmallConfig();
  report.num_tokens = 1000;
  for (const auto& [copied, seconds] : attention_seconds) {
    BenchRun run = {copied, SmallFigures()};
    run.figures.attention_seconds = seconds;
    report.runs.push_back(run);
  }
  return report;
}

TEST(BenchReport, ComparesMediansOfRunsWithAndWithoutTheCopy) {
  EXPECT_DOUBLE_EQ(Report({{true, 3}, {false, 2}}).Slowdown(&PrefillFigures::attention_seconds), 0.5);
  const BenchReport report =
      Report({{true, 1.5}, {false, 1}, {false, 9}, {true, 1.7}, {true, 7}, {false, 1}});
  EXPECT_NEAR(report.Slowdown(&PrefillFigures::attention_seconds), 0.7, 1e-12);
  EXPECT_DOUBLE_EQ(report.Slowdown(&PrefillFigures::gemm_seconds), 0);
  const auto json = nlohmann::json::parse(report.ToJson());
  EXPECT_NEAR(json["kv_copy"]["attention_slowdown"].get<double>(), 0.7, 1e-12);
  EXPECT_EQ(json["runs"].size(), 6u);
  EXPECT_EQ(json["runs"][1]["kv"], "none");
  EXPECT_EQ(json["runs"][1]["kv_bytes"], 0);
  EXPECT_THAT(report.ToText(), HasSubstr("slows attention by 70.00 %"));
}

TEST(BenchReport, SaysWhoseIndicesAttentionUsed) {
  BenchReport report = Report({{true, 1}});
  EXPECT_THAT(report.ToText(), Not(HasSubstr("indices")));  // nothing is selected
  EXPECT_FALSE(nlohmann::json::parse(report.ToJson()).contains("kv_copy"));
  report.selecting_heads = 3;
  EXPECT_THAT(report.ToText(), HasSubstr("indices: as built, from random weights"));
  EXPECT_EQ(nlohmann::json::parse(report.ToJson())["indices"], "built");
  report.indices = "recorded.safetensors";
  EXPECT_THAT(report.ToText(), HasSubstr("built and dropped, those of recorded.safetensors"));
  EXPECT_EQ(nlohmann::json::parse(report.ToJson())["indices"], "recorded.safetensors");
}

}  // namespace
}  // namespace longfill
