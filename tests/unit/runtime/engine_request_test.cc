// Rank commands: what rank 0 sends is what the others read, and broken bytes are errors.

#include <cstring>

#include "absl/strings/str_cat.h"
#include "runtime/engine/request_plan.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

PrefillRequest FullRequest() {
  PrefillRequest request;
  request.request_id = "a \"request\" \n with 字";
  request.transfer_id = "0123456789abcdef";
  request.token_ids = {0, 1, -1, 2147483647, 128000};
  request.attention = {"heads.json", R"([{"0": ["stream_llm", 1, 2, 0.5]}])"};
  request.coverage = Coverage::kParity;
  request.logits_positions = {4, 0, 4, int64_t{1} << 40};
  request.kv_dtype = DType::kBFloat16;
  request.recall = {.monitor = true, .min_recall = 0.975};
  return request;
}

std::string WithHeader(const std::string& header, const std::string& rest = "") {
  const uint64_t length = header.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + header + rest;
}

TEST(RankCommand, PrefillComesBackAsItWasSent) {
  for (const bool empty : {false, true}) {
    const PrefillRequest sent = empty ? PrefillRequest{} : FullRequest();
    LF_ASSERT_OK_AND_ASSIGN(const RankCommand command, Decode(Encode(PrefillCommand{sent})));
    ASSERT_TRUE(std::holds_alternative<PrefillCommand>(command));
    const PrefillRequest& got = std::get<PrefillCommand>(command).request;
    EXPECT_EQ(got.request_id, sent.request_id);
    EXPECT_EQ(got.transfer_id, sent.transfer_id);
    EXPECT_EQ(got.token_ids, sent.token_ids);
    EXPECT_EQ(got.attention.text, sent.attention.text);
    EXPECT_EQ(got.attention.pattern_json, sent.attention.pattern_json);
    EXPECT_EQ(got.coverage, sent.coverage);
    EXPECT_EQ(got.logits_positions, sent.logits_positions);
    EXPECT_EQ(got.kv_dtype, sent.kv_dtype);
    EXPECT_EQ(got.recall, sent.recall);
  }
}

TEST(RankCommand, OthersComeBackAsTheyWereSent) {
  LF_ASSERT_OK_AND_ASSIGN(const RankCommand shutdown, Decode(Encode(ShutdownCommand{})));
  EXPECT_TRUE(std::holds_alternative<ShutdownCommand>(shutdown));
  LF_ASSERT_OK_AND_ASSIGN(const RankCommand keep_alive, Decode(Encode(KeepAliveCommand{})));
  EXPECT_TRUE(std::holds_alternative<KeepAliveCommand>(keep_alive));
}

TEST(RankCommand, ClientTextThatIsNotUtf8IsNotFatal) {
  PrefillRequest request = FullRequest();
  request.request_id = "\xff\xfe";
  LF_ASSERT_OK_AND_ASSIGN(const RankCommand command, Decode(Encode(PrefillCommand{request})));
  EXPECT_EQ(std::get<PrefillCommand>(command).request.token_ids, request.token_ids);
}

TEST(RankCommand, EveryTruncationIsAnErrorOrCutsWholeTokens) {
  const std::string bytes = Encode(PrefillCommand{FullRequest()});
  const size_t header_end = bytes.size() - FullRequest().token_ids.size() * sizeof(int32_t);
  for (size_t size = 0; size < bytes.size(); ++size) {
    const auto command = Decode(std::string_view(bytes).substr(0, size));
    const bool whole_tokens = size >= header_end && (size - header_end) % sizeof(int32_t) == 0;
    EXPECT_EQ(command.ok(), whole_tokens) << size << " bytes";
    if (!command.ok()) {
      EXPECT_EQ(command.status().code(), absl::StatusCode::kInternal);
    }
  }
}

TEST(RankCommand, BrokenHeadersAreErrors) {
  for (const char* header :
       {"", "not json", "[]", "7", "{}", R"({"command": 7})", R"({"command": "dance"})",
        R"({"command": "prefill"})", R"({"command": "prefill", "request": 7})",
        R"({"command": "prefill", "request": {}})",
        R"({"command": "prefill", "request": {"coverage": "tiles", "kv_dtype": "float31"}})",
        R"({"command": "prefill", "request": {"coverage": "round", "kv_dtype": "float32"}})",
        R"({"command": "prefill", "request": {"coverage": "tiles", "kv_dtype": "float32", "request_id": 7}})",
        R"({"command": "prefill", "request":
            {"coverage": "tiles", "kv_dtype": "float32", "logits_positions": ["a"]}})"}) {
    EXPECT_FALSE(Decode(WithHeader(header)).ok()) << header;
  }
  EXPECT_FALSE(Decode(std::string(8, '\xff')).ok());  // a length beyond everything
}

}  // namespace
}  // namespace longfill
