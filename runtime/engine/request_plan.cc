#include "runtime/engine/request_plan.h"

#include <cstring>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

using Json = nlohmann::json;

// Layout: 8 bytes little-endian length of a JSON object, the object, then the token ids as int32.
constexpr size_t kLengthBytes = sizeof(uint64_t);

Json ToJson(const PrefillRequest& request) {
  return {{"request_id", request.request_id},
          {"transfer_id", request.transfer_id},
          {"attention", request.attention.text},
          {"pattern_json", request.attention.pattern_json},
          {"dense_without_room", request.attention.dense_without_room},
          {"coverage", std::string(CoverageName(request.coverage))},
          {"logits_positions", request.logits_positions},
          {"kv_dtype", std::string(DTypeName(request.kv_dtype))},
          {"recall_monitor", request.recall.monitor},
          {"min_recall", request.recall.min_recall}};
}

// Throws Json::exception where a value has another type.
absl::StatusOr<PrefillRequest> FromJson(const Json& json) {
  PrefillRequest request;
  request.request_id = json.value("request_id", "");
  request.transfer_id = json.value("transfer_id", "");
  request.attention.text = json.value("attention", "");
  request.attention.pattern_json = json.value("pattern_json", "");
  request.attention.dense_without_room = json.value("dense_without_room", false);
  LF_ASSIGN_OR_RETURN(request.coverage, ParseCoverage(json.value("coverage", "")));
  request.logits_positions = json.value("logits_positions", std::vector<int64_t>());
  LF_ASSIGN_OR_RETURN(request.kv_dtype, ParseDType(json.value("kv_dtype", "")));
  request.recall = {json.value("recall_monitor", false), json.value("min_recall", 0.0)};
  return request;
}

// Throws like FromJson.
absl::StatusOr<RankCommand> DecodeParts(const Json& header, std::string_view ids) {
  const std::string command = header.value("command", "");
  if (command == "shutdown") return ShutdownCommand{};
  if (command == "keep-alive") return KeepAliveCommand{};
  if (command != "prefill") return absl::InternalError(absl::StrCat("rank command \"", command, "\""));
  LF_ASSIGN_OR_RETURN(PrefillRequest request, FromJson(header.at("request")));
  if (ids.size() % sizeof(int32_t) != 0) {
    return absl::InternalError(absl::StrCat("rank command with ", ids.size(), " bytes of token ids"));
  }
  request.token_ids.resize(ids.size() / sizeof(int32_t));
  if (!ids.empty()) std::memcpy(request.token_ids.data(), ids.data(), ids.size());
  return PrefillCommand{std::move(request)};
}

}  // namespace

std::string Encode(const RankCommand& command) {
  Json header;
  std::string_view ids;
  if (const auto* prefill = std::get_if<PrefillCommand>(&command); prefill != nullptr) {
    header = {{"command", "prefill"}, {"request", ToJson(prefill->request)}};
    ids = std::string_view(reinterpret_cast<const char*>(prefill->request.token_ids.data()),
                           prefill->request.token_ids.size() * sizeof(int32_t));
  } else {
    header = {{"command", std::holds_alternative<ShutdownCommand>(command) ? "shutdown" : "keep-alive"}};
  }
  // Request ids come from clients; bytes that are not UTF-8 are replaced rather than fatal.
  const std::string text = header.dump(-1, ' ', false, Json::error_handler_t::replace);
  const uint64_t length = text.size();
  std::string bytes(kLengthBytes, '\0');
  std::memcpy(bytes.data(), &length, kLengthBytes);
  bytes.append(text);
  bytes.append(ids);
  return bytes;
}

absl::StatusOr<RankCommand> Decode(std::string_view bytes) {
  uint64_t length = 0;
  if (bytes.size() < kLengthBytes) {
    return absl::InternalError(absl::StrCat("rank command of ", bytes.size(), " bytes"));
  }
  std::memcpy(&length, bytes.data(), kLengthBytes);
  bytes.remove_prefix(kLengthBytes);
  if (length > bytes.size())
    return absl::InternalError(absl::StrCat("rank command header of ", length, " bytes"));
  const Json header = Json::parse(bytes.substr(0, length), nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) return absl::InternalError("rank command header is not JSON");
  bytes.remove_prefix(length);
  try {
    return DecodeParts(header, bytes);
  } catch (const Json::exception& error) {
    return absl::InternalError(absl::StrCat("rank command header: ", error.what()));
  }
}

}  // namespace longfill
