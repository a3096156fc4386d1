#include "models/pattern_file.h"

#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "models/pattern_directory.h"
#include "nlohmann/json.hpp"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::AllOf;
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
  EXPECT_EQ(set.at(1, 1), HeadPattern(VerticalSlash{1000, 6096}));
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
      {R"([{"1": ["stream_llm", 4, 4, [1]]}, {}])", {"head 1", "score an array of 1 is not a number"}},
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

TEST(FormatPatterns, RefusesWhatTheFormCannotSay) {
  PatternSet set = PatternSet::Uniform(AShape{1, 1}, 2, 2);
  set.Set(1, 0, Dense());
  EXPECT_THAT(FormatPatterns(set), StatusIs(absl::StatusCode::kInvalidArgument,
                                            HasSubstr("layer 1: head 0: the form has no dense")));
  set.Set(1, 0, BlockSparse{50});
  EXPECT_THAT(FormatPatterns(set),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("block-sparse:50")));
  set.Set(1, 0, BlockSparse{100}, 0.5);
  LF_ASSERT_OK_AND_ASSIGN(const std::string text, FormatPatterns(set));
  EXPECT_EQ(text, R"([{"0": ["stream_llm",1,1,null], "1": ["stream_llm",1,1,null]},
 {"0": ["block_sparse",100,1,0.5], "1": ["stream_llm",1,1,null]}]
)");
}

constexpr char kHash[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

// Two layers of two heads, with everything that only our own form says.
PatternSet OwnSet() {
  PatternSet set = PatternSet::Uniform(VerticalSlash{700, 1200}, 2, 2);
  set.Set(0, 1, Dense(), 1.0);
  set.Set(1, 0, BlockSparse{50}, 0.875);
  set.Set(1, 1, AShape{64, 512}, 0.25);
  set.set_provenance(PatternProvenance{"tiny", kHash, kHash, R"({"budgets":[1,2]})"});
  return set;
}

TEST(OwnPatternForm, IsReadBack) {
  LF_ASSERT_OK_AND_ASSIGN(const std::string text, FormatPatterns(OwnSet()));
  LF_ASSERT_OK_AND_ASSIGN(const PatternSet again, ParsePatterns(text, "own", 2, 2));
  EXPECT_EQ(again, OwnSet());
  EXPECT_EQ(again.provenance()->search_json, R"({"budgets":[1,2]})");
  EXPECT_THAT(ParsePatterns(text, "own", 3, 2),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("patterns for 2 layers, expected 3")));
}

TEST(OwnPatternForm, HasEveryPatternThatCanBeNamed) {
  PatternSet set = OwnSet();
  set.Set(0, 0, BlockShare{4, 0.2}, 0.99);
  set.Set(1, 1, BlockShare{4, 0.01, 8, 0, /*fp8=*/true}, 0.5);
  LF_ASSERT_OK_AND_ASSIGN(const std::string text, FormatPatterns(set));
  LF_ASSERT_OK_AND_ASSIGN(const PatternSet again, ParsePatterns(text, "own", 2, 2));
  EXPECT_EQ(again, set);
  const nlohmann::json json = nlohmann::json::parse(text);
  EXPECT_EQ(json[0]["0"].dump(), R"(["vertical_and_slash",1000,6096,0.99])");
  EXPECT_EQ(json[2]["longfill"]["exact"]["0"]["0"], "block-share:4,0.2");
  EXPECT_EQ(json[2]["longfill"]["exact"]["1"]["1"], "block-share:4,0.01,8,fp8");
}

// Readers of the published form take layer i of the list, int() of every key, and four values of each.
TEST(OwnPatternForm, IsThePublishedFormToItsReaders) {
  LF_ASSERT_OK_AND_ASSIGN(const std::string text, FormatPatterns(OwnSet()));
  const nlohmann::json json = nlohmann::json::parse(text);
  ASSERT_EQ(json.size(), 3u);
  const auto head = [&](int layer, const char* key) { return json[layer][key].dump(); };
  EXPECT_EQ(head(0, "0"), R"(["vertical_and_slash",700,1200,null])");
  EXPECT_EQ(head(0, "1"), R"(["vertical_and_slash",1000,6096,1.0])");
  EXPECT_EQ(head(1, "0"), R"(["block_sparse",100,1,0.875])");
  EXPECT_EQ(head(1, "1"), R"(["stream_llm",64,512,0.25])");
  EXPECT_EQ(json[2]["longfill"]["exact"].dump(), R"({"0":{"1":"dense"},"1":{"0":"block-sparse:50"}})");
  nlohmann::json published = json;
  published.erase(2);
  LF_ASSERT_OK_AND_ASSIGN(const PatternSet set, ParsePatterns(published.dump(), "published", 2, 2));
  EXPECT_EQ(set.at(0, 1), HeadPattern(kUnlistedHeadPattern));
  EXPECT_EQ(set.at(1, 0), HeadPattern(BlockSparse{100}));
  EXPECT_EQ(set.provenance(), std::nullopt);
}

TEST(OwnPatternForm, NamesWhatIsWrong) {
  LF_ASSERT_OK_AND_ASSIGN(const std::string text, FormatPatterns(OwnSet()));
  const nlohmann::json valid = nlohmann::json::parse(text);
  struct Case {
    const char* pointer;
    nlohmann::json value;  // null: the key is taken away
    const char* message;
    absl::StatusCode code = absl::StatusCode::kInvalidArgument;
  };
  const Case cases[] = {
      {"/2/longfill/version", 3, "p.json: longfill: has version 3, this program reads 1 and 2",
       absl::StatusCode::kUnimplemented},
      {"/2/longfill/version", 2, "longfill has no shorter"},
      {"/2/longfill/shorter", {1}, "longfill has an unknown key 'shorter'"},
      {"/2/longfill/version", "1", "has no whole number version"},
      {"/2/longfill/version", nullptr, "has no whole number version"},
      {"/2/other", 1, "expected an object with the one key longfill"},
      {"/2/longfill", 1, "expected an object with the one key longfill"},
      {"/2/longfill/note", "x", "longfill has an unknown key 'note'"},
      {"/2/longfill/model", nullptr, "longfill has no model"},
      {"/2/longfill/model/fingerprint", "12", "fingerprint is '12', expected 64 lower-case hex digits"},
      {"/2/longfill/model/name", 7, "name is 7, expected a string"},
      {"/2/longfill/model/date", "x", "model has an unknown key 'date'"},
      {"/2/longfill/calibration/sha256", std::string(64, 'F'), "sha256 is 'FFFF"},
      {"/2/longfill/search", {1}, "search is an array of 1, expected an object"},
      {"/2/longfill/score", "count", "score is 'count', expected 'recall'"},
      {"/0/0/3", 1.5, "layer 0: head 0: score 1.5 is no recall in [0, 1]"},
      {"/0/0/3", -0.1, "score -0.1 is no recall"},
      {"/2/longfill/exact/2", {{"0", "dense"}}, "layer 2 is not in [0, 2)"},
      {"/2/longfill/exact/0/2", "dense", "exact: layer 0: head 2 is not in [0, 2)"},
      {"/2/longfill/exact/0/1", "flash", "exact: layer 0: head 1: attention pattern 'flash'"},
      {"/2/longfill/exact/0/1", 5, "exact: layer 0: head 1 is 5, expected a string"},
      {"/2/longfill/exact/0", 5, "exact: layer 0 is 5, expected an object"},
      // a stand-in that was edited, an exact pattern that the list can say
      {"/0/1/1", 999, "head 1 is dense, for which the list cannot say vertical-slash:999,6096"},
      {"/2/longfill/exact/0/0", "vertical-slash:1,1",
       "head 0 is vertical-slash:1,1, for which the list cannot say vertical-slash:700,1200"},
  };
  for (const Case& c : cases) {
    nlohmann::json changed = valid;
    const nlohmann::json::json_pointer pointer(c.pointer);
    if (c.value.is_null()) {
      changed[pointer.parent_pointer()].erase(pointer.back());
    } else {
      changed[pointer] = c.value;
    }
    EXPECT_THAT(ParsePatterns(changed.dump(), "p.json", 2, 2), StatusIs(c.code, HasSubstr(c.message)))
        << c.pointer << " " << c.value.dump();
  }
}

// For prompts of up to 100 and of up to 5,000 tokens.
PatternSet SetOfThreeLengths() {
  PatternSet set = OwnSet();
  PatternSet shortest = PatternSet::Uniform(Dense(), 2, 2);
  shortest.set_provenance(set.provenance());
  PatternSet middle = PatternSet::Uniform(VerticalSlash{30, 800}, 2, 2);
  middle.Set(1, 1, BlockShare{4, 0.1}, 0.5);
  middle.set_provenance(set.provenance());
  set.AddShorter(100, std::move(shortest));
  set.AddShorter(5000, std::move(middle));
  return set;
}

TEST(OwnPatternForm, HasSetsForShorterPrompts) {
  const PatternSet set = SetOfThreeLengths();
  LF_ASSERT_OK_AND_ASSIGN(const std::string text, FormatPatterns(set));
  LF_ASSERT_OK_AND_ASSIGN(const PatternSet again, ParsePatterns(text, "own", 2, 2));
  EXPECT_EQ(again, set);
  EXPECT_NE(again, OwnSet());
  EXPECT_EQ(again.For(1).at(0, 0), HeadPattern(Dense()));
  EXPECT_EQ(again.For(100).at(0, 0), HeadPattern(Dense()));
  EXPECT_EQ(again.For(101).at(1, 1), HeadPattern(BlockShare{4, 0.1}));
  EXPECT_EQ(again.For(5000).at(0, 0), HeadPattern(VerticalSlash{30, 800}));
  EXPECT_EQ(again.For(5001).at(0, 0), HeadPattern(VerticalSlash{700, 1200}));
  EXPECT_EQ(again.For(100).provenance(), set.provenance());
  EXPECT_EQ(OwnSet().For(1), OwnSet());
  // The list itself is what readers of the published form see.
  const nlohmann::json json = nlohmann::json::parse(text);
  ASSERT_EQ(json.size(), 3u);
  EXPECT_EQ(json[2]["longfill"]["version"], 2);
  EXPECT_EQ(json[0]["0"].dump(), R"(["vertical_and_slash",700,1200,null])");
}

TEST(OwnPatternForm, NamesWhatIsWrongWithSetsForShorterPrompts) {
  LF_ASSERT_OK_AND_ASSIGN(const std::string text, FormatPatterns(SetOfThreeLengths()));
  const nlohmann::json valid = nlohmann::json::parse(text);
  const auto expect = [&valid](const char* pointer, const nlohmann::json& value, const char* message) {
    nlohmann::json changed = valid;
    changed[nlohmann::json::json_pointer(pointer)] = value;
    EXPECT_THAT(ParsePatterns(changed.dump(), "p.json", 2, 2),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)))
        << pointer;
  };
  expect("/2/longfill/version", 1, "longfill has an unknown key 'shorter'");
  expect("/2/longfill/shorter", nlohmann::json::array(), "shorter is an array of 0, expected a list");
  expect("/2/longfill/shorter/1", 7, "shorter: set 1: it is 7, expected an object");
  expect("/2/longfill/shorter/0/max_tokens", 0, "set 0: max_tokens 0 is not above 0");
  expect("/2/longfill/shorter/1/max_tokens", 100, "set 1: max_tokens 100 is not above 100");
  expect("/2/longfill/shorter/0/max_tokens", "7", "max_tokens '7' is not an integer");
  expect("/2/longfill/shorter/0/note", 1, "set 0: it has an unknown key 'note'");
  expect("/2/longfill/shorter/0/layers/2", nlohmann::json::object(),
         "layers is an array of 3, expected a list of 2");
  expect("/2/longfill/shorter/1/layers/0/0/0", "flash", "set 1: layer 0: head 0: type 'flash' is unknown");
  expect("/2/longfill/shorter/1/layers/0/0/3", 2, "set 1: layer 0: head 0: score 2 is no recall");
  expect("/2/longfill/shorter/1/exact/0", {{"0", "dense"}},
         "set 1: exact: layer 0: head 0 is dense, for which the list");
}

TEST(OwnPatternForm, RefusesToWriteWhatItWouldNotRead) {
  PatternSet set = OwnSet();
  set.Set(0, 0, AShape{1, 1}, 12345);
  EXPECT_THAT(FormatPatterns(set),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("score 12345 is no recall")));
  for (const auto& [bad, message] :
       {std::pair(PatternProvenance{"m", "1", kHash, "{}"}, "hash '1'"),
        std::pair(PatternProvenance{"m", kHash, "", "{}"}, "hash ''"),
        std::pair(PatternProvenance{"m", kHash, kHash, "{"}, "search settings"),
        std::pair(PatternProvenance{"m", kHash, kHash, "[]"}, "not a JSON object")}) {
    set = OwnSet();
    set.set_provenance(bad);
    EXPECT_THAT(FormatPatterns(set), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  }
}

TEST(PatternDirectory, NamesOfAModelComeFromItsFolderAndItsConfig) {
  using Names = std::vector<std::string>;
  EXPECT_EQ(ModelNames("/data/Yi-9B-200K", ""), Names{"Yi-9B-200K"});
  EXPECT_EQ(ModelNames("/data/Yi-9B-200K/", "01-ai/Yi-9B-200K"), Names{"Yi-9B-200K"});
  EXPECT_EQ(ModelNames("/data/copy", "01-ai/Yi-9B-200K"), (Names{"copy", "Yi-9B-200K"}));
  EXPECT_EQ(ModelNames("/hub/models--01-ai--Yi-9B-200K/snapshots/0a1b", "x/.."), Names{"Yi-9B-200K"});
  EXPECT_EQ(ModelNames("/hub/models--gpt2/snapshots/0a1b/", ""), Names{"gpt2"});
  EXPECT_EQ(ModelNames("/", ""), Names{});
}

TEST(PatternDirectory, TheModelsOwnFileComesFirstThenThePublishedOneThenAnyModels) {
  const TemporaryDirectory directory;
  const std::vector<std::string> names = {"copy", "Qwen2.5-7B-Instruct-1M"};
  const std::string folder = directory.File("");
  EXPECT_THAT(FindPatternFile(folder, names),
              StatusIs(absl::StatusCode::kNotFound, AllOf(HasSubstr(folder), HasSubstr("copy or Qwen2.5-7B"),
                                                          HasSubstr("patterns.json"))));
  EXPECT_THAT(FindPatternFile(folder, {}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("without a name (give the file itself)")));
  for (const char* name : {"patterns.json", "Qwen2.5_7B_Instruct_1M.json", "Qwen2.5-7B-Instruct-1M.json",
                           "copy.json"}) {  // each goes before the last
    std::ofstream(directory.File(name)) << "[]";
    LF_ASSERT_OK_AND_ASSIGN(const std::string found, FindPatternFile(folder, names));
    EXPECT_EQ(std::filesystem::path(found).filename(), name);
  }
  LF_ASSERT_OK_AND_ASSIGN(const std::string found,
                          FindPatternFile(folder, std::vector<std::string>{"other"}));
  EXPECT_EQ(std::filesystem::path(found).filename(), "patterns.json");
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
