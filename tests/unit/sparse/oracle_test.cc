// The oracle itself, against results worked out by hand.

#include "kernels/cpu/oracle/oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>

#include "tests/testing/status_matchers.h"

namespace longfill::oracle {
namespace {

std::vector<int32_t> Range(int32_t begin, int32_t end) {
  std::vector<int32_t> range(end - begin);
  std::iota(range.begin(), range.end(), begin);
  return range;
}

TEST(Oracle, MasksOfASmallPromptAreTheWorkedOnes) {
  EXPECT_EQ(DenseMask(5).CountPairs(), 15);
  EXPECT_EQ(AShapeMask({1, 2}, 4).covered,
            (std::vector<uint8_t>{1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1}));
  // Row block 1 of 130 rows, distance 30: keys 34 to 97; distance 0: keys 64 to 127.
  const std::vector<int32_t> distances = {0, 30};
  const Mask tiles = TilesMask({}, distances, 130);
  EXPECT_FALSE(tiles.At(64, 33));
  EXPECT_TRUE(tiles.At(64, 34));
  EXPECT_TRUE(tiles.At(127, 34));
  EXPECT_FALSE(tiles.At(129, 97));
  EXPECT_TRUE(tiles.At(129, 98));
  EXPECT_FALSE(tiles.At(64, 65));
  EXPECT_EQ(BlockMask({{0}, {1}, {0}}, 130).CountPairs(), 64 * 65 + 2 * 64);
}

TEST(Oracle, UniformScoresSelectForcedEntriesThenTheLowest) {
  // q = 0: every query spreads its mass evenly, so keys before the last 64 tie, and near distances have most
  // terms.
  const int64_t n = 300;
  const std::vector<float> q(n, 0);
  const std::vector<float> k(n, 1);
  const VerticalSlashSelection selection = SelectVerticalSlash(q.data(), k.data(), n, 1, 1, {50, 60});
  EXPECT_EQ(selection.columns, Range(0, 50));
  EXPECT_EQ(selection.distances, Range(0, 60));
  double expected = 0;
  for (int64_t query = 236; query < 300; ++query) expected += 1.0 / static_cast<double>(query + 1);
  EXPECT_NEAR(selection.vertical_scores[0], expected, 1e-12);
  EXPECT_NEAR(selection.slash_scores[0], expected, 1e-12);
  EXPECT_NEAR(selection.vertical_scores[299], 1.0 / 300, 1e-15);
  EXPECT_NEAR(selection.slash_scores[299], 1.0 / 300, 1e-15);
  EXPECT_NEAR(std::accumulate(selection.slash_scores.begin(), selection.slash_scores.end(), 0.0), 64, 1e-10);
}

TEST(Oracle, SelectionFindsALoudKeyAndADiagonal) {
  const int64_t n = 400;
  std::vector<float> q(n, 1);
  std::vector<float> k(n, 0);
  k[200] = 12;
  const VerticalSlashSelection selection = SelectVerticalSlash(q.data(), k.data(), n, 1, 1, {31, 164});
  std::vector<int32_t> columns = Range(0, 30);
  columns.push_back(200);
  EXPECT_EQ(selection.columns, columns);
  // The loud key lies at distances 136 to 199 of the last 64 queries.
  std::vector<int32_t> distances = Range(0, 100);
  for (const int32_t d : Range(136, 200)) distances.push_back(d);
  EXPECT_EQ(selection.distances, distances);
}

TEST(Oracle, BudgetsAreClampedToTheForcedCountAndTheLength) {
  const std::vector<float> x(400, 0.5f);
  for (const int64_t n : {1, 29, 30, 31, 49, 50, 51, 99, 100, 101, 400}) {
    const VerticalSlashSelection small = SelectVerticalSlash(x.data(), x.data(), n, 1, 1, {0, 1});
    EXPECT_EQ(small.columns, Range(0, static_cast<int32_t>(std::min<int64_t>(n, 30))));
    EXPECT_EQ(small.distances, Range(0, static_cast<int32_t>(std::min<int64_t>(n, 50))));
    const VerticalSlashSelection large = SelectVerticalSlash(x.data(), x.data(), n, 1, 1, {1000, 6096});
    EXPECT_EQ(large.columns, Range(0, static_cast<int32_t>(n)));
    EXPECT_EQ(large.distances, Range(0, static_cast<int32_t>(n)));
  }
}

TEST(Oracle, BlocksAreRankedByMeansForcedWithinTheCountAndTiesGoLow) {
  const int64_t n = 4 * 64 + 2;
  const std::vector<float> q(n, 1);
  std::vector<float> k(n, 0);
  for (int64_t row = 128; row < 192; ++row) k[row] = 3;  // block 2
  k[256] = 8;                                            // block 4 has two rows: mean 4
  const BlockSelection forced = SelectBlocks(q.data(), k.data(), n, 1, 3, true);
  EXPECT_EQ(forced.blocks, (std::vector<std::vector<int32_t>>{{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}, {0, 2, 4}}));
  const BlockSelection free = SelectBlocks(q.data(), k.data(), n, 1, 2, false);
  EXPECT_EQ(free.blocks, (std::vector<std::vector<int32_t>>{{0}, {0, 1}, {0, 2}, {0, 2}, {2, 4}}));
  const BlockSelection one = SelectBlocks(q.data(), k.data(), n, 1, 1, true);
  EXPECT_EQ(one.blocks, (std::vector<std::vector<int32_t>>{{0}, {1}, {2}, {3}, {4}}));
  EXPECT_DOUBLE_EQ(free.scores[4][4], 4);
}

TEST(Oracle, BlocksAreKeptForTheShareThatARowGivesThem) {
  const int64_t n = 6 * 64 + 1;  // the last row block has one row, and no representatives
  const std::vector<float> q(n, 1);
  std::vector<float> k(n, 0);
  k[100] = 4;  // block 1
  const RepresentativeChoice choice = ChooseRepresentatives(k.data(), n, 1, 2);
  EXPECT_EQ(choice.means, (std::vector<double>{0, 0.0625, 0, 0, 0, 0}));
  EXPECT_EQ(choice.outliers[1], (std::vector<int32_t>{100, 64}));  // of the keys left all are as far
  EXPECT_DOUBLE_EQ(choice.distances[100], 3.9375);

  const ShareSelection by_outlier = SelectByShare(q.data(), k.data(), n, 1, 1, {1, 0.9});
  EXPECT_DOUBLE_EQ(by_outlier.shares[6][1], std::exp(4) / (std::exp(4) + 5));  // 0.916
  EXPECT_DOUBLE_EQ(by_outlier.shares[6][5], 1 / (std::exp(4) + 5));
  EXPECT_EQ(
      by_outlier.blocks,
      (std::vector<std::vector<int32_t>>{
          {0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4, 5}, {0, 1, 3, 4, 5, 6}}));
  const ShareSelection above = SelectByShare(q.data(), k.data(), n, 1, 1, {1, 0.92});
  EXPECT_EQ(above.blocks[6], (std::vector<int32_t>{0, 3, 4, 5, 6}));
  const ShareSelection by_mean = SelectByShare(q.data(), k.data(), n, 1, 1, {0, 0.9});
  EXPECT_DOUBLE_EQ(by_mean.shares[6][1], std::exp(0.0625) / (std::exp(0.0625) + 5));
  EXPECT_EQ(by_mean.blocks[6], (std::vector<int32_t>{0, 3, 4, 5, 6}));
}

TEST(Oracle, SampledKeysStandForTheirNeighboursAndOwnKeysForThemselves) {
  const int64_t n = 6 * 64 + 1;
  const std::vector<float> q(n, 1);
  std::vector<float> k(n, 0);
  k[100] = 4;  // key 36 of block 1: the fifth of 8 samples, between two of 16
  const double key = std::exp(4);
  const auto shares = [&](int64_t outliers, int64_t samples) {
    return SelectByShare(q.data(), k.data(), n, 1, 1, {outliers, 0.15, samples}).shares;
  };
  EXPECT_NEAR(shares(0, 16)[6][1], 4 / (6 * 4 + 1.0), 1e-12);  // row 384 has one key of its own
  EXPECT_NEAR(shares(0, 16)[5][1], 4 / (5 * 4 + 1.0), 1e-12);  // as the first row of each block
  EXPECT_NEAR(shares(1, 16)[6][1], key / (key + 5 * 4 + 1), 1e-12);
  EXPECT_NEAR(shares(0, 8)[6][1], 8 * key / (8 * key + 5 * 8 + 1), 1e-12);
  EXPECT_NEAR(shares(1, 8)[6][2], 8 / (8 * key + 5 * 8 + 1), 1e-12);
  k[320] = 10;  // the first own key of every row of block 5
  EXPECT_NEAR(shares(0, 16)[5][1], 4 / (5 * 4 + std::exp(10)), 1e-12);
}

TEST(Oracle, CoarseBlocksStandForTheMeanAndForWhatIsFarthestFromAllChosen) {
  const std::vector<double> rows = {0, 1, 2,  3, 4, 5, 6, 7, 50,   // means; the ninth is in no coarse block
                                    0, 1, 10, 3, 4, 5, 6, 7, 50};  // outliers
  EXPECT_EQ(ChooseCoarse(rows, 2, 0, 9, 1, 3), (std::vector<double>{3.5, 10, 0, 7}));
  EXPECT_EQ(ChooseCoarse(rows, 1, 0, 9, 1, 2), (std::vector<double>{3.5, 0, 7}));  // both 3.5 from the mean
  // Two samples each: the fifth and the thirteenth of all are those of blocks 2 and 6.
  EXPECT_EQ(ChooseCoarse(rows, 2, 2, 9, 1, 2), (std::vector<double>{2, 6, 10, 0}));
  EXPECT_TRUE(ChooseCoarse({1, 2, 3, 4, 5, 6, 7}, 1, 0, 7, 1, 3).empty());
}

TEST(Oracle, TwoLevelsLeaveOutBlocksOfACoarseBlockThatNoRowWants) {
  const int64_t n = 18 * 64 + 1;  // two coarse blocks and two key blocks before the last row
  const std::vector<float> q(n, 1);
  std::vector<float> k(n, 0);
  k[3 * 64 + 5] = 4;  // an outlier of block 3, and so of coarse block 0
  const double key = std::exp(4);
  const ShareSelection one_closed = SelectByShare(q.data(), k.data(), n, 1, 1, {1, 0.05, 0, 1});
  EXPECT_TRUE(one_closed.coarse_shares[7].empty());
  EXPECT_NEAR(one_closed.coarse_shares[8][0], 1, 1e-12);
  EXPECT_NEAR(one_closed.coarse_shares[18][0], key / (key + 1), 1e-12);
  EXPECT_NEAR(one_closed.coarse_shares[18][1], 1 / (key + 1), 1e-12);  // 0.018, less than half of 0.05
  EXPECT_NEAR(one_closed.shares[18][3], key / (key + 9), 1e-12);       // eight are closed
  EXPECT_NEAR(one_closed.shares[18][16], 1 / (key + 9), 1e-12);
  EXPECT_EQ(one_closed.shares[18][9], 0);
  EXPECT_EQ(one_closed.blocks[18], (std::vector<int32_t>{0, 3, 15, 16, 17, 18}));
  const ShareSelection all_open = SelectByShare(q.data(), k.data(), n, 1, 1, {1, 0.02, 0, 1});
  EXPECT_NEAR(all_open.shares[18][3], key / (key + 17), 1e-12);
  EXPECT_NEAR(all_open.shares[18][9], 1 / (key + 17), 1e-12);
}

TEST(Oracle, SamplesStandForTheKeysOfTheirLevelAndOwnKeysCountInBoth) {
  const int64_t n = 18 * 64 + 1;
  const std::vector<float> q(n, 1);
  std::vector<float> k(n, 0);
  k[18 * 64] = std::log(5.0F);  // the only key of row block 18
  const auto select = [&](double min_share) {
    return SelectByShare(q.data(), k.data(), n, 1, 1, {0, min_share, 8, 1});
  };
  const ShareSelection open = select(0.2);
  EXPECT_NEAR(open.coarse_shares[18][1], 64 / (2 * 64 + 5.0),
              1e-6);  // 8 samples of 64 keys, of which one counts
  EXPECT_NEAR(open.shares[18][9], 8 / (18 * 8 + 5.0), 1e-6);
  const ShareSelection closed = select(0.97);
  EXPECT_EQ(closed.shares[18][9], 0);
  EXPECT_NEAR(closed.shares[18][16], 8 / (2 * 64 + 5.0), 1e-6);  // more than 2 * 8 + 5
}

TEST(Oracle, SharesOfTwoLevelsAreOfTheLargerSum) {
  const int64_t n = 44 * 64 + 1;
  const std::vector<float> q(n, 1);
  const std::vector<float> k(n, 0);  // five coarse blocks of equal shares, all closed where tau is 1
  const ShareSelection selection = SelectByShare(q.data(), k.data(), n, 1, 1, {0, 1, 0, 1});
  EXPECT_NEAR(selection.coarse_shares[44][4], 0.2, 1e-12);
  EXPECT_EQ(selection.shares[44][39], 0);
  EXPECT_NEAR(selection.shares[44][40], 0.2, 1e-12);       // not a quarter
  EXPECT_NEAR(selection.shares[43][40], 0.2, 1e-12);       // not a third
  EXPECT_NEAR(selection.shares[15][10], 1 / 15.0, 1e-12);  // one coarse block is open
}

TEST(Oracle, Fp8RoundsQueriesAndWhatRepresentsABlockToFourBits) {
  const int64_t n = 6 * 64 + 1;
  const std::vector<float> q(n, 1.0625F);  // between 1 and 1.125, of which 1 is even
  std::vector<float> k(n, 0);
  k[100] = 2.9375F;           // an outlier of block 1: between 2.75 and 3, nearer to 3
  k[4 * 64 + 3] = 0x1.8p-8F;  // of block 4, by itself 1.5 times a power of two
  const auto score = [](double share_of_it, double share_of_0) { return std::log(share_of_it / share_of_0); };
  const auto exact = SelectByShare(q.data(), k.data(), n, 1, 1, {1, 0.5}).shares[6];
  EXPECT_NEAR(score(exact[1], exact[5]), 1.0625 * 2.9375, 1e-12);
  const auto rounded = SelectByShare(q.data(), k.data(), n, 1, 1, {1, 0.5, 0, 0, true}).shares[6];
  EXPECT_NEAR(score(rounded[1], rounded[5]), 3, 1e-12);
  EXPECT_NEAR(score(rounded[4], rounded[5]), 0x1.8p-8, 1e-12);
}

// The largest element of what is rounded together decides about the spacing of small ones.
TEST(Oracle, Fp8HasOnePowerOfTwoForTheQueriesAndForTheKeysOfABlock) {
  const int64_t n = 6 * 64 + 3, dim = 2;
  std::vector<float> q(n * dim, 0), k(n * dim, 0);
  const auto shares = [&](int64_t samples) {
    return SelectByShare(q.data(), k.data(), n, dim, 1, {0, 0.5, samples, 0, true}).shares[6];
  };
  const auto set = [&](std::vector<float>* x, int64_t row, std::vector<float> values) {
    std::ranges::copy(values, x->begin() + row * dim);
  };
  // 2^-17 beside 1 is half a step, 1.5 * 2^-17 three quarters of one.
  for (int64_t key = 64; key < 128; ++key) set(&k, key, {0, 0x1p17F});
  for (const auto& [small, score] : {std::pair{0x1p-17F, 0.0}, {0x1.8p-17F, 2.0}}) {
    for (int64_t row = 6 * 64; row < n; ++row) set(&q, row, {1, small});
    EXPECT_NEAR(shares(0)[1], std::exp(score) / (std::exp(score) + 5), 1e-12);
  }
  // The last query's large element leaves all others steps of 1/2.
  for (int64_t row = 6 * 64; row < n; ++row) set(&q, row, {0.375F, 0});
  set(&q, n - 1, {0.375F, 0x1p15F});
  std::ranges::fill(k, 0.0F);
  for (int64_t key = 64; key < 128; ++key) set(&k, key, {8, 0});
  EXPECT_NEAR(shares(0)[1], std::exp(4) / (std::exp(4) + 5), 1e-12);
  // Of the last row block, whose second key, behind its first row, has the large element.
  std::ranges::fill(k, 0.0F);
  for (int64_t row = 6 * 64; row < n; ++row) set(&q, row, {16, 0});
  set(&k, 6 * 64, {0.375F, 0});
  EXPECT_NEAR(shares(1)[1], 64 / (6 * 64 + std::exp(6)), 1e-12);
  set(&k, 6 * 64 + 1, {0, 0x1p15F});
  EXPECT_NEAR(shares(1)[1], 64 / (6 * 64 + std::exp(8)), 1e-12);
}

TEST(Oracle, AttentionIsTheMeanOfTheCoveredValuesForEqualScores) {
  const std::vector<float> q(2 * 3, 0);    // 2 query heads, 3 queries, head_dim 1
  const std::vector<float> k = {5, 6, 7};  // 1 KV head
  const std::vector<float> v = {1, 2, 6};
  Mask causal = DenseMask(3);
  Mask sparse(3, 3);  // row 0 covers nothing
  sparse.Set(1, 1);
  sparse.Set(2, 0);
  sparse.Set(2, 2);
  const Mask* masks[] = {&causal, &sparse};
  const AttentionInput input{q.data(), k.data(), v.data(), 2, 1, 3, 3, 1, 1.0};
  const AttentionOutput<double> exact = Attention(input, masks);
  const std::vector<double> out = {1, 1.5, 3, 0, 2, 3.5};
  const std::vector<double> lse = {0, std::log(2.0), std::log(3.0), -std::numeric_limits<double>::infinity(),
                                   0, std::log(2.0)};
  const AttentionOutput<float> naive = NaiveFloatAttention(input, masks);
  for (size_t i = 0; i < out.size(); ++i) {
    EXPECT_DOUBLE_EQ(exact.out[i], out[i]) << i;
    EXPECT_DOUBLE_EQ(exact.lse[i], lse[i]) << i;
    EXPECT_FLOAT_EQ(naive.out[i], static_cast<float>(out[i])) << i;
    EXPECT_FLOAT_EQ(naive.lse[i], static_cast<float>(lse[i])) << i;
  }
}

TEST(Oracle, AttentionWeighsByTheExponentOfTheScaledProduct) {
  const std::vector<float> q = {2, 0};
  const std::vector<float> k = {0, 1, 3, 7};  // two keys, head_dim 2: products 0 and 6
  const std::vector<float> v = {1, 0, 0, 1};
  Mask mask(1, 2);
  mask.Set(0, 0);
  mask.Set(0, 1);
  const Mask* masks[] = {&mask};
  const AttentionOutput<double> got = Attention({q.data(), k.data(), v.data(), 1, 1, 1, 2, 2, 0.5}, masks);
  EXPECT_NEAR(got.out[0], 1 / (1 + std::exp(3.0)), 1e-15);
  EXPECT_NEAR(got.out[1], 1 / (1 + std::exp(-3.0)), 1e-15);
  EXPECT_NEAR(got.lse[0], std::log(1 + std::exp(3.0)), 1e-14);
}

TEST(Oracle, RotaryTurnsPairsOfBothForms) {
  const std::vector<float> x = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};  // 1 row, 2 heads, head_dim 5
  const std::vector<double> inv_freq = {std::numbers::pi / 2, std::numbers::pi};
  const std::vector<int64_t> position = {1};
  RotaryInput input{x.data(), inv_freq, position, 2.0, RotaryPairs::kHalfSplit, 2, 5};
  const std::vector<double> split = {-6, -4, 2, -8, 5, -16, -14, 12, -18, 10};
  const std::vector<double> interleaved = {-4, 2, -6, -8, 5, -14, 12, -16, -18, 10};
  const std::vector<double> got_split = Rotary(input);
  input.pairs = RotaryPairs::kInterleaved;
  const std::vector<double> got_interleaved = Rotary(input);
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_NEAR(got_split[i], split[i], 4e-6) << i;  // pi in fp32 is off by 9e-8
    EXPECT_NEAR(got_interleaved[i], interleaved[i], 4e-6) << i;
  }
}

TEST(Oracle, RotaryRoundsAnglesAsDecodersDo) {
  const std::vector<float> x = {1, 0};
  const std::vector<double> inv_freq = {static_cast<double>(0.7F)};  // 11744051 / 2^24
  const std::vector<int64_t> position = {1048575};
  const std::vector<double> got = Rotary({x.data(), inv_freq, position, 1.0, RotaryPairs::kHalfSplit, 1, 2});
  // The product is 734002.4875.. and floats lie 1/16 apart there.
  EXPECT_NEAR(got[0], std::cos(734002.5), 1e-12);
  EXPECT_NEAR(got[1], std::sin(734002.5), 1e-12);
}

TEST(Oracle, LayerPartsAreTheWorkedOnes) {
  const std::vector<float> x = {3, 4, 0, 0};
  const std::vector<float> weight = {1, 2, 3, 4};
  const std::vector<double> normed = RmsNorm(x.data(), weight.data(), 0, 1, 4);
  EXPECT_DOUBLE_EQ(normed[0], 3 / 2.5);
  EXPECT_DOUBLE_EQ(normed[1], 8 / 2.5);
  const std::vector<float> bias = {0.5f};
  EXPECT_EQ(Gemm(x.data(), weight.data(), bias.data(), 1, 4, 1), std::vector<double>{11.5});
  EXPECT_EQ(Gemm(x.data(), weight.data(), nullptr, 2, 2, 2), (std::vector<double>{11, 25, 0, 0}));
  const std::vector<int32_t> ids = {1, 0};
  EXPECT_EQ(Embed(ids, weight.data(), 2), (std::vector<double>{3, 4, 1, 2}));
  const float a[] = {0, 1, 40};
  const float b[] = {5, 2, 0.5f};
  const std::vector<double> silu = GatedActivation(a, b, Gate::kSilu, 3);
  EXPECT_DOUBLE_EQ(silu[0], 0);
  EXPECT_DOUBLE_EQ(silu[1], 2 / (1 + std::exp(-1.0)));
  EXPECT_DOUBLE_EQ(silu[2], 20);
  const std::vector<double> gelu = GatedActivation(a, b, Gate::kGeluTanh, 3);
  EXPECT_NEAR(gelu[1], 2 * 0.8411919906082768, 1e-12);
  EXPECT_DOUBLE_EQ(gelu[2], 20);
}

}  // namespace
}  // namespace longfill::oracle
