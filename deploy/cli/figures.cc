#include "deploy/cli/figures.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "deploy/doctor/finding.h"

namespace longfill {
namespace {

// Eight hex digits for each rank.
std::vector<std::string> Checksums(const PrefillFigures& figures) {
  std::vector<std::string> texts;
  for (const uint32_t checksum : figures.rank_kv_checksums)
    texts.push_back(absl::StrFormat("%08x", checksum));
  return texts;
}

nlohmann::ordered_json ToJson(const LayerRecall& layer) {
  nlohmann::ordered_json json;
  const auto least = std::ranges::min_element(layer.heads);
  json["mean"] =
      std::accumulate(layer.heads.begin(), layer.heads.end(), 0.0) / static_cast<double>(layer.heads.size());
  json["min"] = *least;
  json["min_head"] = least - layer.heads.begin();
  json["watched"] = layer.watched;
  json["heads"] = layer.heads;
  json["recomputed"] = nlohmann::ordered_json::array();
  for (const RecomputedHead& head : layer.recomputed) {
    json["recomputed"].push_back({{"head", head.head},
                                  {"pattern", ToString(head.pattern)},
                                  {"recall_before", head.recall_before},
                                  {"recall", head.recall},
                                  {"density", head.density}});
  }
  return json;
}

}  // namespace

nlohmann::ordered_json ToJson(const RecallFigures& recall) {
  nlohmann::ordered_json json = {{"rows", recall.rows},
                                 {"min_recall", recall.min_recall},
                                 {"mean", recall.mean},
                                 {"min", recall.min},
                                 {"min_layer", recall.min_layer},
                                 {"min_head", recall.min_head},
                                 {"recomputed", recall.recomputed},
                                 {"seconds", recall.seconds},
                                 {"pair_share", recall.pair_share},
                                 {"layers", nlohmann::ordered_json::array()}};
  for (const LayerRecall& layer : recall.layers) json["layers"].push_back(ToJson(layer));
  return json;
}

namespace {

nlohmann::ordered_json ToJson(const PrefillFigures& figures) {
  nlohmann::ordered_json json = {
      {"tokens", figures.tokens},
      {"ranks", figures.ranks},
      {"mesh", {{"sequence", figures.mesh.sequence}, {"head", figures.mesh.head}}},
      {"attention", figures.attention},
      {"seconds", figures.seconds},
      {"index_seconds", figures.index_seconds},
      {"attention_seconds", figures.attention_seconds},
      {"linear_seconds", figures.linear_seconds},
      {"gemm_seconds", figures.gemm_seconds},
      {"other_seconds", figures.other_seconds},
      {"communication_seconds", figures.communication_seconds},
      {"exposed_communication_seconds", figures.exposed_communication_seconds},
      {"exposed_copy_seconds", figures.exposed_copy_seconds},
      {"published_pairs", figures.published_pairs},
      {"covered_pairs", figures.covered_pairs},
      {"computed_pairs", figures.computed_pairs},
      {"density", figures.density},
      {"rank_covered_pairs", figures.rank_covered_pairs},
      {"imbalance", figures.imbalance},
      {"kv_bytes", figures.kv_bytes},
      {"peak_memory_bytes", figures.peak_memory_bytes},
      {"peak_device_bytes", figures.peak_device_bytes},
      {"planned_device_bytes", figures.planned_device_bytes},
      {"outside_device_bytes", figures.outside_device_bytes},
      {"device", figures.device},
      {"communicator", figures.communicator},
      {"compute_dtype", std::string(DTypeName(figures.compute_dtype))},
  };
  if (!figures.rank_kv_checksums.empty()) json["rank_kv_crc32c"] = Checksums(figures);
  if (figures.recall.rows > 0) json["recall"] = ToJson(figures.recall);
  return json;
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
  std::string text = absl::StrFormat(
      "%d tokens in %.2f s (%.0f tokens/s; index %.2f s, attention %.2f s, GEMM %.2f s, other %.2f s, "
      "communication %.2f s, exposed %.2f s, exposed copy %.2f s), %s, density %.4f, imbalance %.3f, KV %s, ",
      figures.tokens, figures.seconds, rate, figures.index_seconds, figures.attention_seconds,
      figures.gemm_seconds, figures.other_seconds, figures.communication_seconds,
      figures.exposed_communication_seconds, figures.exposed_copy_seconds, figures.attention, figures.density,
      figures.imbalance, FormatBytes(figures.kv_bytes));
  if (!figures.rank_kv_checksums.empty()) {
    absl::StrAppend(&text, "KV CRC-32C ", absl::StrJoin(Checksums(figures), " "), ", ");
  }
  if (const RecallFigures& recall = figures.recall; recall.rows > 0) {
    absl::StrAppendFormat(&text, "recall %.4f, least %.4f (layer %d, head %d), %d heads computed again, ",
                          recall.mean, recall.min, recall.min_layer, recall.min_head, recall.recomputed);
  }
  // Outside bytes are those of a GPU, whose memory is not in the resident set.
  if (figures.outside_device_bytes > 0) {
    absl::StrAppend(&text, "peak device memory ",
                    FormatBytes(figures.peak_device_bytes + figures.outside_device_bytes), " (planned ",
                    FormatBytes(figures.planned_device_bytes + figures.outside_device_bytes), "), ");
  }
  absl::StrAppend(&text, "peak memory ", FormatBytes(figures.peak_memory_bytes), " a rank, mesh ",
                  ToString(figures.mesh), " over ", figures.communicator, ", ", figures.device, " in ",
                  std::string(DTypeName(figures.compute_dtype)));
  return text;
}

std::string FormatBytes(int64_t bytes) { return Scaled(static_cast<double>(bytes), "B"); }

}  // namespace longfill
