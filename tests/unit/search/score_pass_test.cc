#include "models/search/score_pass.h"

#include <gtest/gtest.h>

#include <atomic>
#include <optional>

#include "tests/unit/models/test_files.h"
#include "tests/unit/search/search_fixture.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

std::vector<std::vector<int32_t>> Samples() { return {PromptOf(300, 11), PromptOf(517, 5)}; }

std::vector<PatternSet> Sets(const SmallModel& model) {
  std::vector<PatternSet> sets;
  for (const HeadPattern& pattern : {HeadPattern(AShape{4, 60}), HeadPattern(VerticalSlash{30, 100})}) {
    sets.push_back(PatternSet::Uniform(pattern, model.config.num_layers, model.config.num_q_heads));
  }
  return sets;
}

std::vector<HeadScore> Flat(const ScoreCube& cube) {
  std::vector<HeadScore> scores;
  for (int64_t s = 0; s < cube.num_samples(); ++s) {
    for (int64_t l = 0; l < cube.num_layers(); ++l) {
      for (int64_t c = 0; c < cube.num_candidates(); ++c) {
        for (int64_t h = 0; h < cube.num_heads(); ++h) scores.push_back(cube.at(s, l, c, h));
      }
    }
  }
  return scores;
}

absl::StatusOr<std::vector<HeadScore>> ScoreAlone(const ScorePassOptions& options) {
  const SmallModel model;
  const auto world = CreateSingleCommunicator();
  const std::vector<PatternSet> sets = Sets(model);
  LF_ASSIGN_OR_RETURN(const ScoreCube cube, ScoreCandidates(model.view(), Samples(), sets, *world, options));
  return Flat(cube);
}

TEST(ScorePass, HeadsDifferAndCandidatesDoToo) {
  LF_ASSERT_OK_AND_ASSIGN(const auto scores, ScoreAlone({.sample = SmallPass()}));
  ASSERT_EQ(scores.size(), 2U * 3 * 2 * 4);
  for (const HeadScore& score : scores) {
    EXPECT_GT(score.recall, 0);
    EXPECT_LT(score.recall, 1.0001);
  }
  EXPECT_NE(scores[0].recall, scores[1].recall);
  EXPECT_NE(scores[0].recall, scores[4].recall);
}

TEST(ScorePass, RanksGetTheBitsOfOneRank) {
  LF_ASSERT_OK_AND_ASSIGN(const auto want, ScoreAlone({.sample = SmallPass()}));
  for (const int size : {2, 3, 5, 8}) {  // 6 units: also ranks without any
    OnRanks(size, [&](Communicator& world, int rank) {
      const SmallModel model;
      const std::vector<PatternSet> sets = Sets(model);
      LF_ASSERT_OK_AND_ASSIGN(const ScoreCube cube,
                              ScoreCandidates(model.view(), Samples(), sets, world, {.sample = SmallPass()}));
      EXPECT_EQ(Flat(cube), want) << "rank " << rank << " of " << size;
    });
  }
}

TEST(ScorePass, AnErrorOfOneRankReachesAll) {
  OnRanks(3, [](Communicator& world, int rank) {
    const SmallModel model;
    const std::vector<PatternSet> sets = Sets(model);
    ScorePassOptions options{.sample = SmallPass()};
    if (rank == 1) options.sample.should_stop = [] { return absl::CancelledError("enough"); };
    EXPECT_THAT(ScoreCandidates(model.view(), Samples(), sets, world, options).status(),
                StatusIs(absl::StatusCode::kCancelled, HasSubstr("enough")));
    LF_EXPECT_OK(world.Health());
  });
}

TEST(ScorePass, GoesOnWhereItWasStoppedWithOtherRanks) {
  LF_ASSERT_OK_AND_ASSIGN(const auto want, ScoreAlone({.sample = SmallPass()}));
  const TempDir dir;
  LF_ASSERT_OK_AND_ASSIGN(const SearchState state, SearchState::Open(dir.File("s"), "{}"));
  // Stops once four layers have been scored.
  int64_t scored = 0;
  ScorePassOptions options{.sample = SmallPass(), .state = &state};
  options.on_progress = [&scored](const ScoreProgress& progress) { scored = progress.layers_done; };
  options.sample.should_stop = [&scored] {
    return scored < 4 ? absl::OkStatus() : absl::CancelledError("cut short");
  };
  EXPECT_THAT(ScoreAlone(options).status(), StatusIs(absl::StatusCode::kCancelled, HasSubstr("cut short")));

  std::atomic<int64_t> layers = 0;
  OnRanks(2, [&](Communicator& world, int) {
    const SmallModel model;
    const std::vector<PatternSet> sets = Sets(model);
    ScorePassOptions rest{.sample = SmallPass(), .state = &state};
    rest.on_progress = [&layers](const ScoreProgress&) { ++layers; };
    LF_ASSERT_OK_AND_ASSIGN(const ScoreCube cube,
                            ScoreCandidates(model.view(), Samples(), sets, world, rest));
    EXPECT_EQ(Flat(cube), want);
  });
  EXPECT_EQ(layers, 3);  // of the second sample: one forward alone, two scored; nothing of the first
}

TEST(ScorePass, ProgressCountsDownToNothing) {
  std::vector<ScoreProgress> seen;
  ScorePassOptions options{.sample = SmallPass()};
  options.on_progress = [&seen](const ScoreProgress& progress) { seen.push_back(progress); };
  LF_ASSERT_OK(ScoreAlone(options).status());
  ASSERT_EQ(seen.size(), 6U);
  for (size_t i = 0; i < seen.size(); ++i) {
    EXPECT_EQ(seen[i].layers_done, static_cast<int64_t>(i) + 1);
    EXPECT_EQ(seen[i].num_layers, 6);
    EXPECT_EQ(seen[i].seconds_left > 0, i + 1 < seen.size());
  }
}

TEST(SamplePass, SamplesAreCheckedByName) {
  const SmallModel model;
  LF_EXPECT_OK(CheckSample(model.config, PromptOf(256, 3), "a"));
  EXPECT_THAT(CheckSample(model.config, PromptOf(255, 3), "a.i32"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a.i32: 255 tokens")));
  EXPECT_THAT(CheckSample(model.config, PromptOf(4097, 3), "a.i32"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("4096 positions")));
  std::vector<int32_t> ids = PromptOf(300, 3);
  ids[7] = 97;
  EXPECT_THAT(CheckSample(model.config, ids, "a.i32"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token id 97 at index 7")));
  ModelConfig windows = model.config;
  windows.layer_windows = {0, 299, 0};
  LF_EXPECT_OK(CheckSample(windows, PromptOf(299, 3), "a.i32"));
  EXPECT_THAT(CheckSample(windows, PromptOf(300, 3), "a.i32"),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("layer 1 has a sliding window of 299")));
}

}  // namespace
}  // namespace longfill
