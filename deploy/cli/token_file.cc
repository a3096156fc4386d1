#include "deploy/cli/token_file.h"

#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "models/json_input.h"

namespace longfill {
namespace {

constexpr int64_t kMaxQuotedCharacters = 40;

absl::Status ReadError(const std::string& source, int error) {
  const std::string message = absl::StrCat(source, ": ", std::strerror(error));
  if (error == ENOENT || error == ENOTDIR) return absl::NotFoundError(message);
  if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(message);
  return absl::InvalidArgumentError(message);
}

absl::StatusOr<std::string> ReadAll(std::FILE* file, const std::string& source) {
  std::string bytes;
  char piece[1 << 16];
  while (const size_t count = std::fread(piece, 1, sizeof(piece), file)) bytes.append(piece, count);
  if (std::ferror(file) != 0) return ReadError(source, errno);
  return bytes;
}

absl::Status NegativeId(const std::string& source, size_t index, int64_t id) {
  return absl::InvalidArgumentError(
      absl::StrCat(source, ": token id ", id, " at index ", index, " is negative"));
}

// Room for prompts far beyond any model's, and for one list in the list, which is named then.
constexpr JsonLimits kTokenListLimits = {.max_depth = 2, .max_values = int64_t{1} << 27};

std::string Quoted(const nlohmann::json& value) {
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
  if (text.size() > kMaxQuotedCharacters) text = text.substr(0, kMaxQuotedCharacters) + "...";
  return text;
}

}  // namespace

absl::StatusOr<std::vector<int32_t>> ParseBinaryTokens(std::string_view bytes, const std::string& source) {
  static_assert(std::endian::native == std::endian::little);
  if (bytes.empty()) return absl::InvalidArgumentError(absl::StrCat(source, ": no token ids"));
  if (bytes.size() % sizeof(int32_t) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": ", bytes.size(), " bytes are not a whole number of int32 token ids"));
  }
  std::vector<int32_t> ids(bytes.size() / sizeof(int32_t));
  std::memcpy(ids.data(), bytes.data(), bytes.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0) return NegativeId(source, i, ids[i]);
  }
  return ids;
}

absl::StatusOr<std::vector<int32_t>> ParseJsonTokens(std::string_view text, const std::string& source) {
  const absl::StatusOr<nlohmann::json> parsed = ParseJson(text, source, kTokenListLimits);
  if (!parsed.ok()) {
    return absl::Status(parsed.status().code(), absl::StrCat(parsed.status().message(),
                                                             "; expected a JSON list of token ids, or a file "
                                                             "named .i32 of little-endian int32"));
  }
  const nlohmann::json& list = *parsed;
  if (!list.is_array()) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": expected a JSON list of token ids, found ", Quoted(list)));
  }
  if (list.empty()) return absl::InvalidArgumentError(absl::StrCat(source, ": no token ids"));
  std::vector<int32_t> ids;
  ids.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const nlohmann::json& value = list[i];
    if (!value.is_number_integer()) {
      return absl::InvalidArgumentError(
          absl::StrCat(source, ": element ", i, " is ", Quoted(value), ", not an integer"));
    }
    // Integers beyond int64 are unsigned to the parser.
    const bool too_large = value.is_number_unsigned()
                               ? value.get<uint64_t>() > uint64_t{std::numeric_limits<int32_t>::max()}
                               : false;
    if (too_large) {
      return absl::InvalidArgumentError(
          absl::StrCat(source, ": token id ", Quoted(value), " at index ", i, " does not fit int32"));
    }
    if (value.get<int64_t>() < 0) return NegativeId(source, i, value.get<int64_t>());
    ids.push_back(value.get<int32_t>());
  }
  return ids;
}

absl::StatusOr<std::vector<int32_t>> ReadTokenFile(const std::string& path) {
  if (path == "-") {
    LF_ASSIGN_OR_RETURN(const std::string text, ReadAll(stdin, "standard input"));
    return ParseJsonTokens(text, "standard input");
  }
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) return ReadError(path, errno);
  LF_ASSIGN_OR_RETURN(const std::string bytes, ReadAll(file.get(), path));
  return absl::EndsWith(path, ".i32") ? ParseBinaryTokens(bytes, path) : ParseJsonTokens(bytes, path);
}

absl::StatusOr<std::vector<int64_t>> ParseLogitsPositions(std::string_view text) {
  std::vector<int64_t> positions;
  if (text == "last") return positions;
  for (const absl::string_view piece : absl::StrSplit(absl::string_view(text.data(), text.size()), ',')) {
    int64_t position = 0;
    if (!absl::SimpleAtoi(piece, &position) || position < 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--logits: '", piece, "' is no position; expected 'last' or a list such as 4094,4095"));
    }
    positions.push_back(position);
  }
  return positions;
}

}  // namespace longfill
