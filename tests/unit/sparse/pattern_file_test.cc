#include "models/pattern_file.h"

#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

constexpr std::string_view kTwoLayers = R"([
  {"0": ["vertical_and_slash", 700, 1200, 0.91], "1": ["stream_llm", 64, 512, 123456], "2": ["block_sparse", 50, 1, 0.73]},
  {"2": ["vertical_and_slash", 40, 900, null]}
])";

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "pattern_file_test.XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  std::string File(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

TEST(ParsePatterns, ReadsAllTypesScoresAndUnlistedHeads) {
  LF_ASSERT_OK_AND_ASSIGN(const PatternSet set, ParsePatterns(kTwoLayers, "made-up", 2, 3));
  EXPECT_EQ(set.num_layers(), 2);
  EXPECT_EQ(set.num_heads(), 3);
  EXPECT_EQ(set.at(0, 0), HeadPattern(VerticalSlash{700, 1200}));
  EXPECT_EQ(set.at(0, 1), HeadPattern(AShape{64, 512}));
  EXPECT_EQ(set.at(0, 2), HeadPattern(BlockSparse{100}));  // as the published dispatcher does
  EXPECT_EQ(set.at(1, 0), HeadPattern(VerticalSlash{1000, 6096}));
  EXPECT_EQ(set.at(1, 2), HeadPattern(VerticalSlash{40, 900}));
  EXPECT_EQ(set.score(0, 0), 0.91);
  EXPECT_EQ(set.score(0, 1), 123456);
  EXPECT_EQ(set.score(1, 0), std::nullopt);
  EXPECT_EQ(set.score(1, 2), std::nullopt);
  EXPECT_EQ(set.layer(1).size(), 3u);
  EXPECT_EQ(set.layer(1)[2], set.at(1, 2));
}

TEST(ParsePatterns, NamesFileLayerHeadValueAndWhatWasExpected) {
  struct Case {
    const char* json;
    std::vector<const char*> message;
  };
  const Case cases[] = {
      {"", {"p.json", "not valid JSON"}},
      {"[{}", {"p.json", "not valid JSON"}},
      {"[{},{}] []", {"p.json", "not valid JSON"}},
      {"{}", {"p.json", "an object of 0", "expected a list"}},
      {"[{}]", {"p.json", "patterns for 1 layers, expected 2"}},
      {"[{},{},{}]", {"p.json", "patterns for 3 layers, expected 2"}},
      {"[{}, 5]", {"p.json: layer 1", "is 5", "expected an object"}},
      {"[{}, []]", {"p.json: layer 1", "is an array of 0"}},
      {R"([{}, {"3": ["vertical_and_slash", 1, 1, 1]}])", {"layer 1: head 3 is not in [0, 3)"}},
      {R"([{}, {"-1": ["vertical_and_slash", 1, 1, 1]}])", {"layer 1: head -1 is not in [0, 3)"}},
      {R"([{"x": ["vertical_and_slash", 1, 1, 1]}, {}])", {"layer 0: head 'x' is not a head number"}},
      {R"([{"01": ["vertical_and_slash", 1, 1, 1]}, {}])", {"layer 0: head '01' is not a head number"}},
      {R"([{"99999999999999999999": ["vertical_and_slash", 1, 1, 1]}, {}])",
       {"is not a head number in [0, 3)"}},
      {R"([{"1": ["stream_llm", 1, 1, 1], "1": ["stream_llm", 1, 1, 1]}, {}])",
       {"p.json", "duplicate key '1'"}},
      {R"([{"1": 7}, {}])", {"layer 0: head 1", "value is 7, expected [type"}},
      {R"([{"1": ["vertical_and_slash", 1, 1]}, {}])", {"head 1", "an array of 3", "expected [type"}},
      {R"([{"1": ["vertical_and_slash", 1, 1, 1, 1]}, {}])", {"head 1", "an array of 5"}},
      {R"([{"1": [1, 1, 1, 1]}, {}])", {"head 1", "type 1 is not a string"}},
      {R"([{"1": ["flash", 1, 1, 1]}, {}])",
       {"head 1", "type 'flash' is unknown, expected vertical_and_slash"}},
      {R"([{"1": ["vertical_and_slash", -5, 1, 1]}, {}])",
       {"layer 0: head 1", "vertical_size -5 is not an integer"}},
      {R"([{"1": ["block_sparse", 1, -6, 1]}, {}])", {"head 1", "slash_size -6"}},
      {R"([{"1": ["stream_llm", 1, 1.5, 1]}, {}])", {"head 1", "slash_size 1.5 is not an integer"}},
      {R"([{"1": ["stream_llm", 1e3, 1, 1]}, {}])", {"head 1", "vertical_size 1000.0 is not an integer"}},
      {R"([{"1": ["stream_llm", "7", 1, 1]}, {}])", {"head 1", "vertical_size '7' is not an integer"}},
      {R"([{"1": ["stream_llm", 18446744073709551615, 1, 1]}, {}])",
       {"vertical_size 18446744073709551615 is not"}},
      {R"([{"1": ["stream_llm", 99999999999999999999, 1, 1]}, {}])", {"vertical_size 1e+20 is not"}},
      {R"([{"1": ["vertical_and_slash", 0, 0, 1]}, {}])", {"head 1", "vertical 0 and slash 0"}},
      {R"([{"1": ["stream_llm", 4, 0, 1]}, {}])", {"head 1", "n_local 0"}},
      {R"([{"1": ["stream_llm", 4, 4, "high"]}, {}])", {"head 1", "score 'high' is not a number"}},
      {R"([{"1": ["stream_llm", 4, 4, [1]]}, {}])", {"p.json", "nested deeper"}},
  };
  for (const Case& c : cases) {
    for (const char* message : c.message) {
      EXPECT_THAT(ParsePatterns(c.json, "p.json", 2, 3),
                  StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)))
          << c.json;
    }
  }
}

TEST(ParsePatterns, RefusesHostileJsonQuickly) {
  const std::string deep(5'000'000, '[');
  EXPECT_THAT(ParsePatterns(deep, "deep", 1, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("nested deeper")));
  std::string wide = "[";
  for (int i = 0; i < 2'500'000; ++i) wide += "0,";
  wide += "0]";
  EXPECT_THAT(ParsePatterns(wide, "wide", 1, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("values")));
  const std::string long_type = absl::StrCat(R"([{"0": [")", std::string(1 << 20, 'x'), R"(", 1, 1, 1]}])");
  const absl::Status status = ParsePatterns(long_type, "long", 1, 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_LT(status.message().size(), 1000u);
}

TEST(ParsePatterns, SurvivesMutatedText) {
  std::mt19937 random(9);
  int parsed = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string text(kTwoLayers);
    for (uint32_t edits = 1 + random() % 4; edits > 0; --edits) {
      const size_t at = random() % text.size();
      switch (random() % 4) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text.erase(at, 1 + random() % 8);
          break;
        case 2:
          text.insert(at, 1, "0123456789-,:.[]{}\"e"[random() % 20]);
          break;
        default:
          text.insert(at, text.substr(random() % text.size(), random() % 40));
      }
    }
    const absl::StatusOr<PatternSet> set = ParsePatterns(text, "mutated", 2, 3);
    if (!set.ok()) {
      EXPECT_EQ(set.status().code(), absl::StatusCode::kInvalidArgument) << text;
      continue;
    }
    ++parsed;
    LF_ASSERT_OK_AND_ASSIGN(const std::string written, FormatPatterns(*set));
    LF_ASSERT_OK_AND_ASSIGN(const PatternSet again, ParsePatterns(written, "written", 2, 3));
    EXPECT_EQ(again, *set) << text;
  }
  EXPECT_GT(parsed, 100);
}

TEST(FormatPatterns, RefusesWhatThePublishedFormCannotSay) {
  PatternSet set = PatternSet::Uniform(AShape{1, 1}, 2, 2);
  set.Set(1, 0, Dense());
  EXPECT_THAT(FormatPatterns(set), StatusIs(absl::StatusCode::kInvalidArgument,
                                            HasSubstr("layer 1: head 0: the published form has no dense")));
  set.Set(1, 0, BlockSparse{50});
  EXPECT_THAT(FormatPatterns(set),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("block-sparse:50")));
  set.Set(1, 0, BlockSparse{100}, 0.5);
  LF_ASSERT_OK_AND_ASSIGN(const std::string text, FormatPatterns(set));
  EXPECT_EQ(text, R"([{"0": ["stream_llm",1,1,null], "1": ["stream_llm",1,1,null]},
 {"0": ["block_sparse",100,1,0.5], "1": ["stream_llm",1,1,null]}]
)");
}

TEST(PatternFile, WrittenOneIsReadBack) {
  const TemporaryDirectory directory;
  LF_ASSERT_OK_AND_ASSIGN(const PatternSet set, ParsePatterns(kTwoLayers, "made-up", 2, 3));
  LF_ASSERT_OK(WritePatternFile(set, directory.File("p.json")));
  LF_ASSERT_OK_AND_ASSIGN(const PatternSet again, LoadPatternFile(directory.File("p.json"), 2, 3));
  EXPECT_EQ(again, set);
  EXPECT_FALSE(std::filesystem::exists(directory.File("p.json.unfinished")));
  EXPECT_THAT(WritePatternFile(set, directory.File("none/p.json")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
}

TEST(PatternFile, RefusesAbsentHugeAndStrangeFiles) {
  const TemporaryDirectory directory;
  EXPECT_THAT(LoadPatternFile(directory.File("absent.json"), 1, 1),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("absent.json")));
  std::ofstream(directory.File("huge.json")) << "[";
  std::filesystem::resize_file(directory.File("huge.json"), kMaxPatternFileBytes + 1);
  EXPECT_THAT(LoadPatternFile(directory.File("huge.json"), 1, 1),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr(absl::StrCat("limit of ", kMaxPatternFileBytes))));
  EXPECT_THAT(LoadPatternFile(directory.File("."), 1, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("plain")));
}

TEST(PatternFile, AllPublishedFilesLoad) {
  const std::filesystem::path folder = std::filesystem::path(LONGFILL_SHARED_DIR) / "patterns";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << folder << " is absent (LONGFILL_SHARED_DIR)";
  struct File {
    const char* name;
    int64_t num_layers;
    int64_t num_heads;
  };
  const File files[] = {
      {"GLM_4_9B_1M_instruct_kv_out_v32_fit_o_best_pattern.json", 40, 32},
      {"Llama_3.1_70B_Instruct_128k_kv_out_v32_fit_o_best_pattern_v2.json", 80, 64},
      {"Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern.json", 32, 32},
      {"Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern_v2.json", 32, 32},
      {"Llama_3_70B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json", 80, 64},
      {"Llama_3_8B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json", 32, 32},
      {"Phi_3_mini_128k_instruct_kv_out_v32_fit_o_best_pattern.json", 32, 32},
      {"Qwen2.5_14B_Instruct_1M.json", 48, 40},
      {"Qwen2.5_32B_Instruct_128k_kv_out_v32_fit_o_best_pattern.json", 64, 40},
      {"Qwen2.5_72B_Instruct_128k_kv_out_v32_fit_o_best_pattern.json", 80, 64},
      {"Qwen2.5_7B_Instruct_128k_instruct_kv_out_v32_fit_o_best_pattern.json", 28, 28},
      {"Qwen2.5_7B_Instruct_1M.json", 28, 28},
      {"Qwen2_7B_Instruct_128k_instruct_kv_out_v32_fit_o_best_pattern.json", 28, 28},
      {"Yi_9B_200k_kv_out_v32_fit_o_best_pattern.json", 48, 32},
  };
  int64_t a_shapes_of_phi = 0;
  for (const File& file : files) {
    LF_ASSERT_OK_AND_ASSIGN(const PatternSet set,
                            LoadPatternFile((folder / file.name).string(), file.num_layers, file.num_heads));
    LF_ASSERT_OK_AND_ASSIGN(const std::string text, FormatPatterns(set));
    LF_ASSERT_OK_AND_ASSIGN(const PatternSet again,
                            ParsePatterns(text, file.name, file.num_layers, file.num_heads));
    EXPECT_EQ(again, set) << file.name;
    EXPECT_THAT(LoadPatternFile((folder / file.name).string(), file.num_layers + 1, file.num_heads),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         HasSubstr(absl::StrCat("expected ", file.num_layers + 1))));
    EXPECT_THAT(
        LoadPatternFile((folder / file.name).string(), file.num_layers, file.num_heads - 1),
        StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(absl::StrCat("head ", file.num_heads - 1))));
    for (int64_t layer = 0; layer < file.num_layers; ++layer) {
      for (int64_t head = 0; head < file.num_heads; ++head) {
        if (std::string_view(file.name).starts_with("Phi"))
          a_shapes_of_phi += set.at(layer, head) == HeadPattern(AShape{100, 800});
        EXPECT_TRUE(set.score(layer, head).has_value());
      }
    }
  }
  EXPECT_EQ(a_shapes_of_phi, 43);
}

}  // namespace
}  // namespace longfill
