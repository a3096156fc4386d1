// Selection by share with scores in fp8 (head_pattern.h, BlockShare): what is rounded, and with which power
// of two.

#include <algorithm>
#include <cmath>

#include "tests/contract/share_fixture.h"

namespace longfill {
namespace {

// Nine blocks of rows and of keys, all zeros at first.
class Fp8ShareTest : public ShareFixture {
 protected:
  static constexpr int64_t kDim = 64, kBlocks = 8, kTokens = (kBlocks + 1) * kRowBlock, kBlock = 2;

  // Queries of row block 8, which are all the same, and keys of blocks.
  void SetQuery(int64_t element, float value) {
    for (int64_t row = kBlocks * kRowBlock; row < kTokens; ++row) q_[row * kDim + element] = value;
  }
  void SetKeys(int64_t first, int64_t end, int64_t element, float value) {
    for (int64_t key = first; key < end; ++key) k_[key * kDim + element] = value;
  }
  void SetBlock(int64_t element, float value) {
    SetKeys(kBlock * kRowBlock, (kBlock + 1) * kRowBlock, element, value);
  }
  // Of row block 8 for block 2. Rounding of shares alone moves them by less.
  void ExpectShare(const Kind& kind, double share) {
    const Buffer representatives = Represent(k_, 1, kTokens, kDim, kind.outliers, kind.samples);
    const Buffer coarse = RepresentCoarse(representatives, kind, kBlocks + 1, kDim);
    const auto keeps = [&](double min_share) {
      return IsSet(Select(q_, representatives,
                          {.rows = kTokens,
                           .dim = kDim,
                           .num_representatives = kind.num_representatives(),
                           .num_key_blocks = kBlocks + 1,
                           .min_share = {static_cast<float>(min_share)},
                           .num_samples = kind.samples,
                           .own_k = k_,
                           .coarse = &coarse,
                           .num_coarse = kind.coarse,
                           .fp8 = kind.fp8})[0][kBlocks],
                   kBlock);
    };
    EXPECT_TRUE(keeps(share * 0.99)) << "fp8 " << kind.fp8 << ", share " << share;
    EXPECT_FALSE(keeps(share * 1.01)) << "fp8 " << kind.fp8 << ", share " << share;
  }
  // The share of a score among seven scores of 0.
  static double ShareOf(double score) { return std::exp(score) / (std::exp(score) + kBlocks - 1); }

  std::vector<float> q_ = std::vector<float>(kTokens * kDim, 0.0F), k_ = q_;
};
LF_INSTANTIATE_BACKENDS(Fp8ShareTest);

// Between two neighbours of E4M3 to the even one.
TEST_P(Fp8ShareTest, RoundsQueriesToNearestEven) {
  for (const auto& [value, rounded] : {std::pair{1.0625F, 1.0}, {1.1875F, 1.25}, {-1.1875F, -1.25}}) {
    SetQuery(3, value);
    SetBlock(3, std::copysign(2.0F, value));
    ExpectShare({}, ShareOf(2 * std::abs(value)));
    ExpectShare({.fp8 = true}, ShareOf(2 * std::abs(rounded)));
  }
}

TEST_P(Fp8ShareTest, RoundsRepresentativesToNearestEven) {
  SetQuery(3, 1);
  for (const auto& [value, rounded] : {std::pair{2.125F, 2.0}, {2.375F, 2.5}}) {
    SetBlock(3, value);
    ExpectShare({.outliers = 1}, ShareOf(value));
    ExpectShare({.outliers = 1, .fp8 = true}, ShareOf(rounded));
  }
}

// 2^-17 is half the least step beside 1.
TEST_P(Fp8ShareTest, SmallElementsHaveTheSpacingOfSubnormalNumbers) {
  SetQuery(0, 1);  // nothing of a key
  for (int64_t i = 1; i <= 4; ++i) SetBlock(i, 0x1p15F);
  for (const auto& [value, rounded] : {std::pair{0x1p-17F, 0.0}, {0x1.8p-17F, 0x1p-16}}) {
    for (int64_t i = 1; i <= 4; ++i) SetQuery(i, value);
    ExpectShare({}, ShareOf(4 * value * 0x1p15));
    ExpectShare({.fp8 = true}, ShareOf(4 * rounded * 0x1p15));
  }
}

// One of the keys, an outlier, has a large element, so that small ones of the mean have coarse steps as well.
TEST_P(Fp8ShareTest, WhatRepresentsABlockHasOnePowerOfTwo) {
  SetQuery(0, 4);
  SetBlock(0, 0.625F);
  SetKeys(kBlock * kRowBlock + 5, kBlock * kRowBlock + 6, 1, 0x1p15F);
  ExpectShare({.outliers = 1}, ShareOf(2.5));
  ExpectShare({.outliers = 1, .fp8 = true}, ShareOf(2));  // steps of 1/2
}

// Its last row has a large element.
TEST_P(Fp8ShareTest, QueriesOfARowBlockHaveOnePowerOfTwo) {
  SetQuery(0, 0.375F);
  q_[(kTokens - 1) * kDim + 1] = 0x1p15F;
  SetBlock(0, 8);
  ExpectShare({}, ShareOf(3));
  ExpectShare({.fp8 = true}, ShareOf(4));  // steps of 1/2
}

// Zeros have a power of two as well, with which what is added for samples stays what it is.
TEST_P(Fp8ShareTest, ZerosAreBlocksLikeOthers) {
  for (const float query : {0.0F, 0x1p-20F, 0.25F, 100.0F}) {
    for (const float key : {0.0F, 0.25F}) {
      SetQuery(0, query);
      SetKeys(0, kTokens, 1, key);  // which no query asks for
      for (const int64_t coarse : {0, 1}) {
        ExpectShare({.samples = 1, .coarse = coarse, .fp8 = true}, 64.0 / (64 * kBlocks + 1));
      }
    }
  }
}

// The last key of a row block, which its first row does not see, has a large element.
TEST_P(Fp8ShareTest, KeysOfARowBlockHaveOnePowerOfTwo) {
  SetQuery(0, 16);
  const int64_t first = kBlocks * kRowBlock;
  SetKeys(first, first + 1, 0, 0.375F);
  SetKeys(kTokens - 1, kTokens, 1, 0x1p15F);
  const double others = 64 * kBlocks;  // each block by its one sample
  ExpectShare({.samples = 1}, 64 / (others + std::exp(6)));
  ExpectShare({.samples = 1, .fp8 = true}, 64 / (others + std::exp(8)));
}

// Key blocks from very small to very large ones, with smaller ones among them, and queries to which those
// some blocks before them matter.
TEST_P(Fp8ShareTest, AgreesWithTheOracleOnKeysOfEveryMagnitude) {
  const int64_t blocks = 80, tokens = blocks * kRowBlock, nearest = kForcedNearestBlocks;
  const int most = compute_dtype() == DType::kFloat16 ? 12 : 20;
  const auto exponent_of = [&](int64_t block) { return static_cast<int>(block * 2 * most / blocks) - most; };
  std::vector<float> q = AgreeingQueries(1, tokens, kDim, 90);
  std::vector<float> k = NormalFloats(tokens * kDim, 92);
  for (int64_t i = 0; i < tokens * kDim; ++i) {
    const int64_t block = i / kDim / kRowBlock;
    q[i] = std::ldexp(q[i], -exponent_of(std::max<int64_t>(0, block - nearest)));
    k[i] = std::ldexp(k[i], exponent_of(block) - (block % 3 == 0 ? 8 : 0));
  }
  Decisions one_level, two_levels;
  for (Kind kind : {Kind{.outliers = 4}, {.outliers = 4, .samples = 4}}) {
    kind.fp8 = true;
    CompareWithOracle(Rounded(q), Rounded(k), tokens, kDim, kind, 0.3F, {0.002F}, &one_level);
    kind.coarse = 8;
    CompareWithOracle(Rounded(q), Rounded(k), tokens, kDim, kind, 0.3F, {0.002F}, &two_levels);
  }
  for (const Decisions& each : {one_level, two_levels}) {
    EXPECT_GT(each.kept, 200);
    EXPECT_GT(each.dropped, 200);
  }
}

}  // namespace
}  // namespace longfill
