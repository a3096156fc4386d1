#include <cmath>
#include <string>
#include <vector>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/contract/backend_fixture.h"
#include "tests/contract/tolerance.h"

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Case {
  int64_t num_rows, in_width, out_width;
  bool bias = false, accumulate = false, float_out = false;
  int64_t x_gap = 0, out_gap = 0;  // elements between rows
};

class GemmTest : public BackendTest {
 protected:
  DType OutDType(const Case& c) { return c.float_out ? DType::kFloat32 : compute_dtype(); }
  std::vector<float> RoundedOut(const Case& c, const std::vector<float>& values) {
    return c.float_out ? values : Rounded(values);
  }
  double OutEpsilon(const Case& c) {
    if (!c.float_out) return epsilon();
    // Tensor cores cut sums off where others round them, after every eight products.
    const int64_t steps = c.in_width / 8 + 1;
    return on_gpu() ? 0x1p-23 * static_cast<double>(steps) : 0x1p-24;
  }

  Buffer UploadOut(const Case& c, const std::vector<float>& values) {
    return c.float_out ? Upload(values) : UploadCompute(values);
  }
  std::vector<float> DownloadOut(const Case& c, const Buffer& from, int64_t count) {
    return c.float_out ? Download<float>(from.data(), count) : DownloadCompute(from.data(), count);
  }
  Workspace GemmWorkspace(const Case& c) {
    return NewWorkspace(kernels().GemmWorkspaceBytes(c.num_rows, c.in_width, c.out_width));
  }
  void Check(const Case& c);
};
LF_INSTANTIATE_BACKENDS(GemmTest);

// [rows, width] with `gap` elements of `filler` after each row.
std::vector<float> Spread(const std::vector<float>& dense, int64_t rows, int64_t width, int64_t gap,
                          float filler) {
  std::vector<float> spread;
  for (int64_t r = 0; r < rows; ++r) {
    spread.insert(spread.end(), dense.begin() + r * width, dense.begin() + (r + 1) * width);
    spread.insert(spread.end(), static_cast<size_t>(gap), filler);
  }
  return spread;
}

// One product after the other in fp32, what there is already and the bias at the end.
std::vector<float> NaiveGemm(const Case& c, const std::vector<float>& x, const std::vector<float>& weight,
                             const std::vector<float>& bias, const std::vector<float>& before) {
  std::vector<float> out;
  for (int64_t r = 0; r < c.num_rows; ++r) {
    for (int64_t o = 0; o < c.out_width; ++o) {
      float sum = 0;
      for (int64_t i = 0; i < c.in_width; ++i) sum += x[r * c.in_width + i] * weight[o * c.in_width + i];
      if (c.accumulate) sum += before[r * c.out_width + o];
      if (c.bias) sum += bias[o];
      out.push_back(sum);
    }
  }
  return out;
}

void GemmTest::Check(const Case& c) {
  SCOPED_TRACE(testing::Message() << c.num_rows << " x " << c.in_width << " x " << c.out_width
                                  << (c.bias ? ", bias" : "") << (c.accumulate ? ", in place" : "")
                                  << (c.float_out ? ", fp32" : "") << ", gaps " << c.x_gap << " and "
                                  << c.out_gap);
  constexpr float kGap = 1e4F;
  const float spread = 1.0F / std::sqrt(static_cast<float>(c.in_width));
  const std::vector<float> x = Rounded(NormalFloats(c.num_rows * c.in_width, 1));
  const std::vector<float> weight = Rounded(NormalFloats(c.out_width * c.in_width, 2, spread));
  const std::vector<float> bias = Rounded(NormalFloats(c.out_width, 3));
  const std::vector<float> before = RoundedOut(c, NormalFloats(c.num_rows * c.out_width, 4));

  std::vector<double> want = oracle::Gemm(x.data(), weight.data(), c.bias ? bias.data() : nullptr, c.num_rows,
                                          c.in_width, c.out_width);
  if (c.accumulate) {
    for (size_t i = 0; i < want.size(); ++i) want[i] += before[i];
  }
  const std::vector<float> naive = RoundedOut(c, NaiveGemm(c, x, weight, bias, before));

  const Buffer x_device = UploadCompute(Spread(x, c.num_rows, c.in_width, c.x_gap, kGap));
  const Buffer weight_device = UploadCompute(weight);
  const Buffer bias_device = UploadCompute(bias);
  const Buffer out = UploadOut(c, Spread(before, c.num_rows, c.out_width, c.out_gap, kGap));
  const Workspace workspace = GemmWorkspace(c);
  GemmParams params;
  params.x = x_device.data();
  params.x_stride = c.in_width + c.x_gap;
  params.weight = weight_device.data();
  params.weight_dtype = compute_dtype();
  params.bias = c.bias ? bias_device.data() : nullptr;
  params.num_rows = c.num_rows;
  params.in_width = c.in_width;
  params.out_width = c.out_width;
  params.accumulate = c.accumulate;
  params.out = out.data();
  params.out_dtype = OutDType(c);
  params.out_stride = c.out_width + c.out_gap;
  LF_ASSERT_OK(kernels().Gemm(params, workspace, stream()));

  const std::vector<float> all = DownloadOut(c, out, c.num_rows * params.out_stride);
  const float gap = Rounded({kGap})[0];
  std::vector<float> got;
  for (int64_t r = 0; r < c.num_rows; ++r) {
    const auto row = all.begin() + r * params.out_stride;
    got.insert(got.end(), row, row + c.out_width);
    for (int64_t i = c.out_width; i < params.out_stride; ++i) {
      ASSERT_EQ(row[i], c.float_out ? kGap : gap) << "written between rows";
    }
  }
  EXPECT_TRUE(WithinTwiceNaive(got, want, naive, LargestMagnitude(want), OutEpsilon(c)));
}

TEST_P(GemmTest, MatchesTheOracleForOddAndEvenShapes) {
  const int64_t shapes[][3] = {{1, 1, 1},      {1, 64, 1000},   {3, 7, 5},       {17, 33, 65},
                               {2, 128, 8},    {16, 576, 1536}, {129, 1536, 96}, {64, 8, 8},
                               {300, 896, 64}, {1, 4864, 896},  {63, 100, 127},  {128, 256, 256}};
  for (const auto& [num_rows, in_width, out_width] : shapes) Check({num_rows, in_width, out_width});
}

TEST_P(GemmTest, AddsABiasAndWhatIsThereAlready) {
  for (const bool bias : {false, true}) {
    for (const bool accumulate : {false, true}) {
      for (const bool float_out : {false, true}) {
        Check({33, 64, 48, bias, accumulate, float_out});
        Check({1, 65, 47, bias, accumulate, float_out});
      }
    }
  }
}

TEST_P(GemmTest, RowsMayLieApart) {
  Check({.num_rows = 20, .in_width = 64, .out_width = 40, .x_gap = 64, .out_gap = 8});
  Check({.num_rows = 9, .in_width = 30, .out_width = 21, .bias = true, .x_gap = 3, .out_gap = 5});
  Check({.num_rows = 9, .in_width = 32, .out_width = 24, .accumulate = true, .x_gap = 1, .out_gap = 1});
  Check({.num_rows = 5, .in_width = 64, .out_width = 33, .bias = true, .float_out = true, .out_gap = 7});
}

TEST_P(GemmTest, NothingToDoIsLegal) {
  for (const Case& c : {Case{0, 8, 8}, Case{5, 8, 0}}) {
    GemmParams params;
    params.x_stride = params.in_width = c.in_width;
    params.num_rows = c.num_rows;
    params.out_stride = params.out_width = c.out_width;
    params.weight_dtype = params.out_dtype = compute_dtype();
    LF_EXPECT_OK(kernels().Gemm(params, GemmWorkspace(c), stream()));
  }
}

TEST_P(GemmTest, EqualShapesGiveEqualBits) {
  constexpr int64_t kRows = 257, kIn = 4096, kOut = 640;
  const Buffer x = UploadCompute(NormalFloats(kRows * kIn, 1));
  const Buffer weight = UploadCompute(NormalFloats(kOut * kIn, 2));
  const Workspace workspace = GemmWorkspace({kRows, kIn, kOut});
  std::vector<std::vector<float>> results;
  for (int run = 0; run < 3; ++run) {
    const Buffer out = ComputeArray(kRows * kOut);
    GemmParams params;
    params.x = x.data();
    params.x_stride = kIn;
    params.weight = weight.data();
    params.weight_dtype = params.out_dtype = compute_dtype();
    params.num_rows = kRows;
    params.in_width = kIn;
    params.out_width = params.out_stride = kOut;
    params.out = out.data();
    LF_ASSERT_OK(kernels().Gemm(params, workspace, stream()));
    results.push_back(DownloadCompute(out.data(), kRows * kOut));
  }
  EXPECT_EQ(results[1], results[0]);
  EXPECT_EQ(results[2], results[0]);
}

TEST_P(GemmTest, MoreThan2To31OutputsFallIntoPlace) {
  if (!on_gpu()) GTEST_SKIP() << "too slow on a CPU";
  constexpr int64_t kIn = 64, kOut = 16384, kRows = (int64_t{1} << 31) / kOut + 3, kLast = 2;
  const Buffer x = ComputeArray(kRows * kIn);
  const Buffer weight = ComputeArray(kOut * kIn);
  LF_ASSERT_OK_AND_ASSIGN(const Buffer out, backend().memory().Allocate(kRows * kOut * 2, "outputs"));
  for (const auto& [buffer, count] : {std::pair(&x, kRows * kIn), std::pair(&weight, kOut * kIn)}) {
    LF_ASSERT_OK(kernels().FillRandom(
        {.out = buffer->data(), .dtype = compute_dtype(), .count = count, .stddev = 1, .seed = 9}, stream()));
  }
  GemmParams params;
  params.x = x.data();
  params.x_stride = params.in_width = kIn;
  params.weight = weight.data();
  params.weight_dtype = params.out_dtype = compute_dtype();
  params.num_rows = kRows;
  params.out_width = params.out_stride = kOut;
  params.out = out.data();
  LF_ASSERT_OK(kernels().Gemm(params, GemmWorkspace({kRows, kIn, kOut}), stream()));
  const std::vector<float> last_x =
      DownloadCompute(Advance(x.data(), (kRows - kLast) * kIn, compute_dtype()), kLast * kIn);
  const std::vector<float> weights = DownloadCompute(weight.data(), kOut * kIn);
  const std::vector<double> want = oracle::Gemm(last_x.data(), weights.data(), nullptr, kLast, kIn, kOut);
  const std::vector<float> naive = Rounded(NaiveGemm({kLast, kIn, kOut}, last_x, weights, {}, {}));
  const std::vector<float> got =
      DownloadCompute(Advance(out.data(), (kRows - kLast) * kOut, compute_dtype()), kLast * kOut);
  EXPECT_TRUE(WithinTwiceNaive(got, want, naive, LargestMagnitude(want), epsilon()));
}

TEST_P(GemmTest, BadParametersAreNamed) {
  GemmParams params;
  params.x_stride = params.in_width = 16;
  params.num_rows = 4;
  params.out_width = 8;
  params.out_stride = 8;
  params.weight_dtype = params.out_dtype = compute_dtype();
  const Workspace workspace = GemmWorkspace({4, 16, 8});
  EXPECT_THAT(kernels().Gemm(params, {workspace.data, 1}, stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("gemm"), HasSubstr("1 bytes"))));
  GemmParams broken = params;
  broken.x_stride = 15;
  EXPECT_THAT(kernels().Gemm(broken, workspace, stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("x_stride 15")));
  broken = params;
  broken.out_dtype = DType::kInt64;
  EXPECT_THAT(kernels().Gemm(broken, workspace, stream()),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("int64")));
  broken = params;
  broken.weight_dtype = DType::kInt32;
  EXPECT_THAT(kernels().Gemm(broken, workspace, stream()),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("int32")));
}

}  // namespace
}  // namespace longfill
