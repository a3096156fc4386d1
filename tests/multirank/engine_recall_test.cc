// The recall guard of whole engines: what falls short is computed again, alike on every mesh.

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/multirank/engine_group.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

constexpr int64_t kTokens = 900;
constexpr Mesh kMeshes[] = {{1, 1}, {2, 1}, {1, 2}, {4, 1}, {2, 2}, {1, 4}};
constexpr const char* kSparse[] = {"a-shape:7,70", "vertical-slash:30,50", "block-sparse:2",
                                   "block-share:2,1"};

struct Asked {
  std::string attention;
  RecallOptions recall;
};

// Of one golden model over a mesh, in the order asked.
std::vector<PrefillResult> RunOn(const Mesh& mesh, const std::vector<Asked>& asked,
                                 const std::string& model = "llama-gqa7-tied") {
  std::vector<PrefillResult> results;
  Recorder recorder;
  WithEngine({.model_dir = GoldenModel(model), .mesh = mesh}, recorder, [&](PrefillEngine& engine) {
    const int64_t num_tokens = std::min(kTokens, engine.config().max_position_embeddings);
    for (size_t i = 0; i < asked.size(); ++i) {
      PrefillRequest request = MakeRequest(
          absl::StrCat(i), RandomIds(num_tokens, engine.config().vocab_size, 3), asked[i].attention);
      request.logits_positions = {num_tokens - 1, 0, num_tokens / 2};
      request.recall = asked[i].recall;
      LF_ASSERT_OK_AND_ASSIGN(PrefillResult result, Prefill(engine, recorder, request));
      results.push_back(std::move(result));
    }
  });
  return results;
}

// The middle of the widest gap between the recalls of a prompt, so that rounding decides nothing.
double BoundBetween(const RecallFigures& recall) {
  std::vector<double> all;
  for (const LayerRecall& layer : recall.layers)
    all.insert(all.end(), layer.heads.begin(), layer.heads.end());
  std::ranges::sort(all);
  double gap = 0, bound = 0;
  for (size_t i = 1; i < all.size(); ++i) {
    if (all[i] - all[i - 1] <= gap) continue;
    gap = all[i] - all[i - 1];
    bound = (all[i] + all[i - 1]) / 2;
  }
  return bound;
}

TEST(EngineRecall, NobodyWatchesUnlessAsked) {
  const std::vector<PrefillResult> got = RunOn({1, 1}, {{"vertical-slash:30,50", {}}});
  ASSERT_EQ(got.size(), 1u);
  EXPECT_EQ(got[0].figures.recall.rows, 0);
  EXPECT_TRUE(got[0].figures.recall.layers.empty());
}

TEST(EngineRecall, WatchingChangesNothing) {
  for (const Mesh& mesh : {Mesh{1, 1}, Mesh{2, 2}}) {
    for (const char* attention : kSparse) {
      const std::vector<PrefillResult> got = RunOn(mesh, {{attention, {}}, {attention, {.monitor = true}}});
      ASSERT_EQ(got.size(), 2u);
      EXPECT_EQ(got[0].logits, got[1].logits) << attention;
      EXPECT_EQ(got[0].figures.rank_covered_pairs, got[1].figures.rank_covered_pairs);
      EXPECT_EQ(got[1].figures.recall.recomputed, 0);
    }
  }
}

TEST(EngineRecall, DenseHeadsAreOneByDefinition) {
  const std::vector<PrefillResult> got = RunOn({2, 1}, {{"dense", {true, 1.0}}});
  ASSERT_EQ(got.size(), 1u);
  const RecallFigures& recall = got[0].figures.recall;
  EXPECT_EQ(recall.min, 1);
  EXPECT_EQ(recall.mean, 1);
  EXPECT_EQ(recall.recomputed, 0);
  EXPECT_EQ(recall.pair_share, 0);
  for (const LayerRecall& layer : recall.layers) EXPECT_FALSE(layer.watched);
}

TEST(EngineRecall, EveryMeshMeasuresTheSame) {
  std::vector<Asked> asked;
  for (const char* attention : kSparse) asked.push_back({attention, {.monitor = true}});
  const std::vector<PrefillResult> alone = RunOn({1, 1}, asked);
  ASSERT_EQ(alone.size(), asked.size());
  for (const Mesh& mesh : kMeshes) {
    const std::vector<PrefillResult> got = RunOn(mesh, asked);
    ASSERT_EQ(got.size(), asked.size());
    for (size_t i = 0; i < asked.size(); ++i) {
      SCOPED_TRACE(absl::StrCat(asked[i].attention, ", ", ToString(mesh)));
      const RecallFigures& recall = got[i].figures.recall;
      const RecallFigures& expected = alone[i].figures.recall;
      ASSERT_EQ(recall.layers.size(), expected.layers.size());
      EXPECT_EQ(recall.rows, expected.rows);
      EXPECT_NEAR(recall.min, expected.min, 1e-4);
      EXPECT_LT(recall.min, 1) << "nothing was left out";
      EXPECT_GT(recall.pair_share, 0);
      double least = 1;
      for (size_t layer = 0; layer < recall.layers.size(); ++layer) {
        EXPECT_TRUE(recall.layers[layer].watched);
        for (size_t head = 0; head < recall.layers[layer].heads.size(); ++head) {
          EXPECT_NEAR(recall.layers[layer].heads[head], expected.layers[layer].heads[head], 1e-4)
              << "layer " << layer << " head " << head;
          least = std::min(least, recall.layers[layer].heads[head]);
        }
      }
      EXPECT_EQ(recall.min, least);
    }
  }
}

// Nothing sparse is good enough: all becomes dense, and so do the logits.
TEST(EngineRecall, WhatMustSeeAllKeysIsDense) {
  for (const Mesh& mesh : kMeshes) {
    std::vector<Asked> asked = {{"dense", {}}};
    for (const char* attention : kSparse) asked.push_back({attention, {.min_recall = 1.0}});
    const std::vector<PrefillResult> got = RunOn(mesh, asked);
    ASSERT_EQ(got.size(), asked.size());
    for (size_t i = 1; i < asked.size(); ++i) {
      SCOPED_TRACE(absl::StrCat(asked[i].attention, ", ", ToString(mesh)));
      ExpectNear(got[i].logits, got[0].logits, 1e-4, "logits");
      const RecallFigures& recall = got[i].figures.recall;
      EXPECT_EQ(recall.min, 1);
      for (const LayerRecall& layer : recall.layers) {
        ASSERT_EQ(layer.recomputed.size(), layer.heads.size());
        for (const RecomputedHead& head : layer.recomputed) {
          EXPECT_LT(head.recall_before, 1);
          EXPECT_EQ(head.recall, 1);
          EXPECT_EQ(head.density, 1);
        }
      }
    }
  }
}

TEST(EngineRecall, OnlyHeadsThatFallShortAreComputedAgainAndThenReachTheBound) {
  for (const char* attention : kSparse) {
    const std::vector<PrefillResult> watched = RunOn({1, 1}, {{attention, {.monitor = true}}});
    ASSERT_EQ(watched.size(), 1u);
    const RecallFigures& before = watched[0].figures.recall;
    const double bound = BoundBetween({.layers = {before.layers[0]}});
    std::vector<std::vector<RecomputedHead>> expected;  // of one rank
    std::vector<float> logits;
    for (const Mesh& mesh : kMeshes) {
      SCOPED_TRACE(absl::StrCat(attention, " above ", bound, ", ", ToString(mesh)));
      const std::vector<PrefillResult> got = RunOn(mesh, {{attention, {.min_recall = bound}}});
      ASSERT_EQ(got.size(), 1u);
      const RecallFigures& recall = got[0].figures.recall;
      EXPECT_GE(recall.min, bound);
      EXPECT_GT(recall.recomputed, 0);
      EXPECT_GT(got[0].figures.covered_pairs, watched[0].figures.covered_pairs);
      std::vector<std::vector<RecomputedHead>> recomputed;
      for (const LayerRecall& layer : recall.layers) recomputed.push_back(layer.recomputed);
      // In the first layer, whose input nothing has changed, exactly those below the bound.
      size_t next = 0;
      for (size_t head = 0; head < before.layers[0].heads.size(); ++head) {
        if (before.layers[0].heads[head] >= bound) {
          EXPECT_NEAR(recall.layers[0].heads[head], before.layers[0].heads[head], 1e-4);
          continue;
        }
        ASSERT_LT(next, recomputed[0].size());
        EXPECT_EQ(recomputed[0][next].head, static_cast<int64_t>(head));
        EXPECT_NEAR(recomputed[0][next].recall_before, before.layers[0].heads[head], 1e-4);
        EXPECT_EQ(recomputed[0][next].recall, recall.layers[0].heads[head]);
        EXPECT_GT(recomputed[0][next].density, 0);
        ++next;
      }
      EXPECT_EQ(next, recomputed[0].size());
      if (mesh == Mesh{1, 1}) {
        expected = recomputed;
        logits = got[0].logits;
        continue;
      }
      ExpectNear(got[0].logits, logits, 1e-4, "logits");
      for (size_t layer = 0; layer < expected.size(); ++layer) {
        ASSERT_EQ(recomputed[layer].size(), expected[layer].size()) << "layer " << layer;
        for (size_t i = 0; i < expected[layer].size(); ++i) {
          EXPECT_EQ(recomputed[layer][i].head, expected[layer][i].head);
          EXPECT_EQ(recomputed[layer][i].pattern, expected[layer][i].pattern);
          EXPECT_NEAR(recomputed[layer][i].density, expected[layer][i].density, 1e-3);
        }
      }
    }
  }
}

// No key outside of the window counts: not in the recall, and not after recomputation.
TEST(EngineRecall, WindowsOfTheModelBoundTheGuard) {
  const std::vector<PrefillResult> got = RunOn(
      {2, 1}, {{"dense", {}}, {"a-shape:0,11", {.monitor = true}}, {"a-shape:0,11", {.min_recall = 1.0}}},
      "mistral-window");
  ASSERT_EQ(got.size(), 3u);
  EXPECT_LT(got[1].figures.recall.min, 1);
  EXPECT_EQ(got[2].figures.recall.min, 1);
  EXPECT_GT(got[2].figures.recall.recomputed, 0);
  ExpectNear(got[2].logits, got[0].logits, 1e-4, "logits");
}

TEST(EngineRecall, WhatIsNoRecallIsRefusedWithItsValue) {
  Recorder recorder;
  WithEngine({.model_dir = GoldenModel("llama-gqa4"), .mesh = {1, 1}}, recorder, [&](PrefillEngine& engine) {
    PrefillRequest request = MakeRequest("bad", {1, 2, 3}, "dense");
    request.recall.min_recall = 1.25;
    EXPECT_THAT(Prefill(engine, recorder, request).status(),
                StatusIs(absl::StatusCode::kInvalidArgument, testing::HasSubstr("min_recall 1.25")));
  });
}

}  // namespace
}  // namespace longfill
