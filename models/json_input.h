#ifndef LONGFILL_MODELS_JSON_INPUT_H_
#define LONGFILL_MODELS_JSON_INPUT_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace longfill {

struct JsonLimits {
  int max_depth = 32;              // of arrays and objects inside one another
  int64_t max_values = 4'000'000;  // bounds the memory that hostile input can take
};

// Strict JSON from outside: no duplicate keys in an object, no trailing bytes, within `limits`.
// InvalidArgument names `source` and what is wrong where. Never throws on bad input.
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view source,
                                         const JsonLimits& limits = {});

// 'text' in quotes, cut after 200 bytes, control and invalid bytes escaped: what outsiders wrote, for our
// messages.
std::string QuoteForMessage(std::string_view text);

// InvalidArgument, beginning with `name`, where an object has other keys than `keys`.
absl::Status CheckKeys(const nlohmann::json& object, std::string_view name,
                       std::span<const char* const> keys);

// The whole file. NotFound: it does not exist; InvalidArgument: more than max_bytes, or not a plain file.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes);

}  // namespace longfill

#endif  // LONGFILL_MODELS_JSON_INPUT_H_
