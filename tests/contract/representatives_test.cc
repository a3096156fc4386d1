#include <algorithm>
#include <array>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/oracle/oracle.h"
#include "tests/contract/share_fixture.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

class RepresentativesTest : public ShareFixture {};
LF_INSTANTIATE_BACKENDS(RepresentativesTest);

TEST_P(RepresentativesTest, AreTheMeanAndTheFarthestKeys) {
  for (const int64_t keys : {0, 1, 63, 64, 65, 127, 128, 129, 331}) {
    for (const int64_t dim : {64, 96, 128, 256}) {
      for (const int64_t outliers : {0, 1, 4, 16}) {
        SCOPED_TRACE(testing::Message() << keys << " keys of " << dim << ", " << outliers << " outliers");
        const int64_t heads = 3, blocks = keys / kRowBlock;
        const std::vector<float> k = Rounded(NormalFloats(heads * keys * dim, 21));
        const Buffer out = Represent(k, heads, keys, dim, outliers);
        const std::vector<float> got = DownloadCompute(out.data(), heads * (outliers + 1) * blocks * dim);
        for (int64_t h = 0; h < heads; ++h) {
          const float* of_head = k.data() + h * keys * dim;
          const auto want = oracle::ChooseRepresentatives(of_head, keys, dim, outliers);
          const float* planes = got.data() + h * (outliers + 1) * blocks * dim;
          for (int64_t i = 0; i < blocks * dim; ++i) {
            ASSERT_NEAR(planes[i], want.means[i], 2 * epsilon() * std::abs(want.means[i]) + 1e-6);
          }
          for (int64_t b = 0; b < blocks; ++b) {
            std::vector<int64_t> chosen;
            for (int64_t r = 0; r < outliers; ++r) {
              const float* row = planes + ((r + 1) * blocks + b) * dim;
              int64_t key = b * kRowBlock;
              while (key < (b + 1) * kRowBlock && !std::equal(row, row + dim, of_head + key * dim)) ++key;
              ASSERT_LT(key, (b + 1) * kRowBlock) << "not a key of block " << b;
              // The r-th farthest, up to rounding of distances.
              EXPECT_NEAR(want.distances[key], want.distances[want.outliers[b][r]], 1e-4);
              chosen.push_back(key);
            }
            std::sort(chosen.begin(), chosen.end());
            EXPECT_EQ(std::unique(chosen.begin(), chosen.end()), chosen.end()) << "a key twice";
          }
        }
      }
    }
  }
}

TEST_P(RepresentativesTest, SampledKeysStandInPlaceOfTheMean) {
  const int64_t keys = 331, dim = 64, heads = 2, blocks = keys / kRowBlock;
  const std::vector<float> k = Rounded(NormalFloats(heads * keys * dim, 40));
  const Buffer by_mean = Represent(k, heads, keys, dim, 3);
  const std::vector<float> with_mean = DownloadCompute(by_mean.data(), heads * 4 * blocks * dim);
  for (const int64_t samples : {1, 2, 4, 8, 16}) {
    const int64_t outliers = samples == 16 ? 0 : 3;
    const int64_t planes = samples + outliers;
    const Buffer out = Represent(k, heads, keys, dim, outliers, samples);
    const std::vector<float> got = DownloadCompute(out.data(), heads * planes * blocks * dim);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t plane = 0; plane < planes; ++plane) {
        for (int64_t b = 0; b < blocks; ++b) {
          const float* row = got.data() + ((h * planes + plane) * blocks + b) * dim;
          const int64_t key = b * 64 + 64 / samples * plane + 32 / samples;
          const float* want = plane < samples
                                  ? k.data() + (h * keys + key) * dim
                                  : with_mean.data() + ((h * 4 + 1 + plane - samples) * blocks + b) * dim;
          EXPECT_TRUE(std::equal(row, row + dim, want))
              << samples << " samples, head " << h << ", plane " << plane << ", block " << b;
        }
      }
    }
  }
}

TEST_P(RepresentativesTest, OfKeysAtTheSameDistanceTheLowerIsFarther) {
  const int64_t dim = 64, outliers = 16;
  std::vector<float> k(kRowBlock * dim, 0.0F);  // pairs of opposite axes: mean 0, all at distance 2
  for (int64_t key = 0; key < kRowBlock; ++key) k[key * dim + key / 2] = key % 2 == 0 ? 2.0F : -2.0F;
  const Buffer out = Represent(k, 1, kRowBlock, dim, outliers);
  const std::vector<float> got = DownloadCompute(out.data(), (outliers + 1) * dim);
  EXPECT_EQ(std::vector<float>(got.begin(), got.begin() + dim), std::vector<float>(dim, 0.0F));
  EXPECT_EQ(std::vector<float>(got.begin() + dim, got.end()),
            std::vector<float>(k.begin(), k.begin() + outliers * dim));
}

// Up to rounding of distances; what follows a choice of which the oracle made another is not compared.
TEST_P(RepresentativesTest, OfCoarseBlocksAreTheMeanOrSamplesAndInTurnTheFarthest) {
  for (const int64_t blocks : {0, 7, 8, 9, 17, 40}) {
    for (const int64_t dim : {64, 96, 128, 256}) {
      for (const auto& [count, num_samples, num_coarse] : {std::array{1, 0, 1},
                                                           {1, 0, 8},
                                                           {2, 0, 16},
                                                           {5, 0, 4},
                                                           {1, 1, 1},
                                                           {16, 1, 15},
                                                           {3, 2, 14},
                                                           {5, 4, 8},
                                                           {16, 8, 8},
                                                           {12, 4, 12},
                                                           {17, 0, 16}}) {
        const int64_t coarse_blocks = blocks / kCoarseBlocks;
        const std::vector<float> rows = Rounded(NormalFloats(count * blocks * dim, 41));
        const std::vector<double> in_fp64(rows.begin(), rows.end());
        const Buffer out = RepresentCoarse(UploadCompute(rows), count, blocks, dim, num_coarse, num_samples);
        const int64_t planes = NumRepresentatives(num_samples, num_coarse);
        const std::vector<float> got = DownloadCompute(out.data(), planes * coarse_blocks * dim);
        const std::vector<double> want =
            oracle::ChooseCoarse(in_fp64, count, num_samples, blocks, dim, num_coarse);
        ASSERT_EQ(got.size(), want.size());
        const auto at = [&](const auto& rows_of, int64_t plane, int64_t c) {
          return rows_of.data() + (plane * coarse_blocks + c) * dim;
        };
        for (int64_t c = 0; c < coarse_blocks; ++c) {
          SCOPED_TRACE(testing::Message()
                       << blocks << " blocks of " << dim << ", " << count << " planes, " << num_samples
                       << " of samples, " << num_coarse << " chosen, coarse block " << c);
          const int64_t given = planes - num_coarse;  // the mean, or samples
          for (int64_t plane = 0; plane < given; ++plane) {
            for (int64_t i = 0; i < dim; ++i) {
              const double value = at(want, plane, c)[i];
              const double tolerance = num_samples == 0 ? 2 * epsilon() * std::abs(value) + 1e-6 : 0;
              ASSERT_NEAR(at(got, plane, c)[i], value, tolerance) << "plane " << plane;
            }
          }
          const auto nearest = [&](const auto* row, int64_t plane) {  // of those before the plane
            double squares = INFINITY;
            for (int64_t p = 0; p < plane; ++p) {
              double sum = 0;
              for (int64_t i = 0; i < dim; ++i) sum += std::pow(row[i] - at(want, p, c)[i], 2);
              squares = std::min(squares, sum);
            }
            return std::sqrt(squares);
          };
          for (int64_t plane = given; plane < planes; ++plane) {
            const float* row = at(got, plane, c);
            bool is_candidate = false;
            for (int64_t n = 0; n < count * kCoarseBlocks && !is_candidate; ++n) {
              const int64_t block = c * kCoarseBlocks + n % kCoarseBlocks;
              is_candidate =
                  std::equal(row, row + dim, rows.data() + (n / kCoarseBlocks * blocks + block) * dim);
            }
            ASSERT_TRUE(is_candidate) << "plane " << plane;
            if (std::equal(row, row + dim, at(want, plane, c))) continue;
            ASSERT_NEAR(nearest(row, plane), nearest(at(want, plane, c), plane), 1e-4) << "plane " << plane;
            break;
          }
        }
      }
    }
  }
}

TEST_P(RepresentativesTest, OfRepresentativesAtTheSameDistanceTheLowerPlaneAndBlockComesFirst) {
  const int64_t dim = 64, num_coarse = 16;
  std::vector<float> rows(2 * kCoarseBlocks * dim, 0.0F);  // opposite axes, of which any two are as far
  for (int64_t n = 0; n < 2 * kCoarseBlocks; ++n) rows[n * dim + n / 2] = n % 2 == 0 ? 2.0F : -2.0F;
  const auto choose = [&](int64_t count) {
    const std::vector<float> planes(rows.begin(), rows.begin() + count * kCoarseBlocks * dim);
    const Buffer out = RepresentCoarse(UploadCompute(planes), count, kCoarseBlocks, dim, num_coarse);
    return DownloadCompute(out.data(), (num_coarse + 1) * dim);
  };
  std::vector<float> want(dim, 0.0F);  // the mean
  want.insert(want.end(), rows.begin(), rows.end());
  EXPECT_EQ(choose(2), want);
  for (int64_t n = kCoarseBlocks; n < num_coarse; ++n) {  // the first again, when all are chosen
    std::copy_n(rows.begin(), dim, want.begin() + (n + 1) * dim);
  }
  EXPECT_EQ(choose(1), want);

  // After a sample, which is of block 4, the axis opposite to it is the farthest, and then all are as far.
  const std::vector<float> plane(rows.begin(), rows.begin() + kCoarseBlocks * dim);
  const Buffer out = RepresentCoarse(UploadCompute(plane), 1, kCoarseBlocks, dim, 7, 1);
  want.clear();
  for (const int64_t n : {4, 5, 0, 1, 2, 3, 6, 7}) {
    want.insert(want.end(), rows.begin() + n * dim, rows.begin() + (n + 1) * dim);
  }
  EXPECT_EQ(DownloadCompute(out.data(), kCoarseBlocks * dim), want);
}

TEST_P(RepresentativesTest, NothingToDoIsLegal) {
  RepresentativesParams none;
  none.head_dim = 64;
  LF_EXPECT_OK(kernels().Representatives(none, stream()));
  CoarseRepresentativesParams no_coarse;
  no_coarse.num_representatives = no_coarse.num_coarse = 1;
  no_coarse.head_dim = 64;
  LF_EXPECT_OK(kernels().CoarseRepresentatives(no_coarse, stream()));
}

TEST_P(RepresentativesTest, SaysWhatIsWrong) {
  const Buffer data = UploadCompute(std::vector<float>(size_t{64} * 64, 0.0F));
  RepresentativesParams many;
  many.k = {data.data(), 0, 64};
  many.num_heads = 1;
  many.num_keys = 64;
  many.head_dim = 64;
  many.num_outliers = 17;
  EXPECT_THAT(kernels().Representatives(many, stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_outliers 17")));
  many.num_outliers = 4;
  for (const int64_t samples : {-1, 3, 16}) {
    many.num_samples = samples;
    EXPECT_THAT(
        kernels().Representatives(many, stream()),
        StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(absl::StrCat("num_samples ", samples))));
  }
}

TEST_P(RepresentativesTest, SaysWhatIsWrongWithCoarseBlocks) {
  const Buffer data = UploadCompute(std::vector<float>(size_t{17} * 8 * 64, 0.0F));
  const Buffer out = ComputeArray(17 * 64);
  const auto expect = [&](absl::StatusCode code, const char* message, const auto& change) {
    CoarseRepresentativesParams bad;
    bad.representatives = data.data();
    bad.num_representatives = 5;
    bad.num_key_blocks = 8;
    bad.head_dim = 64;
    bad.num_coarse = 4;
    bad.out = out.data();
    LF_EXPECT_OK(kernels().CoarseRepresentatives(bad, stream()));
    change(bad);
    EXPECT_THAT(kernels().CoarseRepresentatives(bad, stream()), StatusIs(code, HasSubstr(message)));
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  using Params = CoarseRepresentativesParams;
  expect(kInvalid, "num_coarse 0", [](Params& p) { p.num_coarse = 0; });
  expect(kInvalid, "num_coarse 17", [](Params& p) { p.num_coarse = 17; });
  expect(kInvalid, "num_representatives 0", [](Params& p) { p.num_representatives = 0; });
  expect(kInvalid, "num_representatives 18", [](Params& p) { p.num_representatives = 18; });
  expect(kInvalid, "num_samples 3", [](Params& p) { p.num_samples = 3; });
  expect(kInvalid, "num_coarse 13 is not in [0, 12]", [](Params& p) {
    p.num_samples = 4;
    p.num_coarse = 13;
  });
  expect(kInvalid, "num_representatives 5 is not in [8, 16]", [](Params& p) { p.num_samples = 8; });
  expect(kInvalid, "num_key_blocks -8", [](Params& p) { p.num_key_blocks = -8; });
  expect(absl::StatusCode::kUnimplemented, "head_dim 12", [](Params& p) { p.head_dim = 12; });
}

}  // namespace
}  // namespace longfill
