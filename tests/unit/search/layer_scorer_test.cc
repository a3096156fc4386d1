// Recall, error, pairs and time of a layer against the definition, on every backend of the machine.

#include "models/search/layer_scorer.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/contract/backend_fixture.h"

namespace longfill {
namespace {

constexpr int64_t kNumTokens = 700;  // five blocks of 128 and a part of one
constexpr int64_t kNumQHeads = 4;
constexpr int64_t kNumKvHeads = 2;
constexpr int64_t kDim = 64;
constexpr double kScale = 0.125;

TEST(SampleRows, AreEvenlySpreadAndHoldTheLast) {
  EXPECT_EQ(SampleRows(700, 700).num_rows, 700);
  EXPECT_EQ(SampleRows(700, 4096).positions, PositionMap::Contiguous(0));
  for (const int64_t num_tokens : {1, 127, 128, 129, 640, 700, 1280, 99999}) {
    for (const int64_t max_rows : {1, 128, 255, 256, 1000}) {
      const RowSample sample = SampleRows(num_tokens, max_rows);
      EXPECT_LE(sample.num_rows, std::max(kScoreBlock, max_rows)) << num_tokens << " " << max_rows;
      EXPECT_EQ(sample.positions.Position(sample.num_rows - 1), num_tokens - 1);
      EXPECT_EQ(sample.positions.first % kScoreBlock, 0);
    }
  }
  const RowSample sample = SampleRows(700, 256);  // blocks 2 and 5 of 0 .. 5
  EXPECT_EQ(sample.positions, (PositionMap{256, 128, 384}));
  EXPECT_EQ(sample.num_rows, 128 + 60);
}

class LayerScorerTest : public BackendTest {
 protected:
  void SetUp() override {
    BackendTest::SetUp();
    if (IsSkipped()) return;
    q_ = Rounded(NormalFloats(kNumQHeads * kNumTokens * kDim, 1, 1.5F));
    k_ = Rounded(NormalFloats(kNumKvHeads * kNumTokens * kDim, 2));
    v_ = Rounded(NormalFloats(kNumKvHeads * kNumTokens * kDim, 3));
    q_memory_ = UploadCompute(q_);
    k_memory_ = UploadCompute(k_);
    v_memory_ = UploadCompute(v_);
    out_memory_ = ComputeArray(kNumTokens * kNumQHeads * kDim);
  }

  LayerHeads Heads() {
    return {.q = {q_memory_.data(), kNumTokens * kDim, kDim},
            .k = {k_memory_.data(), kNumTokens * kDim, kDim},
            .v = {v_memory_.data(), kNumTokens * kDim, kDim},
            .out = {out_memory_.data(), kDim, kNumQHeads * kDim}};
  }

  std::unique_ptr<LayerScorer> NewScorer(int64_t max_rows, int num_threads = 2) {
    auto scorer = LayerScorer::Create(
        backend(), {kNumQHeads, kNumKvHeads, kDim, static_cast<float>(kScale)},
        {.num_tokens = kNumTokens, .max_rows = max_rows, .num_threads = num_threads, .should_stop = [] {
           return absl::OkStatus();
         }});
    LF_EXPECT_OK(scorer.status());
    return *std::move(scorer);
  }

  // Softmax of one head in fp64, [num_tokens, num_tokens].
  std::vector<double> Probabilities(int64_t head) const {
    std::vector<double> p(kNumTokens * kNumTokens, 0);
    const float* q = q_.data() + head * kNumTokens * kDim;
    const float* k = k_.data() + head / (kNumQHeads / kNumKvHeads) * kNumTokens * kDim;
    for (int64_t i = 0; i < kNumTokens; ++i) {
      double sum = 0;
      for (int64_t j = 0; j <= i; ++j) {
        double dot = 0;
        for (int64_t e = 0; e < kDim; ++e) dot += double{q[i * kDim + e]} * double{k[j * kDim + e]};
        sum += p[i * kNumTokens + j] = std::exp(kScale * dot);
      }
      for (int64_t j = 0; j <= i; ++j) p[i * kNumTokens + j] /= sum;
    }
    return p;
  }

  HeadScore Want(int64_t head, const oracle::Mask& mask, int64_t max_rows) const {
    const std::vector<double> p = Probabilities(head);
    const float* v = v_.data() + head / (kNumQHeads / kNumKvHeads) * kNumTokens * kDim;
    const RowSample sample = SampleRows(kNumTokens, max_rows);
    HeadScore want;
    want.pairs = mask.CountPairs();
    double difference = 0, norm = 0;
    int64_t num_last = 0;
    for (int64_t row = 0; row < sample.num_rows; ++row) {
      const int64_t i = sample.positions.Position(row);
      double kept = 0;
      for (int64_t j = 0; j <= i; ++j) kept += mask.At(i, j) ? p[i * kNumTokens + j] : 0;
      want.recall += kept / static_cast<double>(sample.num_rows);
      if (i >= kNumTokens - 64) {
        want.last_recall += kept;
        ++num_last;
      }
      for (int64_t e = 0; e < kDim; ++e) {
        double full = 0, sparse = 0;
        for (int64_t j = 0; j <= i; ++j) {
          full += p[i * kNumTokens + j] * double{v[j * kDim + e]};
          if (mask.At(i, j)) sparse += p[i * kNumTokens + j] * double{v[j * kDim + e]};
        }
        sparse = kept > 0 ? sparse / kept : 0;
        difference += (sparse - full) * (sparse - full);
        norm += full * full;
      }
    }
    want.last_recall /= static_cast<double>(num_last);
    want.error = std::sqrt(difference / norm);
    return want;
  }

  double tolerance() { return on_gpu() ? 2e-2 : 2e-5; }

  void ExpectScores(const std::vector<HeadScore>& got, const std::vector<oracle::Mask>& masks,
                    int64_t max_rows) {
    ASSERT_EQ(std::ssize(got), kNumQHeads);
    for (int64_t head = 0; head < kNumQHeads; ++head) {
      const HeadScore want = Want(head, masks[head], max_rows);
      EXPECT_NEAR(got[head].recall, want.recall, tolerance()) << "head " << head;
      EXPECT_NEAR(got[head].last_recall, want.last_recall, tolerance()) << "head " << head;
      EXPECT_NEAR(got[head].error, want.error, tolerance()) << "head " << head;
      EXPECT_EQ(got[head].pairs, want.pairs) << "head " << head;
    }
  }

  // What the index of a vertical-slash head covers, by the definition of the selection.
  std::vector<oracle::Mask> VerticalSlashMasks(const VerticalSlash& pattern) const {
    std::vector<oracle::Mask> masks;
    for (int64_t head = 0; head < kNumQHeads; ++head) {
      const auto selection =
          oracle::SelectVerticalSlash(q_.data() + head * kNumTokens * kDim,
                                      k_.data() + head / (kNumQHeads / kNumKvHeads) * kNumTokens * kDim,
                                      kNumTokens, kDim, kScale, pattern);
      masks.push_back(oracle::TilesMask(selection.columns, selection.distances, kNumTokens));
    }
    return masks;
  }

 private:
  std::vector<float> q_, k_, v_;
  Buffer q_memory_, k_memory_, v_memory_, out_memory_;
};

TEST_P(LayerScorerTest, ScoresAreThoseOfTheDefinition) {
  for (const int64_t max_rows : {int64_t{256}, kNumTokens}) {
    SCOPED_TRACE(max_rows);
    const auto scorer = NewScorer(max_rows);
    LF_ASSERT_OK(scorer->AttendFully(Heads(), /*keep=*/true));
    const std::vector<HeadPattern> a_shape(kNumQHeads, AShape{5, 100});
    LF_ASSERT_OK_AND_ASSIGN(const auto first, scorer->Score(Heads(), a_shape));
    ExpectScores(first, std::vector(kNumQHeads, oracle::AShapeMask({5, 100}, kNumTokens)), max_rows);
    const std::vector<HeadPattern> vertical_slash(kNumQHeads, VerticalSlash{40, 101});
    LF_ASSERT_OK_AND_ASSIGN(const auto second, scorer->Score(Heads(), vertical_slash));
    ExpectScores(second, VerticalSlashMasks({40, 101}), max_rows);
    LF_ASSERT_OK_AND_ASSIGN(const auto again, scorer->Score(Heads(), a_shape));
    EXPECT_EQ(again, first);
  }
}

TEST_P(LayerScorerTest, DenseKeepsEverything) {
  const auto scorer = NewScorer(384);
  LF_ASSERT_OK(scorer->AttendFully(Heads(), true));
  LF_ASSERT_OK_AND_ASSIGN(const auto scores,
                          scorer->Score(Heads(), std::vector<HeadPattern>(kNumQHeads, Dense())));
  for (const HeadScore& score : scores) {
    EXPECT_NEAR(score.recall, 1, tolerance() / 20);
    EXPECT_NEAR(score.error, 0, tolerance());
    EXPECT_EQ(score.pairs, kNumTokens * (kNumTokens + 1) / 2);
  }
}

TEST_P(LayerScorerTest, ScoresDoNotDependOnTheThreads) {
  std::vector<std::vector<HeadScore>> all;
  for (const int num_threads : {1, 3}) {
    const auto scorer = NewScorer(256, num_threads);
    LF_ASSERT_OK(scorer->AttendFully(Heads(), true));
    LF_ASSERT_OK_AND_ASSIGN(auto scores,
                            scorer->Score(Heads(), std::vector<HeadPattern>(kNumQHeads, BlockShare{2, 0.2})));
    all.push_back(std::move(scores));
  }
  EXPECT_EQ(all[0], all[1]);
}

TEST_P(LayerScorerTest, MeasuresPairsAndTimeOfWholePrompts) {
  const auto scorer = NewScorer(128);
  LF_ASSERT_OK(scorer->AttendFully(Heads(), true));
  const std::vector<HeadPattern> patterns(kNumQHeads, AShape{5, 100});
  LF_ASSERT_OK_AND_ASSIGN(const LayerTime time, scorer->Measure(Heads(), patterns, 2));
  EXPECT_EQ(time.pairs, kNumQHeads * oracle::AShapeMask({5, 100}, kNumTokens).CountPairs());
  EXPECT_GT(time.attention_seconds, 0);
}

LF_INSTANTIATE_BACKENDS(LayerScorerTest);

}  // namespace
}  // namespace longfill
