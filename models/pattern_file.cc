#include "models/pattern_file.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/json_input.h"

namespace longfill {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kVerticalSlashType = "vertical_and_slash";
constexpr std::string_view kAShapeType = "stream_llm";
constexpr std::string_view kBlockSparseType = "block_sparse";
constexpr std::string_view kOwnKey = "longfill";
constexpr int64_t kOwnVersion = 1;
constexpr int64_t kOwnVersionWithShorter = 2;
constexpr JsonLimits kJsonLimits = {.max_depth = 12, .max_values = 2'000'000};
constexpr double kMaxRecall = 1.001;  // what rounding may make of 1: the published files have up to 1.0003

absl::Status Invalid(const std::string& what) { return absl::InvalidArgumentError(what); }

// A value of the file for a message, however large it is.
std::string Shown(const Json& value) {
  if (value.is_structured()) return absl::StrCat("an ", value.type_name(), " of ", value.size());
  if (value.is_string()) return QuoteForMessage(value.get_ref<const std::string&>());
  return value.dump();
}

// Of a "head" or "layer". Only the form that a writer of numbers gives, so that "7" and "07" cannot both name
// head 7.
absl::StatusOr<int64_t> ParseNumber(const std::string& key, const char* what, int64_t count) {
  int64_t number = -1;
  const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), number);
  if (error != std::errc() || end != key.data() + key.size() || absl::StrCat(number) != key) {
    return Invalid(
        absl::StrCat(what, " ", QuoteForMessage(key), " is not a ", what, " number in [0, ", count, ")"));
  }
  if (number < 0 || number >= count) {
    return Invalid(absl::StrCat(what, " ", number, " is not in [0, ", count, "), what the model has"));
  }
  return number;
}

absl::StatusOr<int64_t> ParseSize(const Json& value, const char* name) {
  const bool too_large =
      value.is_number_unsigned() && value.get<uint64_t>() > std::numeric_limits<int32_t>::max();
  if (!value.is_number_integer() || too_large || value.get<int64_t>() < 0) {
    return Invalid(absl::StrCat(name, " ", Shown(value), " is not an integer in [0, 2147483647]"));
  }
  return value.get<int64_t>();
}

absl::StatusOr<double> ParseNumber(const Json& value, const char* name) {
  if (!value.is_number()) return Invalid(absl::StrCat(name, " ", Shown(value), " is not a number"));
  return value.get<double>();
}

// The two numbers behind the type.
absl::StatusOr<HeadPattern> ParsePattern(const std::string& type, const Json& first, const Json& second) {
  LF_ASSIGN_OR_RETURN(const int64_t vertical, ParseSize(first, "vertical_size"));
  LF_ASSIGN_OR_RETURN(const int64_t slash, ParseSize(second, "slash_size"));
  if (type == kVerticalSlashType) return VerticalSlash{vertical, slash};
  if (type == kAShapeType) return AShape{vertical, slash};
  if (type == kBlockSparseType) return BlockSparse{kPublishedNumBlocks};
  return Invalid(absl::StrCat("type ", QuoteForMessage(type),
                              " is unknown, expected vertical_and_slash, stream_llm or block_sparse"));
}

struct Entry {
  HeadPattern pattern;
  std::optional<double> score;
};

absl::StatusOr<Entry> ParseEntry(const Json& json) {
  if (!json.is_array() || json.size() != 4) {
    return Invalid(
        absl::StrCat("value is ", Shown(json), ", expected [type, vertical_size, slash_size, score]"));
  }
  if (!json[0].is_string()) return Invalid(absl::StrCat("type ", Shown(json[0]), " is not a string"));
  const std::string& type = json[0].get_ref<const std::string&>();
  Entry entry;
  LF_ASSIGN_OR_RETURN(entry.pattern, ParsePattern(type, json[1], json[2]));
  LF_RETURN_IF_ERROR(Validate(entry.pattern));
  if (!json[3].is_null()) {
    LF_ASSIGN_OR_RETURN(entry.score, ParseNumber(json[3], "score"));
  }
  return entry;
}

absl::Status ParseLayer(const Json& json, int64_t layer, PatternSet* patterns) {
  if (!json.is_object()) {
    return Invalid(absl::StrCat("is ", Shown(json), ", expected an object from head numbers to patterns"));
  }
  for (const auto& [key, value] : json.items()) {
    LF_ASSIGN_OR_RETURN(const int64_t head, ParseNumber(key, "head", patterns->num_heads()));
    absl::StatusOr<Entry> entry = ParseEntry(value);
    if (!entry.ok()) return Annotate(entry.status(), absl::StrCat("head ", head));
    patterns->Set(layer, head, entry->pattern, entry->score);
  }
  return absl::OkStatus();
}

bool IsSha256(std::string_view text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

// `json` is an object whose keys are exactly `keys`.
absl::Status CheckObject(const Json& json, std::string_view what, std::span<const char* const> keys) {
  const std::string name(what);
  if (!json.is_object()) return Invalid(absl::StrCat(name, " is ", Shown(json), ", expected an object"));
  return CheckKeys(json, name, keys);
}

// The object under `key`, whose keys are exactly `keys`.
absl::StatusOr<const Json*> ObjectAt(const Json& parent, const char* key,
                                     std::initializer_list<const char*> keys) {
  const auto found = parent.find(key);
  if (found == parent.end()) return Invalid(absl::StrCat("has no ", key));
  LF_RETURN_IF_ERROR(CheckObject(*found, key, keys));
  return &*found;
}

absl::StatusOr<std::string> StringAt(const Json& object, const char* key, bool is_hash) {
  const Json& value = object.at(key);
  if (!value.is_string() || (is_hash && !IsSha256(value.get_ref<const std::string&>()))) {
    return Invalid(absl::StrCat(key, " is ", Shown(value), ", expected ",
                                is_hash ? "64 lower-case hex digits" : "a string"));
  }
  return value.get<std::string>();
}

// The pattern itself where the published form has words for it, else what it says instead.
HeadPattern StandIn(const HeadPattern& pattern) {
  if (std::holds_alternative<AShape>(pattern) || std::holds_alternative<VerticalSlash>(pattern))
    return pattern;
  if (std::holds_alternative<BlockSparse>(pattern)) return BlockSparse{kPublishedNumBlocks};
  return kUnlistedHeadPattern;
}

absl::Status ParseExact(const Json& json, PatternSet* patterns) {
  for (const auto& [layer_key, heads] : json.items()) {
    const absl::StatusOr<int64_t> layer = ParseNumber(layer_key, "layer", patterns->num_layers());
    if (!layer.ok()) return Annotate(layer.status(), "exact");
    const std::string where = absl::StrCat("exact: layer ", *layer);
    if (!heads.is_object()) return Invalid(absl::StrCat(where, " is ", Shown(heads), ", expected an object"));
    for (const auto& [head_key, text] : heads.items()) {
      const absl::StatusOr<int64_t> number = ParseNumber(head_key, "head", patterns->num_heads());
      if (!number.ok()) return Annotate(number.status(), where);
      const int64_t head = *number;
      const std::string head_where = absl::StrCat(where, ": head ", head);
      if (!text.is_string())
        return Invalid(absl::StrCat(head_where, " is ", Shown(text), ", expected a string"));
      const absl::StatusOr<HeadPattern> pattern = ParseHeadPattern(text.get_ref<const std::string&>());
      if (!pattern.ok()) return Annotate(pattern.status(), head_where);
      const HeadPattern listed = patterns->at(*layer, head);
      if (StandIn(*pattern) == *pattern || listed != StandIn(*pattern)) {
        return Invalid(absl::StrCat(head_where, " is ", ToString(*pattern),
                                    ", for which the list cannot say ", ToString(listed)));
      }
      patterns->Set(*layer, head, *pattern, patterns->score(*layer, head));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckRecalls(const PatternSet& patterns) {
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    for (int64_t head = 0; head < patterns.num_heads(); ++head) {
      const double score = patterns.score(layer, head).value_or(0.0);
      if (!(score >= 0.0 && score <= kMaxRecall)) {
        return Invalid(
            absl::StrCat("layer ", layer, ": head ", head, ": score ", score, " is no recall in [0, 1]"));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status ParseExactObject(const Json& exact, PatternSet* patterns) {
  if (!exact.is_object()) return Invalid(absl::StrCat("exact is ", Shown(exact), ", expected an object"));
  LF_RETURN_IF_ERROR(ParseExact(exact, patterns));
  return CheckRecalls(*patterns);
}

absl::StatusOr<PatternSet> ParseLayers(const Json& list, int64_t num_layers, int64_t num_heads) {
  PatternSet patterns = PatternSet::Uniform(kUnlistedHeadPattern, num_layers, num_heads);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    LF_RETURN_IF_ERROR(Annotate(ParseLayer(list[layer], layer, &patterns), absl::StrCat("layer ", layer)));
  }
  return patterns;
}

// Of one set for shorter prompts, behind those that `patterns` has.
absl::Status ParseOneShorter(const Json& json, PatternSet* patterns) {
  constexpr const char* kKeys[] = {"max_tokens", "layers", "exact"};
  LF_RETURN_IF_ERROR(CheckObject(json, "it", kKeys));
  LF_ASSIGN_OR_RETURN(const int64_t max_tokens, ParseSize(json.at("max_tokens"), "max_tokens"));
  const int64_t before =
      patterns->num_shorter() > 0 ? patterns->max_tokens_of(patterns->num_shorter() - 1) : 0;
  if (max_tokens <= before) {
    return Invalid(absl::StrCat("max_tokens ", max_tokens, " is not above ", before));
  }
  const Json& layers = json.at("layers");
  if (!layers.is_array() || std::ssize(layers) != patterns->num_layers()) {
    return Invalid(absl::StrCat("layers is ", Shown(layers), ", expected a list of ", patterns->num_layers(),
                                " layers"));
  }
  LF_ASSIGN_OR_RETURN(PatternSet shorter, ParseLayers(layers, patterns->num_layers(), patterns->num_heads()));
  LF_RETURN_IF_ERROR(ParseExactObject(json.at("exact"), &shorter));
  shorter.set_provenance(patterns->provenance());
  patterns->AddShorter(max_tokens, std::move(shorter));
  return absl::OkStatus();
}

absl::Status ParseShorter(const Json& list, PatternSet* patterns) {
  if (!list.is_array() || list.empty()) {
    return Invalid(absl::StrCat("shorter is ", Shown(list), ", expected a list of pattern sets"));
  }
  for (size_t i = 0; i < list.size(); ++i) {
    LF_RETURN_IF_ERROR(Annotate(ParseOneShorter(list[i], patterns), absl::StrCat("shorter: set ", i)));
  }
  return absl::OkStatus();
}

// The object behind the layers of our own form, onto the patterns of the layers.
absl::Status ParseOwn(const Json& json, PatternSet* patterns) {
  const auto own = json.find(std::string(kOwnKey));
  if (json.size() != 1 || own == json.end() || !own->is_object()) {
    return Invalid(absl::StrCat("expected an object with the one key ", std::string(kOwnKey)));
  }
  const auto version = own->find("version");
  if (version == own->end() || !version->is_number_integer()) return Invalid("has no whole number version");
  if (*version != kOwnVersion && *version != kOwnVersionWithShorter) {
    return absl::UnimplementedError(absl::StrCat("has version ", version->dump(), ", this program reads ",
                                                 kOwnVersion, " and ", kOwnVersionWithShorter));
  }
  std::vector<const char*> keys = {"version", "model", "calibration", "search", "score", "exact"};
  if (*version == kOwnVersionWithShorter) keys.push_back("shorter");
  LF_RETURN_IF_ERROR(CheckObject(*own, kOwnKey, keys));
  LF_ASSIGN_OR_RETURN(const Json* model, ObjectAt(*own, "model", {"name", "fingerprint"}));
  LF_ASSIGN_OR_RETURN(const Json* calibration, ObjectAt(*own, "calibration", {"sha256"}));
  PatternProvenance provenance;
  LF_ASSIGN_OR_RETURN(provenance.model_name, StringAt(*model, "name", /*is_hash=*/false));
  LF_ASSIGN_OR_RETURN(provenance.model_fingerprint, StringAt(*model, "fingerprint", /*is_hash=*/true));
  LF_ASSIGN_OR_RETURN(provenance.calibration_sha256, StringAt(*calibration, "sha256", /*is_hash=*/true));
  const Json& search = own->at("search");
  if (!search.is_object()) return Invalid(absl::StrCat("search is ", Shown(search), ", expected an object"));
  provenance.search_json = search.dump();
  if (own->at("score") != "recall") {
    return Invalid(absl::StrCat("score is ", Shown(own->at("score")), ", expected 'recall'"));
  }
  LF_RETURN_IF_ERROR(ParseExactObject(own->at("exact"), patterns));
  patterns->set_provenance(std::move(provenance));
  return *version == kOwnVersion ? absl::OkStatus() : ParseShorter(own->at("shorter"), patterns);
}

absl::StatusOr<Json> FormatHead(const HeadPattern& pattern, std::optional<double> score) {
  Json json = Json::array();
  if (const auto* vertical_slash = std::get_if<VerticalSlash>(&pattern)) {
    json = {kVerticalSlashType, vertical_slash->vertical, vertical_slash->slash};
  } else if (const auto* a_shape = std::get_if<AShape>(&pattern)) {
    json = {kAShapeType, a_shape->n_init, a_shape->n_local};
  } else if (const auto* blocks = std::get_if<BlockSparse>(&pattern);
             blocks != nullptr && blocks->num_blocks == kPublishedNumBlocks) {
    json = {kBlockSparseType, kPublishedNumBlocks, 1};
  } else {
    return Invalid(absl::StrCat("the form has no ", ToString(pattern)));
  }
  json.push_back(score ? Json(*score) : Json(nullptr));
  return json;
}

}  // namespace

PatternSet PatternSet::Uniform(const HeadPattern& pattern, int64_t num_layers, int64_t num_heads) {
  PatternSet set;
  set.num_layers_ = num_layers;
  set.num_heads_ = num_heads;
  set.patterns_.assign(num_layers * num_heads, pattern);
  set.scores_.assign(num_layers * num_heads, std::nullopt);
  return set;
}

void PatternSet::Set(int64_t layer, int64_t head, const HeadPattern& pattern, std::optional<double> score) {
  LF_CHECK(layer >= 0 && layer < num_layers_ && head >= 0 && head < num_heads_);
  patterns_[layer * num_heads_ + head] = pattern;
  scores_[layer * num_heads_ + head] = score;
}

const PatternSet& PatternSet::For(int64_t num_tokens) const {
  const auto fits = std::ranges::find_if(max_tokens_, [&](int64_t most) { return num_tokens <= most; });
  return fits == max_tokens_.end() ? *this : shorter_[static_cast<size_t>(fits - max_tokens_.begin())];
}

void PatternSet::AddShorter(int64_t max_tokens, PatternSet patterns) {
  LF_CHECK(patterns.num_layers() == num_layers_ && patterns.num_heads() == num_heads_);
  LF_CHECK(patterns.shorter_.empty() && (max_tokens_.empty() || max_tokens > max_tokens_.back()));
  max_tokens_.push_back(max_tokens);
  shorter_.push_back(std::move(patterns));
}

bool operator==(const PatternSet& a, const PatternSet& b) {
  return a.num_layers_ == b.num_layers_ && a.num_heads_ == b.num_heads_ && a.patterns_ == b.patterns_ &&
         a.scores_ == b.scores_ && a.provenance_ == b.provenance_ && a.max_tokens_ == b.max_tokens_ &&
         a.shorter_ == b.shorter_;
}

absl::StatusOr<PatternSet> ParsePatterns(std::string_view text, std::string_view source, int64_t num_layers,
                                         int64_t num_heads) {
  LF_ASSIGN_OR_RETURN(const Json json, ParseJson(text, source, kJsonLimits));
  const std::string name(source);
  if (!json.is_array()) {
    return Invalid(
        absl::StrCat(name, ": is ", Shown(json), ", expected a list with one object for each layer"));
  }
  const bool own = !json.empty() && json.back().is_object() && json.back().contains(std::string(kOwnKey));
  const int64_t listed_layers = static_cast<int64_t>(json.size()) - (own ? 1 : 0);
  if (listed_layers != num_layers) {
    return Invalid(
        absl::StrCat(name, ": has patterns for ", listed_layers, " layers, expected ", num_layers));
  }
  absl::StatusOr<PatternSet> parsed = ParseLayers(json, num_layers, num_heads);
  if (!parsed.ok()) return Annotate(parsed.status(), name);
  PatternSet patterns = *std::move(parsed);
  if (own) LF_RETURN_IF_ERROR(Annotate(ParseOwn(json.back(), &patterns), absl::StrCat(name, ": longfill")));
  return patterns;
}

absl::StatusOr<PatternSet> LoadPatternFile(const std::string& path, int64_t num_layers, int64_t num_heads) {
  LF_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxPatternFileBytes));
  return ParsePatterns(text, path, num_layers, num_heads);
}

namespace {

Json FormatExact(const PatternSet& patterns) {
  Json exact = Json::object();
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    for (int64_t head = 0; head < patterns.num_heads(); ++head) {
      const HeadPattern& pattern = patterns.at(layer, head);
      if (StandIn(pattern) == pattern) continue;
      exact[absl::StrCat(layer)][absl::StrCat(head)] = ToString(pattern);
    }
  }
  return exact;
}

absl::StatusOr<Json> FormatShorter(const PatternSet& patterns) {
  LF_RETURN_IF_ERROR(CheckRecalls(patterns));
  Json layers = Json::array();
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    Json heads = Json::object();
    for (int64_t head = 0; head < patterns.num_heads(); ++head) {
      LF_ASSIGN_OR_RETURN(heads[absl::StrCat(head)],
                          FormatHead(StandIn(patterns.at(layer, head)), patterns.score(layer, head)));
    }
    layers.push_back(std::move(heads));
  }
  return Json{{"layers", std::move(layers)}, {"exact", FormatExact(patterns)}};
}

// The object behind the layers.
absl::StatusOr<std::string> FormatOwn(const PatternSet& patterns) {
  const PatternProvenance& provenance = *patterns.provenance();
  for (const std::string* hash : {&provenance.model_fingerprint, &provenance.calibration_sha256}) {
    if (!IsSha256(*hash)) {
      return Invalid(absl::StrCat("hash ", QuoteForMessage(*hash), " is not 64 lower-case hex digits"));
    }
  }
  LF_ASSIGN_OR_RETURN(const Json search, ParseJson(provenance.search_json, "search settings"));
  if (!search.is_object()) return Invalid("search settings are not a JSON object");
  LF_RETURN_IF_ERROR(CheckRecalls(patterns));
  Json own = {{"version", patterns.num_shorter() > 0 ? kOwnVersionWithShorter : kOwnVersion},
              {"model", {{"name", provenance.model_name}, {"fingerprint", provenance.model_fingerprint}}},
              {"calibration", {{"sha256", provenance.calibration_sha256}}},
              {"search", search},
              {"score", "recall"},
              {"exact", FormatExact(patterns)}};
  for (int64_t i = 0; i < patterns.num_shorter(); ++i) {
    absl::StatusOr<Json> shorter = FormatShorter(patterns.shorter(i));
    if (!shorter.ok()) return Annotate(shorter.status(), absl::StrCat("shorter: set ", i));
    (*shorter)["max_tokens"] = patterns.max_tokens_of(i);
    own["shorter"].push_back(*std::move(shorter));
  }
  Json object = Json::object();
  object[std::string(kOwnKey)] = own;
  return object.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

absl::StatusOr<std::string> FormatPatterns(const PatternSet& patterns) {
  const bool own = patterns.provenance().has_value();
  std::string text = "[";
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    text += layer == 0 ? "{" : ",\n {";
    for (int64_t head = 0; head < patterns.num_heads(); ++head) {
      const HeadPattern& pattern = patterns.at(layer, head);
      absl::StatusOr<Json> entry = FormatHead(own ? StandIn(pattern) : pattern, patterns.score(layer, head));
      if (!entry.ok()) return Annotate(entry.status(), absl::StrCat("layer ", layer, ": head ", head));
      absl::StrAppend(&text, head == 0 ? "" : ", ", "\"", head, "\": ", entry->dump());
    }
    text += "}";
  }
  if (own) {
    LF_ASSIGN_OR_RETURN(const std::string object, FormatOwn(patterns));
    absl::StrAppend(&text, text.size() > 1 ? ",\n " : "", object);
  }
  return text + "]\n";
}

absl::Status WritePatternFile(const PatternSet& patterns, const std::string& path) {
  LF_ASSIGN_OR_RETURN(const std::string text, FormatPatterns(patterns));
  const std::string unfinished = path + ".unfinished";
  std::FILE* file = std::fopen(unfinished.c_str(), "wb");
  if (file == nullptr) return absl::ErrnoToStatus(errno, absl::StrCat("cannot create ", unfinished));
  int error = std::fwrite(text.data(), 1, text.size(), file) == text.size() ? 0 : errno;
  if (std::fclose(file) != 0 && error == 0) error = errno;
  if (error == 0 && std::rename(unfinished.c_str(), path.c_str()) != 0) error = errno;
  if (error == 0) return absl::OkStatus();
  std::remove(unfinished.c_str());
  return absl::ErrnoToStatus(error, absl::StrCat("cannot write ", path));
}

}  // namespace longfill
