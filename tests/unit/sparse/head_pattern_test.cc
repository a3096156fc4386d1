#include "kernels/sparse/head_pattern.h"

#include <random>
#include <string>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

TEST(ParseHeadPattern, ReadsEveryFormAndWritesItBack) {
  const std::pair<const char*, HeadPattern> cases[] = {
      {"dense", Dense()},
      {"a-shape:0,1", AShape{0, 1}},
      {"a-shape:1024,4096", AShape{1024, 4096}},
      {"vertical-slash:1000,6096", VerticalSlash{1000, 6096}},
      {"vertical-slash:0,1", VerticalSlash{0, 1}},
      {"block-sparse:100", BlockSparse{100}},
      {"block-sparse:2147483647", BlockSparse{2147483647}},
      {"block-share:4,0.2", BlockShare{4, 0.2}},
      {"block-share:0,1", BlockShare{0, 1}},
      {"block-share:16,1e-05", BlockShare{16, 1e-5}},
      {"block-share:4,0.01,8", BlockShare{4, 0.01, 8}},
      {"block-share:0,0.5,16", BlockShare{0, 0.5, 16}},
      {"block-share:15,0.5,1", BlockShare{15, 0.5, 1}},
      {"block-share:4,0.1,0,8", BlockShare{4, 0.1, 0, 8}},
      {"block-share:8,0.01,8,4", BlockShare{8, 0.01, 8, 4}},
      {"block-share:0,0.5,0,16", BlockShare{0, 0.5, 0, 16}},
      {"block-share:4,0.1,fp8", BlockShare{.outliers = 4, .min_share = 0.1, .fp8 = true}},
      {"block-share:4,0.01,8,fp8", BlockShare{4, 0.01, 8, 0, true}},
      {"block-share:4,0.1,0,8,fp8", BlockShare{4, 0.1, 0, 8, true}},
      {"block-share:8,0.01,8,8,fp8", BlockShare{8, 0.01, 8, 8, true}},
  };
  for (const auto& [text, pattern] : cases) {
    LF_ASSERT_OK_AND_ASSIGN(const HeadPattern parsed, ParseHeadPattern(text));
    EXPECT_EQ(parsed, pattern) << text;
    EXPECT_EQ(ToString(pattern), text);
  }
}

TEST(ParseHeadPattern, RefusesWhatIsNotExactlyAForm) {
  for (const char* text : {"",
                           "Dense",
                           "dense ",
                           " dense",
                           "dense:",
                           "dense:1",
                           "a-shape",
                           "a-shape:",
                           "a-shape:1",
                           "a-shape:1,",
                           "a-shape:1,2,3",
                           "a-shape: 1,2",
                           "a-shape:1, 2",
                           "a-shape:+1,2",
                           "a-shape:1.5,2",
                           "vertical-slash:1;2",
                           "vertical-slash:99999999999999999999,1",
                           "block-sparse:1,2",
                           "block-sparse:x",
                           "block-sparse:1e3",
                           "block-share:4",
                           "block-share:4,",
                           "block-share:,0.2",
                           "block-share:4.0,0.2",
                           "block-share:4,0.2,",
                           "block-share:4,0.2,0",
                           "block-share:fp8",
                           "block-share:4,fp8",
                           "block-share:,fp8",
                           "block-share:4,0.1,fp8,8",
                           "block-share:4,0.1,8,fp16",
                           "block-share:4,0.1,8,FP8",
                           "block-share:4,0.1,8, fp8",
                           "block-share:4,0.1,8,,fp8",
                           "block-share:4,0.1,8,fp8,",
                           "block-share:4,0.1,fp8,fp8",
                           "block-share:4,0.1,0,fp8",
                           "block-share:4,0.1,8,0,fp8",
                           "block-sparse:4,fp8",
                           "dense,fp8",
                           "block-share:4,0.2,1.5",
                           "block-share:4,0.1,0,0",
                           "block-share:4,0.1,8,0",
                           "block-share:4,0.1,0,",
                           "block-share:4,0.1,,8",
                           "block-share:4,0.1,0,8,1",
                           "block-share:4,8,0.2",
                           "block-share:4, 0.2",
                           "block-share:4,0.2x",
                           "block-share:4,1e-999",
                           "auto"}) {
    EXPECT_THAT(ParseHeadPattern(text),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("expected dense, a-shape")))
        << text;
  }
}

TEST(ParseHeadPattern, NamesFieldAndValueOfABadBudget) {
  const std::pair<const char*, const char*> cases[] = {
      {"a-shape:-1,4", "n_init -1"},
      {"a-shape:4,0", "n_local 0"},
      {"vertical-slash:-5,6", "vertical -5"},
      {"vertical-slash:5,-6", "slash -6"},
      {"vertical-slash:0,0", "vertical 0 and slash 0"},
      {"vertical-slash:2147483648,1", "vertical 2147483648"},
      {"block-sparse:0", "num_blocks 0"},
      {"block-sparse:-9223372036854775808", "num_blocks -9223372036854775808"},
      {"block-share:-1,0.2", "outliers -1 is not in [0, 16]"},
      {"block-share:17,0.2", "outliers 17"},
      {"block-share:4,0.2,16", "samples 16 is not in [0, 12]"},
      {"block-share:4,0.2,-8", "samples -8"},
      {"block-share:4,0.2,6", "samples 6 is not a power of two"},
      {"block-share:4,0.1,0,17", "coarse 17 is not in [0, 16]"},
      {"block-share:4,0.1,0,-1", "coarse -1"},
      {"block-share:4,0.1,8,9", "coarse 9 is not in [0, 8]"},
      {"block-share:4,0.1,8,9,fp8", "coarse 9 is not in [0, 8]"},
      {"block-share:4,0", "min_share 0 is not in [1e-30, 1]"},
      {"block-share:4,1e-50", "min_share 1e-50"},
      {"block-share:4,-0.2", "min_share -0.2"},
      {"block-share:4,1.5", "min_share 1.5"},
      {"block-share:4,nan", "min_share nan"},
      {"block-share:4,inf", "min_share inf"},
  };
  for (const auto& [text, message] : cases) {
    EXPECT_THAT(ParseHeadPattern(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)))
        << text;
  }
}

TEST(ParseHeadPattern, SurvivesMutatedText) {
  std::mt19937 random(3);
  const std::string seeds[] = {"dense",
                               "a-shape:1024,4096",
                               "vertical-slash:1000,6096",
                               "block-sparse:100",
                               "block-share:4,0.2",
                               "block-share:4,0.01,8",
                               "block-share:4,0.1,0,8",
                               "block-share:8,0.01,8,4",
                               "block-share:8,0.01,8,4,fp8"};
  for (int i = 0; i < 50000; ++i) {
    std::string text = seeds[random() % std::size(seeds)];
    for (uint32_t edits = random() % 4; edits > 0 && !text.empty(); --edits) {
      const size_t at = random() % text.size();
      switch (random() % 3) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text.erase(at, 1);
          break;
        default:
          text.insert(at, 1, "0123456789-,:.e"[random() % 15]);
      }
    }
    const absl::StatusOr<HeadPattern> parsed = ParseHeadPattern(text);
    if (parsed.ok()) {
      LF_EXPECT_OK(Validate(*parsed));
      EXPECT_EQ(*ParseHeadPattern(ToString(*parsed)), *parsed) << text;
    } else {
      EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
    }
  }
  EXPECT_LT(ParseHeadPattern(std::string(1 << 20, '\0')).status().message().size(), 1000u);
}

TEST(BoundByWindow, AWindowAsLongAsThePromptIsNothing) {
  for (const HeadPattern& pattern : {HeadPattern(Dense{}), HeadPattern(AShape{4, 8}),
                                     HeadPattern(VerticalSlash{30, 50}), HeadPattern(BlockSparse{2})}) {
    EXPECT_EQ(BoundByWindow(pattern, 0, 1 << 20), pattern);
    EXPECT_EQ(BoundByWindow(pattern, 100, 100), pattern);
    EXPECT_EQ(BoundByWindow(pattern, 100, 99), pattern);
    EXPECT_EQ(BoundByWindow(pattern, 100, 101), HeadPattern(AShape{0, 100})) << ToString(pattern);
    EXPECT_EQ(BoundByWindow(AShape{0, 100}, 100, 101), HeadPattern(AShape{0, 100}));
  }
}

TEST(BoundByWindow, KeepsAShorterAShapeWithoutSink) {
  EXPECT_EQ(BoundByWindow(AShape{0, 64}, 100, 1000), HeadPattern(AShape{0, 64}));
  EXPECT_EQ(BoundByWindow(AShape{0, 101}, 100, 1000), HeadPattern(AShape{0, 100}));
}

TEST(ParseCoverage, ReadsBothNamesAndNothingElse) {
  for (const Coverage coverage : {Coverage::kTiles, Coverage::kParity}) {
    LF_ASSERT_OK_AND_ASSIGN(const Coverage parsed, ParseCoverage(CoverageName(coverage)));
    EXPECT_EQ(parsed, coverage);
  }
  EXPECT_THAT(ParseCoverage("Tiles"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'Tiles'")));
}

}  // namespace
}  // namespace longfill
