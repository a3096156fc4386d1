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

AttentionDefaults AllDefaults() {
  AttentionDefaults defaults;
  defaults.dense_below = 1000;
  defaults.patterns = AttentionSpec{"a-shape:1,2", ""};
  defaults.model_patterns = AttentionSpec{"patterns.json", kTwoLayers};
  return defaults;
}

ResolvedAttention Auto(const AttentionDefaults& defaults, int64_t num_tokens) {
  auto resolved = ResolveAttention({}, defaults, num_tokens, 2, 2);
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

TEST(AttentionSpec, AutoTakesGivenPatternsThenTheModelsThenThePublishedBudget) {
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
  EXPECT_EQ(resolved.resolved, "vertical-slash:1000,6096 (auto)");
  EXPECT_EQ(resolved.patterns, PatternSet::Uniform(VerticalSlash{1000, 6096}, 2, 2));

  defaults.dense_below = 0;
  EXPECT_EQ(Auto(defaults, 1).spec.text, "vertical-slash:1000,6096");
}

TEST(AttentionSpec, AutoIsDescribedByWhatLongPromptsGet) {
  AttentionDefaults defaults = AllDefaults();
  EXPECT_EQ(DescribeAuto(defaults), "dense below 1000 tokens, else a-shape:1,2");
  defaults.patterns.reset();
  EXPECT_EQ(DescribeAuto(defaults), "dense below 1000 tokens, else patterns.json");
  EXPECT_EQ(DescribeAuto({}), "dense below 32768 tokens, else vertical-slash:1000,6096");
}

TEST(AttentionSpec, WhatIsAskedComesBeforeEveryDefault) {
  LF_ASSERT_OK_AND_ASSIGN(const AttentionSpec spec, ReadAttentionSpec("block-sparse:7"));
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention resolved, ResolveAttention(spec, AllDefaults(), 10, 3, 5));
  EXPECT_EQ(resolved.resolved, "block-sparse:7");
  EXPECT_EQ(resolved.patterns, PatternSet::Uniform(BlockSparse{7}, 3, 5));
  // Resolving what was resolved changes nothing: the other ranks do so.
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention again, ResolveAttention(resolved.spec, {}, 10, 3, 5));
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
  LF_ASSERT_OK_AND_ASSIGN(const ResolvedAttention resolved, ResolveAttention(spec, {}, 10, 2, 2));
  EXPECT_EQ(resolved.resolved, path);
  EXPECT_EQ(resolved.patterns.at(0, 1), HeadPattern(kUnlistedHeadPattern));
}

TEST(AttentionSpec, PatternsOfAnotherShapeAreRefusedByName) {
  const AttentionSpec spec{"heads.json", kTwoLayers};
  EXPECT_THAT(ResolveAttention(spec, {}, 10, 3, 2),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("heads.json"), HasSubstr("2"), HasSubstr("3"))));
  EXPECT_THAT(ResolveAttention(spec, {}, 10, 2, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("heads.json")));
  AttentionDefaults defaults;
  defaults.model_patterns = spec;
  EXPECT_THAT(ResolveAttention({}, defaults, 40000, 3, 2),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("heads.json")));
  LF_EXPECT_OK(ResolveAttention({}, defaults, 100, 3, 2).status());  // dense: not needed
}

TEST(AttentionSpec, TextThatIsNeitherPatternNorFileIsNamed) {
  for (const std::string text : {"sparse", "/not/there.json", ""}) {
    EXPECT_THAT(ReadAttentionSpec(text),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("\"" + text + "\""), HasSubstr("neither"))));
  }
  for (const std::string text :
       {"vertical-slash:1", "vertical-slash:-1,4", "a-shape:1,0", "block-sparse:0", "dense:1"}) {
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
