// What `longfill search` does with its input: calibrate, evaluate, search.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "deploy/cli/search.h"
#include "models/file_io.h"
#include "models/fingerprint.h"
#include "models/search/calibration.h"
#include "models/search/evaluation.h"
#include "models/search/pattern_family.h"
#include "models/search/pattern_search.h"
#include "models/search/search_state.h"

namespace longfill {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr double kDefaultBudgets[] = {0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1};
constexpr double kDefaultTimeShare = 0.5;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

absl::StatusOr<HeadPattern> ParseReference(const std::string& spec) {
  absl::StatusOr<HeadPattern> reference = ParseHeadPattern(spec);
  if (!reference.ok()) return Annotate(reference.status(), "--reference");
  if (std::holds_alternative<Dense>(*reference)) {
    return absl::InvalidArgumentError(
        "--reference: dense is what patterns are to be cheaper than, not a budget");
  }
  return reference;
}

// Families that are measured and tried, the reference first.
absl::StatusOr<std::vector<HeadPattern>> Families(const SearchCommandOptions& options) {
  std::vector<HeadPattern> families = DefaultFamilies();
  if (!options.candidates.empty()) {
    LF_ASSIGN_OR_RETURN(families, ParseFamilies(options.candidates));
  }
  LF_ASSIGN_OR_RETURN(const HeadPattern reference, ParseReference(options.reference));
  if (std::find(families.begin(), families.end(), reference) == families.end()) {
    families.insert(families.begin(), reference);
  }
  return families;
}

SearchValue ValueNamed(const std::string& name) {
  if (name == "answers") return SearchValue::kAnswers;
  if (name == "error") return SearchValue::kError;
  return name == "recall" ? SearchValue::kRecall : SearchValue::kEnd;
}

// --end-share or --answer-share, which belongs to one value alone; below 0: it is not given.
absl::Status TakeShare(const SearchCommandOptions& options, std::string_view value, double given,
                       double* share) {
  if (given < 0) return absl::OkStatus();
  if (options.value != value) {
    const char* const option = value == "end" ? "--end-share " : "--answer-share ";
    return absl::InvalidArgumentError(absl::StrCat(option, given, " is a share of --value ",
                                                   std::string(value), ", the value is ", options.value));
  }
  *share = given;
  return absl::OkStatus();
}

absl::StatusOr<SearchOptions> MakeSearchOptions(const SearchCommandOptions& options,
                                                const SearchInput& input) {
  SearchOptions search;
  LF_ASSIGN_OR_RETURN(search.families, Families(options));
  LF_ASSIGN_OR_RETURN(search.reference, ParseReference(options.reference));
  if (!options.as_given) {
    search.budgets = options.budgets;
    if (search.budgets.empty()) search.budgets.assign(std::begin(kDefaultBudgets), std::end(kDefaultBudgets));
  }
  std::set<int64_t> lengths;
  for (const std::vector<int32_t>& sample : input.samples) lengths.insert(std::ssize(sample));
  std::set<int64_t> targets(options.target_tokens.begin(), options.target_tokens.end());
  if (targets.empty() && !lengths.empty()) targets = {*lengths.rbegin()};
  for (const int64_t length : targets) {
    if (lengths.contains(length)) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("--target-tokens: no sample has ", length, " tokens, a length at which time counts"));
  }
  search.target_lengths.assign(targets.begin(), targets.end());
  search.value = ValueNamed(options.value);
  LF_RETURN_IF_ERROR(TakeShare(options, "end", options.end_share, &search.end_share));
  LF_RETURN_IF_ERROR(TakeShare(options, "answers", options.answer_share, &search.answer_share));
  if (options.mean_recall > 0) {
    search.mean_value = options.mean_recall;
  } else {
    search.time_share = options.time_share > 0 ? options.time_share : kDefaultTimeShare;
  }
  search.head_recall = options.head_recall;
  return search;
}

absl::StatusOr<CostTable> Calibrate(const SearchCommandOptions& options, const SearchInput& input,
                                    const LoadedModel& model, const SamplePassOptions& pass) {
  CalibrationOptions calibration;
  LF_ASSIGN_OR_RETURN(calibration.families, Families(options));
  calibration.num_layers = options.calibration_layers;
  if (options.runs > 0) calibration.runs = options.runs;
  calibration.pass = pass;
  ProgressLines lines(options.json);
  calibration.on_progress = [&](int64_t done, int64_t total) {
    lines.ReportEqualPieces("cost: measurement", done, total);
  };
  return MeasureCosts(model.view(), input.samples, calibration);
}

// SHA-256 of a text; empty for none.
absl::StatusOr<std::string> TextHash(const std::string& text) {
  if (text.empty()) return std::string();
  const std::vector<int32_t> characters(text.begin(), text.end());
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> hashes,
                      TokenHashChain(characters, std::ssize(characters)));
  return hashes.front();
}

Json Specs(const std::vector<HeadPattern>& patterns) {
  Json specs = Json::array();
  for (const HeadPattern& pattern : patterns) specs.push_back(ToString(pattern));
  return specs;
}

// Whatever decides the scores. Targets do not: another one needs no new scores.
absl::StatusOr<Json> DescribeSettings(const SearchCommandOptions& options, const SearchInput& input,
                                      const LoadedModel& model, const SearchOptions& search,
                                      const SamplePassOptions& pass) {
  Json lengths = Json::array();
  for (const std::vector<int32_t>& sample : input.samples) lengths.push_back(sample.size());
  LF_ASSIGN_OR_RETURN(const std::string samples_hash, SamplesHash(input.samples));
  LF_ASSIGN_OR_RETURN(const std::string cost_hash, TextHash(input.cost_json));
  Json settings = {{"model", model.fingerprint},
                   {"calibration", samples_hash},
                   {"sample_tokens", std::move(lengths)},
                   {"device", model.backend->facts().name},
                   {"compute_dtype", std::string(DTypeName(model.backend->kernels().compute_dtype()))},
                   {"coverage", options.coverage},
                   {"rows", pass.max_rows},
                   {"cost_table", cost_hash.empty() ? Json("measured") : Json(cost_hash)},
                   {"candidates", Specs(search.families)},
                   {"budgets", search.budgets},
                   {"reference", ToString(search.reference)},
                   {"target_tokens", search.target_lengths}};
  // What the search would measure itself is measured so.
  if (cost_hash.empty()) settings["calibration_layers"] = options.calibration_layers;
  return settings;
}

Json DescribeTarget(const SearchCommandOptions& options, const SearchOptions& search) {
  const auto optional = [](const std::optional<double>& value) {
    return value ? Json(*value) : Json(nullptr);
  };
  return {{"value", options.value},
          {"end_share",
           optional(search.value == SearchValue::kEnd ? std::optional(search.end_share) : std::nullopt)},
          {"answer_share", optional(search.value == SearchValue::kAnswers ? std::optional(search.answer_share)
                                                                          : std::nullopt)},
          {"time", optional(search.time_share)},
          {"recall", optional(search.mean_value)},
          {"head_recall", search.head_recall}};
}

Json ToJson(const SearchTotals& totals) {
  return {{"seconds", totals.seconds},
          {"mean_recall", totals.recall},
          {"least_recall", totals.least_recall},
          {"last_rows_recall", totals.last_recall},
          {"mean_error", totals.error}};
}

Json ToJson(const std::vector<SearchSeconds>& lengths) {
  Json json = Json::array();
  for (const SearchSeconds& length : lengths) {
    json.push_back({{"tokens", length.num_tokens},
                    {"seconds", length.seconds},
                    {"reference_seconds", length.reference},
                    {"share_of_reference", length.seconds / length.reference}});
  }
  return json;
}

// [layer, head, influence] of each.
Json DecisiveHeadsToJson(const SearchResult& result, int64_t num_heads) {
  Json json = Json::array();
  for (const size_t place : result.decisive) {
    const auto at = static_cast<int64_t>(place);
    json.push_back({at / num_heads, at % num_heads, result.influence[place]});
  }
  return json;
}

// Pattern to number of heads, the most frequent first.
Json CountPatterns(const PatternSet& patterns) {
  std::map<std::string, int64_t> counts;
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    for (const HeadPattern& pattern : patterns.layer(layer)) ++counts[ToString(pattern)];
  }
  std::vector<std::pair<std::string, int64_t>> sorted(counts.begin(), counts.end());
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const auto& a, const auto& b) { return a.second > b.second; });
  Json json = Json::object();
  for (const auto& [pattern, count] : sorted) json[pattern] = count;
  return json;
}

std::string CurveCsv(const SearchResult& result) {
  std::string text = "seconds,share_of_reference,mean_value\n";
  for (const TradeOffPoint& point : result.curve) {
    absl::StrAppendFormat(&text, "%.9g,%.6f,%.6f\n", point.seconds, point.seconds / result.reference.seconds,
                          point.mean_value);
  }
  return text;
}

std::string ReportText(const SearchCommandOptions& options, const SearchResult& result, const Json& json) {
  const SearchTotals& found = result.totals;
  const SearchTotals& reference = result.reference;
  std::string text = absl::StrFormat(
      "%d candidates, %.1f s\nmean recall %.5f (%s %.5f), least %.5f (%.5f), last rows %.5f (%.5f), "
      "mean error %.5f (%.5f)\n",
      result.candidates.size(), json.at("search_seconds").get<double>(), found.recall, options.reference,
      reference.recall, found.least_recall, reference.least_recall, found.last_recall, reference.last_recall,
      found.error, reference.error);
  for (const SearchSeconds& length : result.lengths) {
    absl::StrAppendFormat(
        &text, "attention and index at %d tokens, all heads, predicted: %.4g s, %.3f of %s (%.4g s)\n",
        length.num_tokens, length.seconds, length.seconds / length.reference, options.reference,
        length.reference);
  }
  if (json.contains("decisive_heads")) {
    const Json& heads = json.at("decisive_heads");
    absl::StrAppend(&text, heads.size(), " heads decide what is said next");
    if (heads.empty()) absl::StrAppend(&text, ": recall alone chose");
    for (const Json& head : heads) {
      absl::StrAppend(&text, &head == &heads.front() ? ": " : ", ", head[0].get<int64_t>(), "/",
                      head[1].get<int64_t>());
    }
    absl::StrAppend(&text, heads.empty() ? "\n" : " (layer/head)\n");
  }
  if (result.num_refined > 0) absl::StrAppend(&text, result.num_refined, " heads refined\n");
  for (const auto& [pattern, count] : json.at("patterns").items()) {
    absl::StrAppend(&text, pattern, ": ", count.get<int64_t>(), " heads\n");
  }
  return text;
}

// The search's own table where none was given: from the state of one that was cut short, or measured now.
absl::StatusOr<CostTable> FindCosts(const SearchCommandOptions& options, const SearchInput& input,
                                    const LoadedModel& model, const SamplePassOptions& pass,
                                    const SearchState* state) {
  if (!input.cost_json.empty()) return ParseCostTable(input.cost_json, options.cost_path);
  if (state != nullptr) {
    LF_ASSIGN_OR_RETURN(const std::string json, state->LoadCostTable());
    if (!json.empty()) return ParseCostTable(json, "the cost table of an earlier start");
  }
  if (!options.json) {
    std::fprintf(stderr, "no --cost: measuring what the candidates take here first\n");
  }
  LF_ASSIGN_OR_RETURN(CostTable table, Calibrate(options, input, model, pass));
  if (state != nullptr) LF_RETURN_IF_ERROR(state->SaveCostTable(table.ToJson()));
  return table;
}

// Before anything is made or computed.
absl::Status CheckGivenCosts(const SearchCommandOptions& options, const SearchInput& input,
                             const LoadedModel& model, const SearchOptions& search,
                             const SamplePassOptions& pass) {
  if (input.cost_json.empty()) return absl::OkStatus();
  LF_ASSIGN_OR_RETURN(const CostTable table, ParseCostTable(input.cost_json, options.cost_path));
  absl::Status status = table.CheckIsFor(TableDeviceOf(model.view(), pass.coverage));
  if (status.ok()) status = BalanceCandidates(table, search).status();
  return Annotate(status, options.cost_path);
}

// Rank 0 makes it before the others look.
absl::StatusOr<std::optional<SearchState>> OpenState(const std::string& out, const Json& settings,
                                                     World& world) {
  if (out.empty()) return std::optional<SearchState>();
  const std::string directory = out + ".state";
  absl::StatusOr<SearchState> state = absl::InternalError("not opened yet");
  for (const bool first : {true, false}) {
    const bool mine = first == (world.rank() == 0);
    if (mine) state = SearchState::Open(directory, settings.dump());
    LF_RETURN_IF_ERROR(world.Agree(mine ? state.status() : absl::OkStatus()));
  }
  return std::optional<SearchState>(*std::move(state));
}

// One search, of all samples or of those of one length.
struct Found {  // NOLINT(bugprone-exception-escape): a Json that is moved throws nothing
  SearchOptions search;
  Json settings, figures;
  SearchResult result;
  std::optional<SearchState> state;  // until the result is written
  double seconds = 0;
};

// `out`: what its state is named after; empty: it keeps none.
absl::StatusOr<Found> SearchOnce(const SearchCommandOptions& options, const SearchOptions& search,
                                 const SearchInput& input, const LoadedModel& model,
                                 const SamplePassOptions& pass, World& world, const std::string& out) {
  const Clock::time_point start = Clock::now();
  Found found{.search = search};
  LF_ASSIGN_OR_RETURN(found.settings, DescribeSettings(options, input, model, found.search, pass));
  LF_ASSIGN_OR_RETURN(found.state, OpenState(out, found.settings, world));
  const SearchState* const state = found.state ? &*found.state : nullptr;
  LF_ASSIGN_OR_RETURN(const CostTable table, FindCosts(options, input, model, pass, state));
  ProgressLines lines(options.json || world.rank() != 0);
  const ScorePassOptions scoring = {
      .sample = pass, .state = state, .on_progress = [&lines](const ScoreProgress& progress) {
        lines.Report(absl::StrCat(progress.pass, ": layers"), progress.layers_done, progress.num_layers,
                     progress.seconds, progress.seconds_left);
      }};
  LF_ASSIGN_OR_RETURN(found.result, SearchPatterns(model.view(), input.samples, table, found.search,
                                                   world.communicator(), scoring));
  const SearchResult& result = found.result;
  found.figures = {{"target_tokens", found.search.target_lengths},
                   {"lengths", ToJson(result.lengths)},
                   {"found", ToJson(result.totals)},
                   {"reference", ToJson(result.reference)},
                   {"share_of_reference", result.totals.seconds / result.reference.seconds},
                   {"refined_heads", result.num_refined}};
  if (search.value == SearchValue::kAnswers) {
    found.figures["decisive_heads"] = DecisiveHeadsToJson(result, model.config.num_q_heads);
  }
  found.settings.update(DescribeTarget(options, found.search));
  found.seconds = SecondsSince(start);
  return found;
}

// What is printed of it, beside the paths.
Json Describe(const Found& found) {
  Json json = found.figures;
  json["candidates"] = Json::array();
  for (const Candidate& candidate : found.result.candidates) {
    json["candidates"].push_back(ToString(candidate.pattern));
  }
  json["patterns"] = CountPatterns(found.result.patterns);
  json["search_seconds"] = found.seconds;
  return json;
}

// Where two sets of patterns meet: as far from the one length as from the other, by ratio.
int64_t Between(int64_t shorter, int64_t longer) {
  return static_cast<int64_t>(std::sqrt(static_cast<double>(shorter) * static_cast<double>(longer)));
}

std::string CurvePath(const SearchCommandOptions& options, std::span<const Found> found, size_t which) {
  if (options.out.empty()) return "";
  if (!options.per_length) return options.out + ".curve.csv";
  return absl::StrCat(options.out, ".", found[which].search.target_lengths.back(), ".curve.csv");
}

// Ascending in length; the last one's patterns are the file's, the others those for shorter prompts.
absl::Status WriteResult(const SearchCommandOptions& options, const LoadedModel& model,
                         const std::string& samples_hash, std::span<const Found> found) {
  Json search = found.back().settings;
  search["result"] = found.back().figures;
  for (size_t i = 0; i + 1 < found.size(); ++i) {
    Json shorter = found[i].settings;
    shorter["result"] = found[i].figures;
    search["shorter"].push_back(std::move(shorter));
  }
  PatternSet patterns = found.back().result.patterns;
  patterns.set_provenance(PatternProvenance{.model_name = model.name,
                                            .model_fingerprint = model.fingerprint,
                                            .calibration_sha256 = samples_hash,
                                            .search_json = search.dump()});
  for (size_t i = 0; i + 1 < found.size(); ++i) {
    patterns.AddShorter(
        Between(found[i].search.target_lengths.back(), found[i + 1].search.target_lengths.back()),
        found[i].result.patterns);
  }
  absl::Status written;
  for (size_t i = 0; i < found.size() && written.ok(); ++i) {
    written = WriteTextFile(CurvePath(options, found, i), CurveCsv(found[i].result));
  }
  if (written.ok()) written = WritePatternFile(patterns, options.out);
  for (size_t i = 0; i < found.size() && !written.ok(); ++i) {
    std::remove(CurvePath(options, found, i).c_str());
  }
  return written;
}

// Of one length, of the samples that have it.
SearchInput OfLength(const SearchInput& input, int64_t num_tokens) {
  SearchInput part{.cost_json = input.cost_json};
  for (const std::vector<int32_t>& sample : input.samples) {
    if (std::ssize(sample) == num_tokens) part.samples.push_back(sample);
  }
  return part;
}

absl::StatusOr<std::vector<Found>> SearchAll(const SearchCommandOptions& options, const SearchInput& input,
                                             const LoadedModel& model, const SamplePassOptions& pass,
                                             World& world) {
  SearchCommandOptions wanted = options;
  if (options.per_length && wanted.target_tokens.empty()) {
    for (const auto& sample : input.samples) wanted.target_tokens.push_back(std::ssize(sample));
  }
  LF_ASSIGN_OR_RETURN(const SearchOptions search, MakeSearchOptions(wanted, input));
  std::vector<Found> all;
  if (!options.per_length) {
    LF_RETURN_IF_ERROR(CheckGivenCosts(options, input, model, search, pass));
    LF_ASSIGN_OR_RETURN(Found found, SearchOnce(options, search, input, model, pass, world, options.out));
    all.push_back(std::move(found));
    return all;
  }
  for (const std::vector<int32_t>& sample : input.samples) {
    if (std::ranges::binary_search(search.target_lengths, std::ssize(sample))) continue;
    return absl::InvalidArgumentError(absl::StrCat("--per-length: a sample has ", sample.size(),
                                                   " tokens, which --target-tokens does not name"));
  }
  std::vector<SearchOptions> searches;
  for (const int64_t length : search.target_lengths) {  // all are checked before the first begins
    searches.push_back(search);
    searches.back().target_lengths = {length};
    LF_RETURN_IF_ERROR(CheckGivenCosts(options, input, model, searches.back(), pass));
  }
  for (const SearchOptions& one : searches) {
    const int64_t length = one.target_lengths.back();
    if (!options.json && world.rank() == 0) {
      std::fprintf(stderr, "prompts of %lld tokens:\n", static_cast<long long>(length));
    }
    const std::string out = options.out.empty() ? "" : absl::StrCat(options.out, ".", length);
    LF_ASSIGN_OR_RETURN(Found found,
                        SearchOnce(options, one, OfLength(input, length), model, pass, world, out));
    all.push_back(std::move(found));
  }
  return all;
}

}  // namespace

absl::StatusOr<std::string> RunCalibration(const SearchCommandOptions& options, const SearchInput& input,
                                           const LoadedModel& model, const SamplePassOptions& pass) {
  LF_ASSIGN_OR_RETURN(const CostTable table, Calibrate(options, input, model, pass));
  LF_RETURN_IF_ERROR(WriteTextFile(options.out, table.ToJson()));
  if (options.json) return Json{{"out", options.out}, {"curves", table.curves().size()}}.dump(1) + "\n";
  std::string text = "pattern, tokens: ms of a head at each scale\n";
  for (const CostCurve& curve : table.curves()) {
    absl::StrAppend(&text, ToString(curve.family), ", ", curve.num_tokens, ":");
    for (const CostPoint& point : curve.points) {
      absl::StrAppendFormat(&text, " %.4g (x%.4g)", point.seconds() * 1e3, point.scale);
    }
    text += "\n";
  }
  return text;
}

absl::StatusOr<std::string> RunEvaluation(const SearchCommandOptions& options, const SearchInput& input,
                                          const LoadedModel& model, const SamplePassOptions& pass) {
  std::vector<PatternSet> sets;
  for (const std::string& text : options.evaluate) {
    absl::StatusOr<AttentionSpec> spec = ReadAttentionSpec(text);
    if (spec.ok() && spec->text == "auto") spec = absl::InvalidArgumentError("auto is no pattern");
    if (!spec.ok()) return Annotate(spec.status(), "--evaluate");
    if (!spec->pattern_json.empty()) {  // with the sets of all lengths
      LF_ASSIGN_OR_RETURN(
          PatternSet patterns,
          ParsePatterns(spec->pattern_json, spec->text, model.config.num_layers, model.config.num_q_heads));
      sets.push_back(std::move(patterns));
      continue;
    }
    LF_ASSIGN_OR_RETURN(ResolvedAttention resolved, ResolveAttention(*spec, {}, 0, model.config));
    sets.push_back(std::move(resolved.patterns));
  }
  EvaluationOptions evaluation{.pass = pass};
  if (options.runs > 0) evaluation.runs = options.runs;
  ProgressLines lines(options.json);
  evaluation.on_progress = [&](int64_t done, int64_t total) {
    lines.ReportEqualPieces("layers", done, total);
  };
  LF_ASSIGN_OR_RETURN(const std::vector<PatternEvaluation> results,
                      EvaluatePatterns(model.view(), input.samples, sets, evaluation));
  Json list = Json::array();
  std::string text;
  for (size_t i = 0; i < results.size(); ++i) {
    const PatternEvaluation& result = results[i];
    list.push_back({{"attention", options.evaluate[i]},
                    {"mean_recall", result.recall},
                    {"least_recall", result.least_recall},
                    {"last_rows_recall", result.last_recall},
                    {"mean_error", result.error},
                    {"density", result.density},
                    {"attention_seconds", result.attention_seconds},
                    {"index_seconds", result.index_seconds}});
    absl::StrAppendFormat(&text,
                          "%s: mean recall %.5f, least %.5f, last rows %.5f, mean error %.5f, density %.4f, "
                          "attention %.4g s, index %.4g s\n",
                          options.evaluate[i], result.recall, result.least_recall, result.last_recall,
                          result.error, result.density, result.attention_seconds, result.index_seconds);
  }
  if (!options.json) return text;
  return Json{{"device", model.backend->facts().name}, {"samples", input.samples.size()}, {"results", list}}
             .dump(1) +
         "\n";
}

absl::StatusOr<std::string> RunPatternSearch(const SearchCommandOptions& options, const SearchInput& input,
                                             const LoadedModel& model, const SamplePassOptions& pass,
                                             World& world) {
  LF_ASSIGN_OR_RETURN(const std::string samples_hash, SamplesHash(input.samples));
  LF_ASSIGN_OR_RETURN(const std::vector<Found> all, SearchAll(options, input, model, pass, world));
  absl::Status written;
  if (world.rank() == 0 && !options.out.empty()) written = WriteResult(options, model, samples_hash, all);
  LF_RETURN_IF_ERROR(world.Agree(written));
  std::string text;
  Json sets = Json::array();
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].state) all[i].state->Remove();
    Json json = Describe(all[i]);
    if (all.size() > 1) {
      absl::StrAppend(&text, "prompts of ", all[i].search.target_lengths.back(), " tokens: ");
    }
    text += ReportText(options, all[i].result, json);
    json["curve"] = CurvePath(options, all, i);
    sets.push_back(std::move(json));
  }
  if (!options.json) return text;
  Json json = options.per_length ? Json{{"sets", std::move(sets)}} : std::move(sets.front());
  json["out"] = options.out;
  json["cost_table"] = input.cost_json.empty() ? "measured" : options.cost_path;
  return json.dump(1) + "\n";
}

}  // namespace longfill
