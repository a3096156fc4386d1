#include "models/search/pattern_family.h"

#include <gtest/gtest.h>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

TEST(PatternFamily, ScaleMultipliesBudgetsAndDividesTheShare) {
  EXPECT_EQ(ScalePattern(VerticalSlash{1000, 6096}, 0.5), HeadPattern(VerticalSlash{500, 3048}));
  EXPECT_EQ(ScalePattern(AShape{128, 1024}, 2), HeadPattern(AShape{256, 2048}));
  EXPECT_EQ(ScalePattern(BlockSparse{100}, 0.25), HeadPattern(BlockSparse{25}));
  EXPECT_EQ(ScalePattern(BlockShare{4, 0.1}, 2), HeadPattern(BlockShare{4, 0.05}));
  EXPECT_EQ(ScalePattern(BlockShare{4, 0.1, 8}, 2), HeadPattern(BlockShare{4, 0.05, 8}));
  EXPECT_EQ(ScalePattern(BlockShare{4, 0.1, 0, 8}, 2), HeadPattern(BlockShare{4, 0.05, 0, 8}));
  EXPECT_EQ(ScalePattern(BlockShare{4, 0.1, 8, 4, true}, 2), HeadPattern(BlockShare{4, 0.05, 8, 4, true}));
  EXPECT_EQ(ScalePattern(Dense(), 0.1), HeadPattern(Dense()));
}

TEST(PatternFamily, EveryMemberIsValidAndReadsBack) {
  std::vector<HeadPattern> families = DefaultFamilies();
  families.insert(families.end(), {VerticalSlash{1, 0}, AShape{0, 1}, BlockSparse{1}, BlockShare{0, 1}});
  for (const HeadPattern& family : families) {
    for (const double scale : {1e-9, 0.01, 0.3, 1.0, 3.0, 1e9}) {
      const HeadPattern member = ScalePattern(family, scale);
      LF_EXPECT_OK(Validate(member));
      LF_ASSERT_OK_AND_ASSIGN(const HeadPattern read, ParseHeadPattern(ToString(member)));
      EXPECT_EQ(read, member) << ToString(family) << " at " << scale;
    }
  }
}

TEST(PatternFamily, SpecsAreReadAndWrongOnesNamed) {
  LF_ASSERT_OK_AND_ASSIGN(const auto families, ParseFamilies({"a-shape:8,64", "block-sparse:3"}));
  EXPECT_EQ(families, (std::vector<HeadPattern>{AShape{8, 64}, BlockSparse{3}}));
  EXPECT_THAT(ParseFamilies({"vertical-slash:1"}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("vertical-slash:1")));
  EXPECT_THAT(ParseFamilies({"dense"}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("dense")));
  EXPECT_THAT(ParseFamilies({"block-sparse:3", "block-sparse:3"}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("twice")));
}

}  // namespace
}  // namespace longfill
