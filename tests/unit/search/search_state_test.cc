#include "models/search/search_state.h"

#include <gtest/gtest.h>

#include <fstream>

#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

const ScoreUnit kUnit = {"score", 3, 17};
const UnitScores kScores = {{{0.1, 1.0 / 3, 2e-17, int64_t{1} << 40}, {1, 1, 0, 7}},
                            {{0, 0, 1, 0}, {0.5, 0.25, 0.125, 1}}};

TEST(SearchState, GoesOnWithWhatWasSaved) {
  const TempDir dir;
  {
    LF_ASSERT_OK_AND_ASSIGN(const SearchState state,
                            SearchState::Open(dir.File("out.state"), R"({"rows": 128})"));
    LF_ASSERT_OK_AND_ASSIGN(const auto nothing, state.Load(kUnit, 2, 2));
    EXPECT_FALSE(nothing.has_value());
    LF_ASSERT_OK(state.Save(kUnit, kScores));
    LF_ASSERT_OK(state.SaveCostTable("costs"));
  }
  LF_ASSERT_OK_AND_ASSIGN(const SearchState state,
                          SearchState::Open(dir.File("out.state"), R"({"rows":128})"));
  LF_ASSERT_OK_AND_ASSIGN(const auto scores, state.Load(kUnit, 2, 2));
  ASSERT_TRUE(scores.has_value());
  EXPECT_EQ(*scores, kScores);  // to the bit
  LF_ASSERT_OK_AND_ASSIGN(const std::string costs, state.LoadCostTable());
  EXPECT_EQ(costs, "costs");
  state.Remove();
  EXPECT_TRUE(dir.List().empty());
}

TEST(SearchState, KeepsInfluenceToTheBit) {
  const TempDir dir;
  const ScoreUnit unit = {"influence", 0, 2};
  const std::vector<double> influence = {1.0 / 3, 2e-17, 0};
  LF_ASSERT_OK_AND_ASSIGN(const SearchState state, SearchState::Open(dir.File("s"), "{}"));
  LF_ASSERT_OK_AND_ASSIGN(const auto nothing, state.LoadInfluence(unit, 3));
  EXPECT_FALSE(nothing.has_value());
  LF_ASSERT_OK(state.SaveInfluence(unit, influence));
  LF_ASSERT_OK_AND_ASSIGN(const auto loaded, state.LoadInfluence(unit, 3));
  EXPECT_EQ(loaded, influence);
  EXPECT_THAT(state.LoadInfluence(unit, 4).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no list of 4 numbers")));
  LF_ASSERT_OK(state.Save(unit, kScores));
  EXPECT_THAT(state.LoadInfluence(unit, 2).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no list of 2 numbers")));
  state.Remove();
  EXPECT_TRUE(dir.List().empty());
}

TEST(SearchState, OtherSettingsAreRefusedByName) {
  const TempDir dir;
  LF_ASSERT_OK(SearchState::Open(dir.File("s"), R"({"rows": 128, "time": 0.5})").status());
  EXPECT_THAT(SearchState::Open(dir.File("s"), R"({"rows": 128, "time": 0.25})").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("another time (0.5 there, 0.25 now)")));
  EXPECT_THAT(SearchState::Open(dir.File("s"), R"({"rows": 128, "time": 0.5, "value": "error"})").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("value (none there")));
  EXPECT_THAT(SearchState::Open(dir.File("s"), R"({"rows": 128})").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("other settings")));
}

TEST(SearchState, TouchesNoFilesOfOthers) {
  const TempDir dir;
  std::filesystem::create_directory(dir.File("theirs"));
  EXPECT_THAT(SearchState::Open(dir.File("theirs"), "{}").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not of a search")));
  LF_ASSERT_OK_AND_ASSIGN(const SearchState state, SearchState::Open(dir.File("s"), "{}"));
  LF_ASSERT_OK(state.Save(kUnit, kScores));
  std::ofstream(dir.File("s/notes.txt")) << "mine";
  state.Remove();
  EXPECT_TRUE(std::filesystem::exists(dir.File("s/notes.txt")));
  EXPECT_FALSE(std::filesystem::exists(dir.File("s/settings.json")));
}

TEST(SearchState, BrokenUnitsAreNamed) {
  const TempDir dir;
  LF_ASSERT_OK_AND_ASSIGN(const SearchState state, SearchState::Open(dir.File("s"), "{}"));
  LF_ASSERT_OK(state.Save(kUnit, kScores));
  EXPECT_THAT(state.Load(kUnit, 3, 2).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("3 candidates")));
  EXPECT_THAT(state.Load(kUnit, 2, 1).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1 heads")));
  const std::string file = dir.File("s/score-sample-003-layer-017.scores.json");
  for (const char* text : {"", "[[[1,1,1,1],[1,1,1,1]],[[1,1,1,1],[1,1,1]]]", "[[[1,1,1,1]", "{}"}) {
    std::ofstream(file) << text;
    EXPECT_THAT(state.Load(kUnit, 2, 2).status(),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("score-sample-003-layer-017")))
        << text;
  }
}

}  // namespace
}  // namespace longfill
