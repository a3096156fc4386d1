// Attention specs: what they mean and what "auto" becomes.

#include "absl/strings/str_cat.h"
#include "runtime/engine/attention_spec.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

constexpr char kTwoLayers[] =
    R"([{"0": ["vertical_and_slash", 500, 700, 0.9]}, {"1": ["stream_llm", 128, 1024, 0.9]}])";

ModelConfig Shape(int64_t num_layers, int64_t num_q_heads) {
  ModelConfig config;
  config.num_layers = num_layers;
  config.num_q_heads = num_q_heads;
  return config;
}

AttentionDefaults AllDefaults() {
  AttentionDefaults defaults;
  defaults.dense_below = 1000;
  defaults.patterns = AttentionSpec{"a-shape:1,2", ""};
  defaults.model_patterns = AttentionSpec{"patterns.json", kTwoLayers};
  return defaults;
}

ResolvedAttention Auto(const AttentionDefaults& defaults, int64_t num_tokens) {
  auto resolved = ResolveAttention({}, defaults, num_tokens, Shape(2, 2));
  EXPECT_THAT(resolved, IsOk());
  return resolved.value_or(ResolvedAttention{});
}

TEST(AttentionSpec, AutoIsDenseBelowTheLimitWhateverElseIsGiven) {
  for (const int64_t num_tokens : {1, 999}) {
    const ResolvedAttention resolved = Auto(AllDefaults(), num_tokens);
    EXPECT_EQ(resolved.spec.text, "dense");
    EXPECT_EQ(resolved.resolved, absl::StrCat("dense (auto: ", num_tokens, " tokens < 1000)"));
    EXPECT_EQ(resolved.patterns, PatternSet::Uniform(Dense{}, 2, 2));
  }
  EXPECT_EQ(Auto({}, 32767).spec.text, "dense");  // the default limit
  EXPECT_NE(Auto({}, 32768).spec.text, "dense");
}

TEST(AttentionSpec, DualChunksAreNamedAndRefuseWhatTheyDoNotHave) {
  ModelConfig config = Shape(2, 2);
  config.rope.dual_chunk = {160, 32};
  const auto resolve = [&](const char* text, int64_t num_tokens) {
    return ResolveAttention({.text = text}, {}, num_tokens, config);
  };
  for (const char* text :
       {"dense", "a-shape:3,40", "vertical-slash:30,50", "block-sparse:2", "block-share:3,0.1"}) {
    LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention first_chunk, resolve(text, 128));
    EXPECT_EQ(first_chunk.resolved, text);
  }
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention resolved, resolve("vertical-slash:30,50", 129));
  EXPECT_EQ(resolved.resolved, "vertical-slash:30,50, in dual chunks of 128");
  for (const char* text : {"block-sparse:2", "block-share:3,0.1"}) {
    EXPECT_THAT(resolve(text, 129),
                StatusIs(absl::StatusCode::kUnimplemented,
                         HasSubstr(absl::StrCat(text, " is not supported with dual chunk attention"))));
  }
}

TEST(AttentionSpec, AutoTakesGivenPatternsThenTheModelsThenBlockShare) {
  AttentionDefaults defaults = AllDefaults();
  ResolvedAttention resolved = Auto(defaults, 1000);
  EXPECT_EQ(resolved.resolved, "a-shape:1,2 (auto)");
  EXPECT_EQ(resolved.patterns, PatternSet::Uniform(AShape{1, 2}, 2, 2));

  defaults.patterns.reset();
  resolved = Auto(defaults, 1000);
  EXPECT_EQ(resolved.resolved, "patterns.json (auto)");
  EXPECT_EQ(resolved.spec.pattern_json, kTwoLayers);
  EXPECT_EQ(resolved.patterns.at(0, 0), HeadPattern(VerticalSlash{500, 700}));
  EXPECT_EQ(resolved.patterns.at(1, 1), HeadPattern(AShape{128, 1024}));

  defaults.model_patterns.reset();
  resolved = Auto(defaults, 1000);
  EXPECT_EQ(resolved.resolved, "block-share:8,0.01,8,fp8 (auto)");
  EXPECT_EQ(resolved.patterns, PatternSet::Uniform(kAutoPattern, 2, 2));
  EXPECT_TRUE(resolved.spec.dense_without_room);

  defaults.dense_below = 0;
  EXPECT_EQ(Auto(defaults, 1).spec.text, "block-share:8,0.01,8,fp8");

  ModelConfig dual_chunks = Shape(2, 2);
  dual_chunks.rope.dual_chunk = {.chunk_size = 192, .local_size = 64};
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention without_shares,
                          ResolveAttention({}, defaults, 129, dual_chunks));
  EXPECT_EQ(without_shares.resolved, "vertical-slash:1000,6096 (auto), in dual chunks of 128");
  EXPECT_FALSE(without_shares.spec.dense_without_room);
}

TEST(AttentionSpec, AutoIsDescribedByWhatLongPromptsGet) {
  AttentionDefaults defaults = AllDefaults();
  EXPECT_EQ(DescribeAuto(defaults, Shape(2, 2)), "dense below 1000 tokens, else a-shape:1,2");
  defaults.patterns.reset();
  EXPECT_EQ(DescribeAuto(defaults, Shape(2, 2)), "dense below 1000 tokens, else patterns.json");
  EXPECT_EQ(DescribeAuto({}, Shape(2, 2)), "dense below 32768 tokens, else block-share:8,0.01,8,fp8");
  ModelConfig dual_chunks = Shape(2, 2);
  dual_chunks.rope.dual_chunk = {.chunk_size = 192, .local_size = 64};
  EXPECT_EQ(DescribeAuto({}, dual_chunks), "dense below 32768 tokens, else vertical-slash:1000,6096");
}

TEST(AttentionSpec, WhatIsAskedComesBeforeEveryDefault) {
  LF_ASSERT_OK_AND_ASSIGN(const AttentionSpec spec, ReadAttentionSpec("block-sparse:7"));
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention resolved,
                          ResolveAttention(spec, AllDefaults(), 10, Shape(3, 5)));
  EXPECT_EQ(resolved.resolved, "block-sparse:7");
  EXPECT_EQ(resolved.patterns, PatternSet::Uniform(BlockSparse{7}, 3, 5));
  // Resolving what was resolved changes nothing: the other ranks do so.
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention again,
                          ResolveAttention(resolved.spec, {}, 10, Shape(3, 5)));
  EXPECT_EQ(again.patterns, resolved.patterns);
  EXPECT_EQ(again.resolved, resolved.resolved);
}

TEST(AttentionSpec, PatternFileTravelsAsItsText) {
  const TempDir directory;
  const std::string path = directory.File("heads.json");
  WriteText(path, kTwoLayers);
  LF_ASSERT_OK_AND_ASSIGN(const AttentionSpec spec, ReadAttentionSpec(path));
  std::filesystem::remove(path);
  EXPECT_EQ(spec.text, path);
  EXPECT_EQ(spec.pattern_json, kTwoLayers);
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention resolved, ResolveAttention(spec, {}, 10, Shape(2, 2)));
  EXPECT_EQ(resolved.resolved, path);
  EXPECT_EQ(resolved.patterns.at(0, 1), HeadPattern(kUnlistedHeadPattern));
}

TEST(AttentionSpec, PatternsOfAnotherShapeAreRefusedByName) {
  const AttentionSpec spec{"heads.json", kTwoLayers};
  EXPECT_THAT(ResolveAttention(spec, {}, 10, Shape(3, 2)),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("heads.json"), HasSubstr("2"), HasSubstr("3"))));
  EXPECT_THAT(ResolveAttention(spec, {}, 10, Shape(2, 1)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("heads.json")));
  AttentionDefaults defaults;
  defaults.model_patterns = spec;
  EXPECT_THAT(ResolveAttention({}, defaults, 40000, Shape(3, 2)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("heads.json")));
  LF_EXPECT_OK(ResolveAttention({}, defaults, 100, Shape(3, 2)).status());  // dense: not needed
}

// Layer 0 sees all keys, layer 1 the last 256.
TEST(AttentionSpec, WindowsBoundEveryPatternOfTheirLayers) {
  ModelConfig config = Shape(2, 2);
  config.layer_windows = {0, 256};
  const AttentionSpec spec{"heads.json", R"([{}, {"0": ["stream_llm", 0, 100, 0.9]}])"};
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention cut, ResolveAttention(spec, {}, 257, config));
  EXPECT_EQ(cut.resolved, "heads.json, windows of 256 in 1 layers");
  EXPECT_EQ(cut.patterns.at(0, 0), HeadPattern(kUnlistedHeadPattern));
  EXPECT_EQ(cut.patterns.at(1, 0), HeadPattern(AShape{0, 100}));
  EXPECT_EQ(cut.patterns.at(1, 1), HeadPattern(AShape{0, 256}));
  EXPECT_EQ(cut.patterns.score(1, 0), 0.9);
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention whole, ResolveAttention(spec, {}, 256, config));
  EXPECT_EQ(whole.resolved, "heads.json");
  EXPECT_EQ(whole.patterns.at(1, 1), HeadPattern(kUnlistedHeadPattern));
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention dense, ResolveAttention({}, {}, 1000, config));
  EXPECT_EQ(dense.resolved, "dense (auto: 1000 tokens < 32768), windows of 256 in 1 layers");
  EXPECT_EQ(dense.patterns.at(0, 1), HeadPattern(Dense{}));
  EXPECT_EQ(dense.patterns.at(1, 1), HeadPattern(AShape{0, 256}));
}

TEST(AttentionSpec, TextThatIsNeitherPatternNorFileIsNamed) {
  for (const std::string text : {"sparse", "/not/there.json", ""}) {
    EXPECT_THAT(ReadAttentionSpec(text),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("\"" + text + "\""), HasSubstr("neither"))));
  }
  for (const std::string text : {"vertical-slash:1", "vertical-slash:-1,4", "a-shape:1,0", "block-sparse:0",
                                 "block-share:4", "dense:1"}) {
    EXPECT_THAT(ReadAttentionSpec(text), StatusIs(absl::StatusCode::kInvalidArgument,
                                                  AllOf(HasSubstr(text), Not(HasSubstr("neither")))));
  }
  const TempDir directory;
  const std::string empty = directory.File("empty.json");
  WriteText(empty, "");
  EXPECT_THAT(ReadAttentionSpec(empty), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(empty)));
  EXPECT_FALSE(ReadAttentionSpec(directory.path()).ok());
}

}  // namespace
}  // namespace longfill
