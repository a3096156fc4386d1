#include "deploy/cli/attention_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/base/random_weights.h"
#include "kernels/cpu/oracle/oracle.h"
#include "kernels/sparse/sparse_index.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::SizeIs;

constexpr int64_t kTokens = 300;
constexpr int64_t kDim = 24;
constexpr double kScale = 0.3;

std::vector<float> RandomFloats(int64_t count, uint64_t seed) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const float value = random_weights::Element(random_weights::Start(seed), i, 1);
    values[i] = BFloat16ToFloat(FloatToBFloat16(value));
  }
  return values;
}

class ComputeRows : public ::testing::Test {
 protected:
  RowAnswer Row(const SparseIndex& index, int64_t row, DType dtype = DType::kFloat32) const {
    const PackedIndices packed({&index, 1});
    return ComputeRow({.q = q_.data() + row * kDim,
                       .k = k_.data(),
                       .v = v_.data(),
                       .head_dim = kDim,
                       .num_tokens = kTokens,
                       .row = row,
                       .index = packed.Views(packed.data())[0],
                       .scale = kScale,
                       .dtype = dtype});
  }
  // Every row against the oracle.
  void ExpectRight(const SparseIndex& index, const oracle::Mask& mask) const {
    const oracle::Mask* const masks[] = {&mask};
    const oracle::AttentionOutput<double> want = oracle::Attention({.q = q_.data(),
                                                                    .k = k_.data(),
                                                                    .v = v_.data(),
                                                                    .num_q_heads = 1,
                                                                    .num_kv_heads = 1,
                                                                    .num_queries = kTokens,
                                                                    .num_keys = kTokens,
                                                                    .head_dim = kDim,
                                                                    .scale = kScale},
                                                                   masks);
    for (int64_t row = 0; row < kTokens; ++row) {
      const RowAnswer got = Row(index, row);
      EXPECT_EQ(std::isfinite(got.lse), std::isfinite(want.lse[row])) << "row " << row;
      if (std::isfinite(want.lse[row])) {
        EXPECT_NEAR(got.lse, want.lse[row], 1e-12) << "row " << row;
      }
      for (int64_t i = 0; i < kDim; ++i) {
        EXPECT_NEAR(got.out[i], want.out[row * kDim + i], 1e-12) << "row " << row << ", " << i;
        EXPECT_NEAR(got.naive[i], want.out[row * kDim + i], 1e-5) << "row " << row << ", " << i;
      }
    }
  }

  const std::vector<float> q_ = RandomFloats(kTokens * kDim, 1);
  const std::vector<float> k_ = RandomFloats(kTokens * kDim, 2);
  const std::vector<float> v_ = RandomFloats(kTokens * kDim, 3);
};

TEST_F(ComputeRows, AreTheDefinition) {
  const std::vector<int32_t> columns = {0, 5, 77, 200};
  const std::vector<int32_t> distances = {0, 3, 90, 250};
  ExpectRight(MakeDenseIndex(), oracle::DenseMask(kTokens));
  ExpectRight(MakeAShapeIndex({7, 70}, kTokens), oracle::AShapeMask({7, 70}, kTokens));
  ExpectRight(MakeVerticalSlashIndex(columns, distances, Coverage::kTiles),
              oracle::TilesMask(columns, distances, kTokens));
  ExpectRight(MakeVerticalSlashIndex(columns, distances, Coverage::kParity),
              oracle::ParityMask(columns, distances, kTokens));
}

TEST_F(ComputeRows, WithoutKeysAreZero) {
  const BlockListIndex index{.row_offsets = {0, 1, 1, 2, 2, 2}, .key_blocks = {0, 1}};
  ExpectRight(index, oracle::BlockMask({{0}, {}, {1}, {}, {}}, kTokens));
}

TEST_F(ComputeRows, OfABackendsPrecisionErrByWhatItRoundsAway) {
  double largest = 0;
  for (int64_t row = 0; row < kTokens; ++row) {
    const RowAnswer answer = Row(MakeDenseIndex(), row, DType::kBFloat16);
    largest = std::max(largest, RelativeError(answer.naive, answer.out));
  }
  EXPECT_GT(largest, 1e-3);
  EXPECT_LT(largest, 1e-2);
}

TEST(SampledRows, HoldEdgesAndAsManyAsWanted) {
  const std::vector<int64_t> rows = SampleRows(10000, 64, 5);
  EXPECT_THAT(rows, SizeIs(64));
  for (const int64_t edge : {0, 63, 64, 127, 128, 9983, 9984, 9999}) EXPECT_THAT(rows, Contains(edge));
  EXPECT_TRUE(std::is_sorted(rows.begin(), rows.end()));
  EXPECT_THAT(SampleRows(3, 64, 5), ElementsAre(0, 1, 2));
  EXPECT_THAT(SampleRows(10000, 1, 5), SizeIs(1));
}

TEST(RelativeErrors, AreThoseOfTheRow) {
  EXPECT_EQ(RelativeError(std::vector<float>{0, 0}, std::vector<double>{0, 0}), 0);
  EXPECT_DOUBLE_EQ(RelativeError(std::vector<float>{3, 5}, std::vector<double>{3, 4}), 0.2);
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(RelativeError(std::vector<float>{1, 0}, std::vector<double>{0, 0}), kInfinity);
  EXPECT_EQ(RelativeError(std::vector<float>{std::nanf(""), 4}, std::vector<double>{3, 4}), kInfinity);
}

}  // namespace
}  // namespace longfill
