#include "deploy/cli/figures.h"

#include <array>
#include <nlohmann/json.hpp>

#include "absl/strings/str_format.h"

namespace longfill {
namespace {

nlohmann::ordered_json ToJson(const PrefillFigures& figures) {
  return {
      {"tokens", figures.tokens},
      {"ranks", figures.ranks},
      {"mesh", {{"sequence", figures.mesh.sequence}, {"head", figures.mesh.head}}},
      {"attention", figures.attention},
      {"seconds", figures.seconds},
      {"index_seconds", figures.index_seconds},
      {"attention_seconds", figures.attention_seconds},
      {"linear_seconds", figures.linear_seconds},
      {"communication_seconds", figures.communication_seconds},
      {"published_pairs", figures.published_pairs},
      {"covered_pairs", figures.covered_pairs},
      {"computed_pairs", figures.computed_pairs},
      {"density", figures.density},
      {"rank_covered_pairs", figures.rank_covered_pairs},
      {"imbalance", figures.imbalance},
      {"kv_bytes", figures.kv_bytes},
      {"peak_memory_bytes", figures.peak_memory_bytes},
  };
}

}  // namespace

std::string FiguresToJson(const std::vector<PrefillFigures>& prompts) {
  if (prompts.size() == 1) return ToJson(prompts[0]).dump(1);
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const PrefillFigures& figures : prompts) list.push_back(ToJson(figures));
  return nlohmann::ordered_json{{"prompts", std::move(list)}}.dump(1);
}

std::string FiguresToText(const PrefillFigures& figures) {
  const double rate = figures.seconds > 0 ? static_cast<double>(figures.tokens) / figures.seconds : 0;
  return absl::StrFormat(
      "%d tokens in %.2f s (%.0f tokens/s; index %.2f s, attention %.2f s, linear %.2f s, communication %.2f "
      "s), "
      "%s, density %.4f, imbalance %.3f, KV %s, peak memory %s a rank, mesh %s",
      figures.tokens, figures.seconds, rate, figures.index_seconds, figures.attention_seconds,
      figures.linear_seconds, figures.communication_seconds, figures.attention, figures.density,
      figures.imbalance, FormatBytes(figures.kv_bytes), FormatBytes(figures.peak_memory_bytes),
      ToString(figures.mesh));
}

std::string FormatBytes(int64_t bytes) {
  constexpr std::array kUnits = {"B", "kB", "MB", "GB", "TB", "PB"};
  auto value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1000 && unit + 1 < kUnits.size()) {
    value /= 1000;
    ++unit;
  }
  return unit == 0 ? absl::StrFormat("%d B", bytes) : absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

}  // namespace longfill
