#include "deploy/cli/scaling_report.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace longfill {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kGiga = 1e9;
constexpr const char* kPartNames[kNumWorkParts] = {"attention", "gemm", "index", "other", "copy"};

double CopiedGbs(const LinkTraffic::Figures& copied) {
  return copied.seconds > 0 ? static_cast<double>(copied.bytes) / copied.seconds / kGiga : 0;
}

Json ReferencedJson(const std::optional<ReferencedKeys>& keys) {
  if (!keys.has_value()) return {};
  return {{"mean", keys->mean},
          {"least", keys->least},
          {"under_half", keys->under_half},
          {"by_kv_group", keys->by_kv_head}};
}

}  // namespace

std::optional<double> ScalingReport::Efficiency(const ScalingRun& run) const {
  const auto one = std::ranges::find_if(runs, [](const ScalingRun& r) { return r.mesh.size() == 1; });
  if (one == runs.end()) return std::nullopt;
  return one->figures.seconds / (run.mesh.size() * run.figures.seconds);
}

std::string ScalingReport::ToJson() const {
  Json list = Json::array();
  for (const ScalingRun& run : runs) {
    const ScalingFigures& figures = run.figures;
    const std::optional<double> efficiency = Efficiency(run);
    Json entry = {{"ranks", run.mesh.size()},
                  {"sequence", run.mesh.sequence},
                  {"head", run.mesh.head},
                  {"peer_copies", run.peer_copies},
                  {"seconds", figures.seconds},
                  {"efficiency", efficiency.has_value() ? Json(*efficiency) : Json()},
                  {"imbalance", figures.imbalance},
                  {"exposed_communication_seconds", figures.exposed_communication_seconds},
                  {"communication_seconds", figures.communication_seconds},
                  {"node_bytes", figures.bytes.node},
                  {"network_bytes", figures.bytes.network}};
    for (size_t part = 0; part < kNumWorkParts; ++part) {
      entry[absl::StrCat(kPartNames[part], "_seconds")] = {{"mean", figures.mean_seconds[part]},
                                                           {"slowest", figures.slowest_seconds[part]}};
    }
    entry["copied_bytes"] = run.copied.bytes;
    entry["copied_gbs"] = CopiedGbs(run.copied);
    entry["referenced_key_blocks"] = ReferencedJson(run.referenced);
    entry["recording_seconds"] = run.recording_seconds;
    list.push_back(std::move(entry));
  }
  const Json json = {{"geometry", geometry},
                     {"tokens", num_tokens},
                     {"layers", num_layers},
                     {"executed_layers", executed_layers},
                     {"attention", attention},
                     {"indices", indices.empty() ? Json() : Json(indices)},
                     {"seed", seed},
                     {"device", device},
                     {"compute_dtype", std::string(DTypeName(compute_dtype))},
                     {"links",
                      {{"node_gbs", links.node_gbs},
                       {"network_gbs", links.network_gbs},
                       {"node_latency_us", links.node_latency_us},
                       {"network_latency_us", links.network_latency_us},
                       {"ranks_per_node", links.ranks_per_node}}},
                     {"runs", std::move(list)}};
  return json.dump(1);
}

std::string ScalingReport::HeadText() const {
  return absl::StrFormat(
      "%s, %d tokens, %s, on one %s in %s, seed %d\n"
      "links: %s\n"
      "%d of %d layers are executed, the others are like one of them\n",
      geometry, num_tokens, attention, device, std::string(DTypeName(compute_dtype)), seed, ToString(links),
      executed_layers, num_layers);
}

std::string ScalingReport::RunText(const ScalingRun& run) const {
  const ScalingFigures& figures = run.figures;
  const std::optional<double> efficiency = Efficiency(run);
  std::string text =
      absl::StrFormat("%d ranks, %s: %.3f s", run.mesh.size(), ToString(run.mesh), figures.seconds);
  if (efficiency.has_value()) text += absl::StrFormat(", efficiency %.3f", *efficiency);
  text += absl::StrFormat(", imbalance %.3f, exposed communication %.3f s of %.3f s\n", figures.imbalance,
                          figures.exposed_communication_seconds, figures.communication_seconds);
  for (size_t part = 0; part < kNumWorkParts; ++part) {
    text += absl::StrFormat("  %-10s %9.3f s a rank, %9.3f s the slowest\n", kPartNames[part],
                            figures.mean_seconds[part], figures.slowest_seconds[part]);
  }
  if (run.mesh.size() > 1) {
    text += absl::StrFormat(
        "  links      %.3f GB in a node%s, %.3f GB between nodes; %.3f GB copied at %.1f GB/s\n",
        figures.bytes.node / kGiga, run.peer_copies ? ", keys and values by copy engines" : "",
        figures.bytes.network / kGiga, static_cast<double>(run.copied.bytes) / kGiga, CopiedGbs(run.copied));
  }
  if (run.referenced.has_value()) {
    const ReferencedKeys& keys = *run.referenced;
    text += absl::StrFormat(
        "  keys       %.3f of other ranks' key blocks are referenced (least %.3f), by KV group", keys.mean,
        keys.least);
    for (const double share : keys.by_kv_head) text += absl::StrFormat(" %.3f", share);
    text += absl::StrFormat("; under half in %.3f of the cases\n", keys.under_half);
  }
  return text;
}

}  // namespace longfill
