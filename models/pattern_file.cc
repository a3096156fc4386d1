#include "models/pattern_file.h"

#include <cerrno>
#include <charconv>
#include <cstdio>
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
constexpr JsonLimits kJsonLimits = {.max_depth = 3, .max_values = 2'000'000};

absl::Status Invalid(const std::string& what) { return absl::InvalidArgumentError(what); }

// A value of the file for a message, however large it is.
std::string Shown(const Json& value) {
  if (value.is_structured()) return absl::StrCat("an ", value.type_name(), " of ", value.size());
  if (value.is_string()) return QuoteForMessage(value.get_ref<const std::string&>());
  return value.dump();
}

// Only the form that a writer of numbers gives, so that "7" and "07" cannot both name head 7.
absl::StatusOr<int64_t> ParseHead(const std::string& key, int64_t num_heads) {
  int64_t head = -1;
  const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), head);
  if (error != std::errc() || end != key.data() + key.size() || absl::StrCat(head) != key) {
    return Invalid(
        absl::StrCat("head ", QuoteForMessage(key), " is not a head number in [0, ", num_heads, ")"));
  }
  if (head < 0 || head >= num_heads) {
    return Invalid(absl::StrCat("head ", head, " is not in [0, ", num_heads, "), the model's query heads"));
  }
  return head;
}

absl::StatusOr<int64_t> ParseSize(const Json& value, const char* name) {
  const bool too_large =
      value.is_number_unsigned() && value.get<uint64_t>() > std::numeric_limits<int32_t>::max();
  if (!value.is_number_integer() || too_large || value.get<int64_t>() < 0) {
    return Invalid(absl::StrCat(name, " ", Shown(value), " is not an integer in [0, 2147483647]"));
  }
  return value.get<int64_t>();
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
  LF_ASSIGN_OR_RETURN(const int64_t vertical, ParseSize(json[1], "vertical_size"));
  LF_ASSIGN_OR_RETURN(const int64_t slash, ParseSize(json[2], "slash_size"));
  Entry entry;
  if (type == kVerticalSlashType) {
    entry.pattern = VerticalSlash{vertical, slash};
  } else if (type == kAShapeType) {
    entry.pattern = AShape{vertical, slash};
  } else if (type == kBlockSparseType) {
    entry.pattern = BlockSparse{kPublishedNumBlocks};
  } else {
    return Invalid(absl::StrCat("type ", QuoteForMessage(type),
                                " is unknown, expected vertical_and_slash, stream_llm or block_sparse"));
  }
  LF_RETURN_IF_ERROR(Validate(entry.pattern));
  if (!json[3].is_null()) {
    if (!json[3].is_number()) return Invalid(absl::StrCat("score ", Shown(json[3]), " is not a number"));
    entry.score = json[3].get<double>();
  }
  return entry;
}

absl::Status ParseLayer(const Json& json, int64_t layer, PatternSet* patterns) {
  if (!json.is_object()) {
    return Invalid(absl::StrCat("is ", Shown(json), ", expected an object from head numbers to patterns"));
  }
  for (const auto& [key, value] : json.items()) {
    LF_ASSIGN_OR_RETURN(const int64_t head, ParseHead(key, patterns->num_heads()));
    absl::StatusOr<Entry> entry = ParseEntry(value);
    if (!entry.ok()) return Annotate(entry.status(), absl::StrCat("head ", head));
    patterns->Set(layer, head, entry->pattern, entry->score);
  }
  return absl::OkStatus();
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
    return Invalid(absl::StrCat("the published form has no ", ToString(pattern)));
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

absl::StatusOr<PatternSet> ParsePatterns(std::string_view text, std::string_view source, int64_t num_layers,
                                         int64_t num_heads) {
  LF_ASSIGN_OR_RETURN(const Json json, ParseJson(text, source, kJsonLimits));
  const std::string name(source);
  if (!json.is_array()) {
    return Invalid(
        absl::StrCat(name, ": is ", Shown(json), ", expected a list with one object for each layer"));
  }
  if (static_cast<int64_t>(json.size()) != num_layers) {
    return Invalid(absl::StrCat(name, ": has patterns for ", json.size(), " layers, expected ", num_layers));
  }
  PatternSet patterns = PatternSet::Uniform(kUnlistedHeadPattern, num_layers, num_heads);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    LF_RETURN_IF_ERROR(
        Annotate(ParseLayer(json[layer], layer, &patterns), absl::StrCat(name, ": layer ", layer)));
  }
  return patterns;
}

absl::StatusOr<PatternSet> LoadPatternFile(const std::string& path, int64_t num_layers, int64_t num_heads) {
  LF_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxPatternFileBytes));
  return ParsePatterns(text, path, num_layers, num_heads);
}

absl::StatusOr<std::string> FormatPatterns(const PatternSet& patterns) {
  std::string text = "[";
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    text += layer == 0 ? "{" : ",\n {";
    for (int64_t head = 0; head < patterns.num_heads(); ++head) {
      absl::StatusOr<Json> entry = FormatHead(patterns.at(layer, head), patterns.score(layer, head));
      if (!entry.ok()) return Annotate(entry.status(), absl::StrCat("layer ", layer, ": head ", head));
      absl::StrAppend(&text, head == 0 ? "" : ", ", "\"", head, "\": ", entry->dump());
    }
    text += "}";
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
