#include "models/search/search_state.h"

#include <filesystem>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "models/file_io.h"
#include "models/json_input.h"

namespace longfill {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr char kSettingsFile[] = "settings.json";
constexpr char kCostFile[] = "cost.json";
constexpr char kUnitSuffix[] = ".scores.json";
constexpr int64_t kMaxStateBytes = int64_t{256} << 20;
constexpr JsonLimits kJsonLimits = {.max_depth = 8, .max_values = 32'000'000};

// The settings that were found against those that are wanted.
absl::Status CompareSettings(const Json& found, const Json& wanted, const std::string& directory) {
  if (found == wanted) return absl::OkStatus();
  for (const auto& [key, value] : wanted.items()) {
    const auto other = found.find(key);
    if (other != found.end() && *other == value) continue;
    return absl::InvalidArgumentError(absl::StrCat(directory, " was begun with another ", key, " (",
                                                   other == found.end() ? "none" : other->dump(), " there, ",
                                                   value.dump(), " now): remove it to begin anew"));
  }
  return absl::InvalidArgumentError(absl::StrCat(directory, " is of a search with other settings"));
}

absl::StatusOr<HeadScore> ParseScore(const Json& json) {
  if (!json.is_array() || json.size() != 4 || !json[0].is_number() || !json[1].is_number() ||
      !json[2].is_number() || !json[3].is_number_integer()) {
    return absl::InvalidArgumentError("a score is not [recall, last recall, error, pairs]");
  }
  return HeadScore{json[0].get<double>(), json[1].get<double>(), json[2].get<double>(),
                   json[3].get<int64_t>()};
}

// Of a unit's file; none if it is not there.
absl::StatusOr<std::optional<Json>> ReadUnit(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadSmallFile(path, kMaxStateBytes);
  if (absl::IsNotFound(text.status())) return std::optional<Json>();
  LF_RETURN_IF_ERROR(text.status());
  LF_ASSIGN_OR_RETURN(Json json, ParseJson(*text, path, kJsonLimits));
  return std::optional(std::move(json));
}

absl::StatusOr<UnitScores> ParseUnit(const Json& json, int64_t num_candidates, int64_t num_heads) {
  if (!json.is_array() || static_cast<int64_t>(json.size()) != num_candidates) {
    return absl::InvalidArgumentError(absl::StrCat("is no list of ", num_candidates, " candidates"));
  }
  UnitScores scores;
  for (const Json& candidate : json) {
    if (!candidate.is_array() || static_cast<int64_t>(candidate.size()) != num_heads) {
      return absl::InvalidArgumentError(absl::StrCat("a candidate is no list of ", num_heads, " heads"));
    }
    scores.emplace_back();
    for (const Json& head : candidate) {
      LF_ASSIGN_OR_RETURN(const HeadScore score, ParseScore(head));
      scores.back().push_back(score);
    }
  }
  return scores;
}

}  // namespace

absl::StatusOr<SearchState> SearchState::Open(const std::string& directory, const std::string& settings) {
  LF_ASSIGN_OR_RETURN(const Json wanted, ParseJson(settings, "search settings", kJsonLimits));
  SearchState state(directory);
  std::error_code error;
  const std::string settings_path = (fs::path(directory) / kSettingsFile).string();
  if (fs::exists(directory, error)) {
    const absl::StatusOr<std::string> text = ReadSmallFile(settings_path, kMaxStateBytes);
    if (!text.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(directory, " is there and not of a search: ", text.status().message()));
    }
    LF_ASSIGN_OR_RETURN(const Json found, ParseJson(*text, settings_path, kJsonLimits));
    LF_RETURN_IF_ERROR(CompareSettings(found, wanted, directory));
    return state;
  }
  fs::create_directories(directory, error);
  if (error) return OutputError(directory, error.value());
  LF_RETURN_IF_ERROR(WriteTextFile(settings_path, wanted.dump(1) + "\n"));
  return state;
}

std::string SearchState::PathOf(const ScoreUnit& unit) const {
  return (fs::path(directory_) /
          absl::StrFormat("%s-sample-%03d-layer-%03d%s", unit.pass, unit.sample, unit.layer, kUnitSuffix))
      .string();
}

absl::StatusOr<std::optional<UnitScores>> SearchState::Load(const ScoreUnit& unit, int64_t num_candidates,
                                                            int64_t num_heads) const {
  const std::string path = PathOf(unit);
  LF_ASSIGN_OR_RETURN(const std::optional<Json> json, ReadUnit(path));
  if (!json) return std::optional<UnitScores>();
  absl::StatusOr<UnitScores> scores = ParseUnit(*json, num_candidates, num_heads);
  if (!scores.ok()) return Annotate(scores.status(), path);
  return std::optional<UnitScores>(*std::move(scores));
}

absl::Status SearchState::Save(const ScoreUnit& unit, const UnitScores& scores) const {
  Json json = Json::array();
  for (const std::vector<HeadScore>& candidate : scores) {
    Json heads = Json::array();
    for (const HeadScore& score : candidate) {
      heads.push_back({score.recall, score.last_recall, score.error, score.pairs});
    }
    json.push_back(std::move(heads));
  }
  return WriteTextFile(PathOf(unit), json.dump());
}

absl::StatusOr<std::optional<std::vector<double>>> SearchState::LoadInfluence(const ScoreUnit& unit,
                                                                              int64_t num_heads) const {
  const std::string path = PathOf(unit);
  LF_ASSIGN_OR_RETURN(const std::optional<Json> json, ReadUnit(path));
  if (!json) return std::optional<std::vector<double>>();
  const bool numbers = json->is_array() && static_cast<int64_t>(json->size()) == num_heads &&
                       std::all_of(json->begin(), json->end(), [](const Json& x) { return x.is_number(); });
  if (!numbers) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": is no list of ", num_heads, " numbers"));
  }
  return std::optional(json->get<std::vector<double>>());
}

absl::Status SearchState::SaveInfluence(const ScoreUnit& unit, const std::vector<double>& influence) const {
  return WriteTextFile(PathOf(unit), Json(influence).dump());
}

absl::StatusOr<std::string> SearchState::LoadCostTable() const {
  absl::StatusOr<std::string> text =
      ReadSmallFile((fs::path(directory_) / kCostFile).string(), kMaxStateBytes);
  if (absl::IsNotFound(text.status())) return std::string();
  return text;
}

absl::Status SearchState::SaveCostTable(const std::string& json) const {
  return WriteTextFile((fs::path(directory_) / kCostFile).string(), json);
}

void SearchState::Remove() const {
  std::error_code ignored;
  std::vector<fs::path> files;
  for (fs::directory_iterator it(directory_, ignored), end; !ignored && it != end; it.increment(ignored)) {
    const std::string name = it->path().filename().string();
    const bool ours = name == kSettingsFile || name == kCostFile ||
                      absl::StrContains(name, kUnitSuffix);  // or one that was cut short
    if (ours) files.push_back(it->path());
  }
  for (const fs::path& file : files) fs::remove(file, ignored);
  fs::remove(directory_, ignored);
}

}  // namespace longfill
