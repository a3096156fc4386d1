#include "models/search/influence.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "models/transformer.h"
#include "parallel/sparse_index_builder.h"
#include "tests/unit/models/test_files.h"
#include "tests/unit/search/search_fixture.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

constexpr HeadPattern kBase = VerticalSlash{30, 100};
std::vector<std::vector<int32_t>> Samples() { return {PromptOf(517, 11), PromptOf(300, 5)}; }

// Probabilities of the token after the prompt, by a forward pass from the start, whose head `place` is cut.
std::vector<double> NextToken(const std::vector<int32_t>& ids, int64_t place) {
  const SmallModel model;
  const int64_t num_tokens = std::ssize(ids), num_heads = model.config.num_q_heads;
  const ShardPlan plan(Mesh{1, 1}, num_tokens);
  const auto single = CreateSingleCommunicator();
  const AttentionGeometry geometry = GeometryOf(model.config);
  auto transformer = *Transformer::Create(model.config, *model.weights, *model.backend, plan, 0);
  auto builder = *SparseIndexBuilder::Create(*model.backend, *single, geometry, Coverage::kTiles);
  auto attention = *ParallelAttention::Create(*model.backend, *single, Mesh{1, 1}, geometry);
  const SamplePassOptions options = SmallPass();
  LF_EXPECT_OK(transformer->Embed(ids));
  for (int64_t layer = 0; layer < model.config.num_layers; ++layer) {
    std::vector<HeadPattern> patterns(static_cast<size_t>(num_heads), kBase);
    if (place / num_heads == layer) patterns[place % num_heads] = CutPattern(num_tokens);
    LF_EXPECT_OK(transformer->RunLayer(
        layer, patterns, {.index_builder = &builder, .attention = attention.get()}, LoneCallbacks(options)));
  }
  std::vector<float> logits(static_cast<size_t>(model.config.vocab_size));
  const int64_t last = num_tokens - 1;
  LF_EXPECT_OK(transformer->Logits({&last, 1}, logits));
  std::vector<double> p(logits.begin(), logits.end());
  double sum = 0;
  for (double& x : p) sum += x = std::exp(x);
  for (double& x : p) x /= sum;
  return p;
}

absl::StatusOr<std::vector<double>> MeasureAlone(const ScorePassOptions& options,
                                                 const HeadPattern& base = kBase) {
  const SmallModel model;
  const auto world = CreateSingleCommunicator();
  return MeasureInfluence(model.view(), Samples(), base, *world, options);
}

ScorePassOptions Options() { return {.pass = "influence", .sample = SmallPass()}; }

TEST(Influence, IsTheDivergenceOfWholeForwardPasses) {
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<double> influence, MeasureAlone(Options()));
  ASSERT_EQ(influence.size(), 12U);
  std::vector<double> want(influence.size(), 0.0);
  for (const std::vector<int32_t>& ids : Samples()) {
    const std::vector<double> whole = NextToken(ids, -4);  // of no layer
    for (size_t place = 0; place < want.size(); ++place) {
      const std::vector<double> cut = NextToken(ids, static_cast<int64_t>(place));
      for (size_t i = 0; i < cut.size(); ++i) want[place] += whole[i] * std::log(whole[i] / cut[i]) / 2;
    }
  }
  for (size_t place = 0; place < want.size(); ++place) {
    EXPECT_NEAR(influence[place], want[place], 1e-6 + 1e-4 * want[place]) << place;
  }
  EXPECT_GT(*std::max_element(want.begin(), want.end()), 1e-3);
}

TEST(Influence, IsNothingWhereNothingIsCut) {
  const std::vector<std::vector<int32_t>> one = {PromptOf(517, 11)};
  const SmallModel model;
  const auto world = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(
      const std::vector<double> influence,
      MeasureInfluence(model.view(), one, CutPattern(std::ssize(one[0])), *world, Options()));
  EXPECT_EQ(influence, std::vector<double>(12, 0.0));
  EXPECT_TRUE(DecisiveHeads(influence, 1).empty());
}

TEST(Influence, RanksGetTheBitsOfOneRank) {
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<double> want, MeasureAlone(Options()));
  for (const int size : {2, 3, 8}) {  // 6 units: also ranks without any
    OnRanks(size, [&](Communicator& world, int rank) {
      const SmallModel model;
      LF_ASSERT_OK_AND_ASSIGN(const std::vector<double> influence,
                              MeasureInfluence(model.view(), Samples(), kBase, world, Options()));
      EXPECT_EQ(influence, want) << "rank " << rank << " of " << size;
    });
  }
}

TEST(Influence, AnErrorOfOneRankReachesAll) {
  OnRanks(3, [](Communicator& world, int rank) {
    const SmallModel model;
    ScorePassOptions options = Options();
    if (rank == 1) options.sample.should_stop = [] { return absl::CancelledError("enough"); };
    EXPECT_THAT(MeasureInfluence(model.view(), Samples(), kBase, world, options).status(),
                StatusIs(absl::StatusCode::kCancelled, HasSubstr("enough")));
    LF_EXPECT_OK(world.Health());
  });
}

TEST(Influence, GoesOnWhereItWasStoppedWithOtherRanks) {
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<double> want, MeasureAlone(Options()));
  const TempDir dir;
  LF_ASSERT_OK_AND_ASSIGN(const SearchState state, SearchState::Open(dir.File("s"), "{}"));
  // The base takes 3 layers, the first unit 4 heads of 3 layers and the base's first, the second 4 of 2.
  constexpr int64_t kStop = 3 + 4 * 3 + 1 + 4 * 2;
  int64_t done = 0;
  ScorePassOptions options = Options();
  options.state = &state;
  options.on_progress = [&done](const ScoreProgress& progress) { done = progress.layers_done; };
  options.sample.should_stop = [&done] {
    return done < kStop ? absl::OkStatus() : absl::CancelledError("cut short");
  };
  EXPECT_THAT(MeasureAlone(options).status(), StatusIs(absl::StatusCode::kCancelled, HasSubstr("cut short")));

  std::vector<int64_t> layers(2, 0);
  OnRanks(2, [&](Communicator& world, int rank) {
    const SmallModel model;
    ScorePassOptions rest = Options();
    rest.state = &state;
    rest.on_progress = [&layers, rank](const ScoreProgress& progress) {
      ++layers[rank];
      EXPECT_EQ(progress.layers_done, layers[rank]);
      EXPECT_EQ(progress.seconds_left > 0, progress.layers_done < progress.num_layers);
    };
    LF_ASSERT_OK_AND_ASSIGN(const std::vector<double> influence,
                            MeasureInfluence(model.view(), Samples(), kBase, world, rest));
    EXPECT_EQ(influence, want);
  });
  // Rank 0: layer 2 of the first sample and 1 of the second; rank 1: layers 0 and 2 of the second.
  EXPECT_EQ(layers[0], (3 + 3 + 4 * 1) + (3 + 2 + 4 * 2));
  EXPECT_EQ(layers[1], 3 + 3 + 4 * 3 + 4 * 1);
}

TEST(Influence, DecisiveHeadsAreTheFewestWithTheShare) {
  const std::vector<double> influence = {1, 5, 0, 3, 1};
  EXPECT_EQ(DecisiveHeads(influence, 0), std::vector<size_t>{});
  EXPECT_EQ(DecisiveHeads(influence, 0.5), (std::vector<size_t>{1}));
  EXPECT_EQ(DecisiveHeads(influence, 0.51), (std::vector<size_t>{1, 3}));
  EXPECT_EQ(DecisiveHeads(influence, 0.9), (std::vector<size_t>{0, 1, 3}));  // of equal ones the lower
  EXPECT_EQ(DecisiveHeads(influence, 1), (std::vector<size_t>{0, 1, 3, 4}));
  EXPECT_EQ(DecisiveHeads(std::vector<double>(9, 0.9 * kLeastInfluence), 1), std::vector<size_t>{});
  EXPECT_EQ(DecisiveHeads({{0.1, 0.2, 0.3, 1e-5, 0}}, 1), (std::vector<size_t>{0, 1, 2}));
}

TEST(Influence, SomethingIsCutOfEveryPrompt) {
  EXPECT_EQ(CutPattern(1 << 20), (AShape{64, 1024}));
  EXPECT_EQ(CutPattern(4096), (AShape{64, 512}));
  EXPECT_EQ(CutPattern(256), (AShape{8, 32}));
}

}  // namespace
}  // namespace longfill
