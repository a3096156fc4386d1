#include "deploy/cli/bench_report.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "deploy/cli/figures.h"
#include "kernels/base/median.h"
#include "kernels/sparse/coverage.h"

namespace longfill {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kTera = 1e12;
constexpr double kGiga = 1e9;

double Density(const BenchReport& report, int64_t pairs) {
  const double heads = static_cast<double>(report.config.num_layers * report.config.num_q_heads);
  return static_cast<double>(pairs) / (heads * static_cast<double>(CausalPairs(report.num_tokens)));
}

double TokensPerSecond(const PrefillFigures& figures) {
  return figures.seconds > 0 ? static_cast<double>(figures.tokens) / figures.seconds : 0;
}

// Relative difference of the peak from the plan; 0 without a plan.
double PlanError(const PrefillFigures& figures) {
  if (figures.planned_device_bytes == 0) return 0;
  return static_cast<double>(figures.peak_device_bytes) / static_cast<double>(figures.planned_device_bytes) -
         1;
}

Json ToJson(const FloorFigures& floor, const CardRates& rates) {
  return {{"gemm_tflops", rates.gemm_tflops},       {"attention_tflops", rates.attention_tflops},
          {"memory_tbs", rates.memory_tbs},         {"copy_gbs", rates.copy_gbs},
          {"gemm_flop", floor.gemm_flop},           {"gemm_seconds", floor.gemm_seconds},
          {"attention_flop", floor.attention_flop}, {"attention_seconds", floor.attention_seconds},
          {"index_seconds", floor.index_seconds},   {"other_bytes", floor.other_bytes},
          {"other_seconds", floor.other_seconds},   {"copy_seconds", floor.copy_seconds}};
}

Json RunJson(const BenchReport& report, const BenchRun& run) {
  const PrefillFigures& figures = run.figures;
  const auto layers = static_cast<double>(report.config.num_layers);
  return {{"kv", run.kv_copied ? "discard" : "none"},
          {"seconds", figures.seconds},
          {"tokens_per_second", TokensPerSecond(figures)},
          {"index_seconds", figures.index_seconds},
          {"index_seconds_per_layer", figures.index_seconds / layers},
          {"attention_seconds", figures.attention_seconds},
          {"gemm_seconds", figures.gemm_seconds},
          {"other_seconds", figures.other_seconds},
          {"recall", figures.recall.rows > 0 ? ToJson(figures.recall) : Json()},  // null: nobody watched
          {"communication_seconds", figures.communication_seconds},
          {"exposed_communication_seconds", figures.exposed_communication_seconds},
          {"communicator", figures.communicator},
          {"imbalance", figures.imbalance},
          {"exposed_copy_seconds", figures.exposed_copy_seconds},
          {"published_pairs", figures.published_pairs},
          {"covered_pairs", figures.covered_pairs},
          {"computed_pairs", figures.computed_pairs},
          {"published_density", Density(report, figures.published_pairs)},
          {"covered_density", Density(report, figures.covered_pairs)},
          {"computed_density", Density(report, figures.computed_pairs)},
          {"kv_bytes", run.kv_copied ? figures.kv_bytes : 0},
          {"kv_checksums", figures.rank_kv_checksums},
          {"peak_device_bytes", figures.peak_device_bytes},
          {"planned_device_bytes", figures.planned_device_bytes},
          {"held_device_bytes", figures.held_device_bytes},
          {"outside_device_bytes", figures.outside_device_bytes},
          {"peak_memory_bytes", figures.peak_memory_bytes},
          {"floor",
           ToJson(ComputeFloor(report.config, figures, report.selecting_heads, report.rates), report.rates)}};
}

// A part of the time with its floor; no floor, no gap.
std::string PartLine(const char* name, double seconds, double floor_seconds) {
  if (floor_seconds <= 0) return absl::StrFormat("  %-13s %9.3f s\n", name, seconds);
  return absl::StrFormat("  %-13s %9.3f s   floor %9.3f s   %.2f times\n", name, seconds, floor_seconds,
                         seconds / floor_seconds);
}

std::string PairsLine(const BenchReport& report, const char* name, int64_t pairs) {
  return absl::StrFormat("  %-13s %18d pairs   density %.5f\n", name, pairs, Density(report, pairs));
}

std::string RunText(const BenchReport& report, const BenchRun& run) {
  const PrefillFigures& figures = run.figures;
  const FloorFigures floor = ComputeFloor(report.config, figures, report.selecting_heads, report.rates);
  std::string text = absl::StrFormat("%s: %.3f s, %.0f tokens/s\n",
                                     run.kv_copied ? "K and V copied out" : "no copy of K and V",
                                     figures.seconds, TokensPerSecond(figures));
  text += PartLine("index", figures.index_seconds, floor.index_seconds);
  text += PartLine("attention", figures.attention_seconds, floor.attention_seconds);
  text += PartLine("GEMM", figures.gemm_seconds, floor.gemm_seconds);
  text += PartLine("other", figures.other_seconds, floor.other_seconds);
  if (figures.recall.rows > 0) {
    text += absl::StrFormat("  recall monitor %8.3f s   %.2f %% of the pairs, mean recall %.4f\n",
                            figures.recall.seconds, 100 * figures.recall.pair_share, figures.recall.mean);
  }
  if (figures.ranks > 1) {
    text += PartLine("communication", figures.communication_seconds, 0);
    text += PartLine("  exposed", figures.exposed_communication_seconds, 0);
  }
  if (run.kv_copied) text += PartLine("exposed copy", figures.exposed_copy_seconds, 0);
  text += PairsLine(report, "published", figures.published_pairs);
  text += PairsLine(report, "covered", figures.covered_pairs);
  text += PairsLine(report, "computed", figures.computed_pairs);
  text += absl::StrFormat("  device memory %s at most, %s planned (%+.2f %%), %s outside our pools\n",
                          FormatBytes(figures.peak_device_bytes), FormatBytes(figures.planned_device_bytes),
                          100 * PlanError(figures), FormatBytes(figures.outside_device_bytes));
  if (run.kv_copied) {
    text += absl::StrFormat("  KV            %s, %.3f s at %.0f GB/s, CRC-32C", FormatBytes(figures.kv_bytes),
                            floor.copy_seconds, report.rates.copy_gbs);
    for (const uint32_t checksum : figures.rank_kv_checksums) text += absl::StrFormat(" %08x", checksum);
    text += "\n";
  }
  return text;
}

}  // namespace

int64_t SelectingHeads(const PatternSet& patterns) {
  int64_t heads = 0;
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    for (const HeadPattern& pattern : patterns.layer(layer)) {
      heads += std::holds_alternative<VerticalSlash>(pattern) ? 1 : 0;
    }
  }
  return heads;
}

FloorFigures ComputeFloor(const ModelConfig& config, const PrefillFigures& figures, int64_t selecting_heads,
                          const CardRates& rates) {
  const auto tokens = static_cast<double>(figures.tokens);
  const auto layers = static_cast<double>(config.num_layers);
  const auto hidden = static_cast<double>(config.hidden_size);
  const auto inner = static_cast<double>(config.intermediate_size);
  const auto head_dim = static_cast<double>(config.head_dim);
  const double q_width = static_cast<double>(config.num_q_heads) * head_dim;
  const double kv_width = static_cast<double>(config.num_kv_heads) * head_dim;
  const auto value_bytes = static_cast<double>(DTypeBytes(figures.compute_dtype));
  const double ranks = std::max(1, figures.ranks);
  FloorFigures floor;
  const double layer_weights = hidden * (2 * q_width + 2 * kv_width + 3 * inner);
  floor.gemm_flop =
      (2 * tokens * layers * layer_weights + 2 * hidden * static_cast<double>(config.vocab_size)) / ranks;
  floor.gemm_seconds = floor.gemm_flop / (rates.gemm_tflops * kTera);
  floor.attention_flop = 4 * head_dim * static_cast<double>(figures.covered_pairs) / ranks;
  floor.attention_seconds = floor.attention_flop / (rates.attention_tflops * kTera);

  const double layers_that_select =
      static_cast<double>(selecting_heads) / static_cast<double>(config.num_q_heads);
  const double key_bytes = layers_that_select * tokens * kv_width * value_bytes / ranks;
  const double queries = std::min(tokens, static_cast<double>(kMaxSelectingQueries));
  const double score_flop = 2 * queries * tokens * head_dim * static_cast<double>(selecting_heads) / ranks;
  floor.index_seconds =
      2 * std::max(key_bytes / (rates.memory_tbs * kTera), score_flop / (rates.gemm_tflops * kTera));

  // Each norm reads and writes a row, rotary Q, K and V; the activation reads two values and writes one.
  floor.other_bytes =
      value_bytes * tokens * layers * (4 * hidden + 2 * (q_width + 2 * kv_width) + 3 * inner) / ranks;
  floor.other_seconds = floor.other_bytes / (rates.memory_tbs * kTera);
  floor.copy_seconds = static_cast<double>(figures.kv_bytes) / ranks / (rates.copy_gbs * kGiga);
  return floor;
}

double BenchReport::Slowdown(double PrefillFigures::*part) const {
  std::vector<double> copied;
  std::vector<double> kept;
  for (const BenchRun& run : runs) (run.kv_copied ? copied : kept).push_back(run.figures.*part);
  if (copied.empty() || kept.empty()) return 0;
  const double base = Median(kept);
  return base > 0 ? Median(copied) / base - 1 : 0;
}

std::string BenchReport::ToJson() const {
  Json list = Json::array();
  for (const BenchRun& run : runs) list.push_back(RunJson(*this, run));
  const PrefillFigures& first = runs.front().figures;
  Json json = {{"geometry", geometry},
               {"tokens", num_tokens},
               {"device", first.device},
               {"compute_dtype", std::string(DTypeName(first.compute_dtype))},
               {"ranks", first.ranks},
               {"attention", first.attention},
               {"indices", indices.empty() ? Json("built") : Json(indices)},
               {"seed", seed},
               {"setup_seconds", setup_seconds},
               {"runs", std::move(list)}};
  if (std::any_of(runs.begin(), runs.end(), [](const BenchRun& run) { return !run.kv_copied; }) &&
      runs.front().kv_copied) {
    json["kv_copy"] = {{"attention_slowdown", Slowdown(&PrefillFigures::attention_seconds)},
                       {"gemm_slowdown", Slowdown(&PrefillFigures::gemm_seconds)},
                       {"slowdown", Slowdown(&PrefillFigures::seconds)}};
  }
  return json.dump(1);
}

std::string BenchReport::ToText() const {
  const PrefillFigures& first = runs.front().figures;
  std::string text = absl::StrFormat("%s, %d tokens, %s in %s, %s, seed %d, ready after %.1f s\n", geometry,
                                     num_tokens, first.device, std::string(DTypeName(first.compute_dtype)),
                                     first.attention, seed, setup_seconds);
  if (!indices.empty()) {
    absl::StrAppend(&text, "indices: built and dropped, those of ", indices, " are used\n");
  } else if (selecting_heads > 0) {
    absl::StrAppend(
        &text, "indices: as built, from random weights, whose selections are not those of a trained model\n");
  }
  for (const BenchRun& run : runs) text += RunText(*this, run);
  const bool compared =
      runs.front().kv_copied &&
      std::any_of(runs.begin(), runs.end(), [](const BenchRun& run) { return !run.kv_copied; });
  if (compared) {
    text += absl::StrFormat(
        "the copy of K and V slows attention by %.2f %%, GEMM by %.2f %%, all by %.2f %%\n",
        100 * Slowdown(&PrefillFigures::attention_seconds), 100 * Slowdown(&PrefillFigures::gemm_seconds),
        100 * Slowdown(&PrefillFigures::seconds));
  }
  return text;
}

}  // namespace longfill
