#include "models/search/cost_table.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "models/json_input.h"

namespace longfill {
namespace {

using Json = nlohmann::json;

constexpr char kKey[] = "longfill_cost_table";
constexpr int64_t kVersion = 1;
constexpr JsonLimits kJsonLimits = {.max_depth = 8, .max_values = 200'000};

absl::Status Invalid(const std::string& what) { return absl::InvalidArgumentError(what); }

bool IsMeasure(double value) { return std::isfinite(value) && value >= 0; }

// y at x between (x0, y0) and (x1, y1) on a line in logarithms; 0 wherever an end is.
double LogInterpolate(double x, double x0, double y0, double x1, double y1) {
  if (y0 <= 0 || y1 <= 0) return std::min(y0, y1);
  if (x1 <= x0) return y1;
  const double share = (std::log(x) - std::log(x0)) / (std::log(x1) - std::log(x0));
  return std::exp(std::log(y0) + share * (std::log(y1) - std::log(y0)));
}

// An object with exactly these keys.
absl::Status CheckObject(const Json& json, std::string_view what, std::initializer_list<const char*> keys) {
  const std::string name(what);
  if (!json.is_object()) return Invalid(absl::StrCat(name, " is no object"));
  return CheckKeys(json, name, keys);
}

absl::StatusOr<std::string> Text(const Json& object, const char* key) {
  const Json& value = object.at(key);
  if (!value.is_string()) return Invalid(absl::StrCat(key, " is no string"));
  return value.get<std::string>();
}

absl::StatusOr<int64_t> Count(const Json& object, const char* key) {
  constexpr int64_t kMost = int64_t{1} << 31;
  const Json& value = object.at(key);
  if (!value.is_number_integer() || value.get<int64_t>() < 1 || value.get<int64_t>() > kMost) {
    return Invalid(absl::StrCat(key, " is no integer in [1, ", kMost, "]"));
  }
  return value.get<int64_t>();
}

absl::StatusOr<double> Measure(const Json& object, const char* key) {
  const Json& value = object.at(key);
  if (!value.is_number() || !IsMeasure(value.get<double>())) {
    return Invalid(absl::StrCat(key, " is no number >= 0"));
  }
  return value.get<double>();
}

absl::StatusOr<CostPoint> ParsePoint(const Json& json) {
  LF_RETURN_IF_ERROR(CheckObject(json, "a point", {"scale", "pairs", "attention_seconds", "index_seconds"}));
  CostPoint point;
  LF_ASSIGN_OR_RETURN(point.scale, Measure(json, "scale"));
  LF_ASSIGN_OR_RETURN(point.pairs, Measure(json, "pairs"));
  LF_ASSIGN_OR_RETURN(point.attention_seconds, Measure(json, "attention_seconds"));
  LF_ASSIGN_OR_RETURN(point.index_seconds, Measure(json, "index_seconds"));
  if (point.scale <= 0) return Invalid("a scale is not above 0");
  return point;
}

absl::StatusOr<CostCurve> ParseCurve(const Json& json) {
  LF_RETURN_IF_ERROR(CheckObject(json, "a curve", {"family", "tokens", "points"}));
  CostCurve curve;
  LF_ASSIGN_OR_RETURN(const std::string family, Text(json, "family"));
  LF_ASSIGN_OR_RETURN(curve.family, ParseHeadPattern(family));
  LF_ASSIGN_OR_RETURN(curve.num_tokens, Count(json, "tokens"));
  const Json& points = json.at("points");
  if (!points.is_array() || points.empty()) return Invalid(absl::StrCat(family, " has no list of points"));
  for (const Json& point : points) {
    absl::StatusOr<CostPoint> parsed = ParsePoint(point);
    if (!parsed.ok()) return Annotate(parsed.status(), family);
    curve.points.push_back(*parsed);
  }
  return curve;
}

absl::StatusOr<CostTable> ParseTable(const Json& json) {
  LF_RETURN_IF_ERROR(CheckObject(json, "the file", {kKey}));
  const Json& body = json.at(kKey);
  if (!body.is_object() || !body.contains("version") || !body.at("version").is_number_integer()) {
    return Invalid("has no whole number version");
  }
  if (body.at("version") != kVersion) {
    return absl::UnimplementedError(
        absl::StrCat("has version ", body.at("version").dump(), ", this program reads ", kVersion));
  }
  LF_RETURN_IF_ERROR(CheckObject(body, kKey,
                                 {"version", "device", "compute_dtype", "num_q_heads", "num_kv_heads",
                                  "head_dim", "coverage", "curves"}));
  CostTableDevice device;
  LF_ASSIGN_OR_RETURN(device.device, Text(body, "device"));
  LF_ASSIGN_OR_RETURN(const std::string dtype, Text(body, "compute_dtype"));
  LF_ASSIGN_OR_RETURN(device.compute_dtype, ParseDType(dtype));
  LF_ASSIGN_OR_RETURN(device.num_q_heads, Count(body, "num_q_heads"));
  LF_ASSIGN_OR_RETURN(device.num_kv_heads, Count(body, "num_kv_heads"));
  LF_ASSIGN_OR_RETURN(device.head_dim, Count(body, "head_dim"));
  LF_ASSIGN_OR_RETURN(const std::string coverage, Text(body, "coverage"));
  LF_ASSIGN_OR_RETURN(device.coverage, ParseCoverage(coverage));
  CostTable table(device);
  if (!body.at("curves").is_array()) return Invalid("curves is no list");
  for (const Json& curve : body.at("curves")) {
    LF_ASSIGN_OR_RETURN(CostCurve parsed, ParseCurve(curve));
    table.Add(std::move(parsed));
  }
  return table;
}

// Both at num_tokens between theirs.
CostCurve Between(const CostCurve& shorter, const CostCurve& longer, int64_t num_tokens) {
  CostCurve curve{.family = shorter.family, .num_tokens = num_tokens};
  const auto x0 = static_cast<double>(shorter.num_tokens);
  const auto x1 = static_cast<double>(longer.num_tokens);
  const auto x = static_cast<double>(num_tokens);
  for (const CostPoint& a : shorter.points) {
    const auto b = std::find_if(longer.points.begin(), longer.points.end(),
                                [&a](const CostPoint& point) { return point.scale == a.scale; });
    if (b == longer.points.end()) continue;
    curve.points.push_back({a.scale, LogInterpolate(x, x0, a.pairs, x1, b->pairs),
                            LogInterpolate(x, x0, a.attention_seconds, x1, b->attention_seconds),
                            LogInterpolate(x, x0, a.index_seconds, x1, b->index_seconds)});
  }
  return curve;
}

}  // namespace

void CostTable::Add(CostCurve curve) {
  LF_CHECK(!curve.points.empty());
  std::stable_sort(curve.points.begin(), curve.points.end(),
                   [](const CostPoint& a, const CostPoint& b) { return a.scale < b.scale; });
  const auto same = [](const CostPoint& a, const CostPoint& b) { return a.scale == b.scale; };
  curve.points.erase(std::unique(curve.points.begin(), curve.points.end(), same), curve.points.end());
  CostPoint least;
  for (CostPoint& point : curve.points) {
    LF_CHECK(IsMeasure(point.pairs) && IsMeasure(point.attention_seconds) && IsMeasure(point.index_seconds));
    least.pairs = point.pairs = std::max(point.pairs, least.pairs);
    least.attention_seconds = point.attention_seconds =
        std::max(point.attention_seconds, least.attention_seconds);
    least.index_seconds = point.index_seconds = std::max(point.index_seconds, least.index_seconds);
  }
  curves_.push_back(std::move(curve));
}

absl::Status CostTable::CheckIsFor(const CostTableDevice& device) const {
  const auto differs = [](const char* what, const auto& mine, const auto& wanted) {
    return Invalid(
        absl::StrCat("the cost table was measured for ", what, " ", mine, ", here it is ", wanted));
  };
  if (device_.device != device.device) return differs("the device", device_.device, device.device);
  if (device_.compute_dtype != device.compute_dtype) {
    return differs("the type", std::string(DTypeName(device_.compute_dtype)),
                   std::string(DTypeName(device.compute_dtype)));
  }
  if (device_.num_q_heads != device.num_q_heads) {
    return differs("num_q_heads", device_.num_q_heads, device.num_q_heads);
  }
  if (device_.num_kv_heads != device.num_kv_heads) {
    return differs("num_kv_heads", device_.num_kv_heads, device.num_kv_heads);
  }
  if (device_.head_dim != device.head_dim) return differs("head_dim", device_.head_dim, device.head_dim);
  if (device_.coverage != device.coverage) {
    return differs("coverage", std::string(CoverageName(device_.coverage)),
                   std::string(CoverageName(device.coverage)));
  }
  return absl::OkStatus();
}

absl::StatusOr<CostCurve> CostTable::CurveAt(const HeadPattern& family, int64_t num_tokens) const {
  const CostCurve* shorter = nullptr;  // the longest up to num_tokens
  const CostCurve* longer = nullptr;   // the shortest from there on
  std::vector<int64_t> lengths;
  for (const CostCurve& curve : curves_) {
    if (curve.family != family) continue;
    lengths.push_back(curve.num_tokens);
    if (curve.num_tokens <= num_tokens && (shorter == nullptr || curve.num_tokens > shorter->num_tokens)) {
      shorter = &curve;
    }
    if (curve.num_tokens >= num_tokens && (longer == nullptr || curve.num_tokens < longer->num_tokens)) {
      longer = &curve;
    }
  }
  if (lengths.empty()) {
    return Invalid(absl::StrCat("the cost table has no ", ToString(family),
                                ": measure it with --calibrate and these --candidates"));
  }
  if (shorter == nullptr || longer == nullptr) {
    std::sort(lengths.begin(), lengths.end());
    return Invalid(absl::StrCat("the cost table has ", ToString(family), " at ", absl::StrJoin(lengths, ", "),
                                " tokens, and ", num_tokens, " is beyond"));
  }
  if (shorter->num_tokens == num_tokens) return *shorter;
  CostCurve curve = Between(*shorter, *longer, num_tokens);
  if (curve.points.empty()) {
    return Invalid(absl::StrCat("the cost table has no scale of ", ToString(family), " in common at ",
                                shorter->num_tokens, " and ", longer->num_tokens, " tokens"));
  }
  return curve;
}

std::string CostTable::ToJson() const {
  Json curves = Json::array();
  for (const CostCurve& curve : curves_) {
    Json points = Json::array();
    for (const CostPoint& point : curve.points) {
      points.push_back({{"scale", point.scale},
                        {"pairs", point.pairs},
                        {"attention_seconds", point.attention_seconds},
                        {"index_seconds", point.index_seconds}});
    }
    curves.push_back(
        {{"family", ToString(curve.family)}, {"tokens", curve.num_tokens}, {"points", std::move(points)}});
  }
  Json body = {{"version", kVersion},
               {"device", device_.device},
               {"compute_dtype", std::string(DTypeName(device_.compute_dtype))},
               {"num_q_heads", device_.num_q_heads},
               {"num_kv_heads", device_.num_kv_heads},
               {"head_dim", device_.head_dim},
               {"coverage", std::string(CoverageName(device_.coverage))},
               {"curves", std::move(curves)}};
  Json json = Json::object();
  json[kKey] = std::move(body);
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

double PredictSeconds(const CostCurve& curve, double pairs) {
  const std::vector<CostPoint>& points = curve.points;
  if (pairs <= points.front().pairs) return points.front().seconds();
  const CostPoint& last = points.back();
  if (pairs >= last.pairs) {
    return last.index_seconds + (last.pairs > 0 ? last.attention_seconds * pairs / last.pairs : 0);
  }
  const auto above =
      std::upper_bound(points.begin(), points.end(), pairs,
                       [](double value, const CostPoint& point) { return value < point.pairs; });
  const CostPoint& a = *(above - 1);
  const CostPoint& b = *above;
  const double share = (pairs - a.pairs) / (b.pairs - a.pairs);
  return a.seconds() + share * (b.seconds() - a.seconds());
}

double ScaleForSeconds(const CostCurve& curve, double seconds) {
  const std::vector<CostPoint>& points = curve.points;
  if (seconds < points.front().seconds()) return 0;
  for (size_t i = 1; i < points.size(); ++i) {
    const CostPoint& a = points[i - 1];
    const CostPoint& b = points[i];
    if (seconds >= b.seconds()) continue;
    return LogInterpolate(seconds, a.seconds(), a.scale, b.seconds(), b.scale);
  }
  return points.back().scale;
}

absl::StatusOr<CostTable> ParseCostTable(std::string_view text, std::string_view source) {
  LF_ASSIGN_OR_RETURN(const Json json, ParseJson(text, source, kJsonLimits));
  absl::StatusOr<CostTable> table = ParseTable(json);
  if (!table.ok()) return Annotate(table.status(), source);
  return table;
}

}  // namespace longfill
