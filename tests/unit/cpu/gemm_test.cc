#include <omp.h>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/unit/cpu/cpu_test_util.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

struct Matrices {
  Matrices(int64_t rows, int64_t in, int64_t out_columns, DType dtype)
      : num_rows(rows),
        in_width(in),
        out_width(out_columns),
        weight_dtype(dtype),
        x(RandomFloats(rows * in, 1)),
        weight(RandomFloats(out_columns * in, 2)),
        bias(RandomFloats(out_columns, 3)),
        stored(static_cast<size_t>(out_columns * in * DTypeBytes(dtype))) {
    NarrowFromFloat(weight.data(), out_columns * in, dtype, stored.data());
    WidenToFloat(stored.data(), dtype, out_columns * in, weight.data());
  }
  GemmParams Params(float* out) const {
    GemmParams params;
    params.x = x.data();
    params.x_stride = in_width;
    params.weight = stored.data();
    params.weight_dtype = weight_dtype;
    params.bias = bias.data();
    params.num_rows = num_rows;
    params.in_width = in_width;
    params.out_width = out_width;
    params.out = out;
    params.out_stride = out_width;
    return params;
  }
  int64_t num_rows, in_width, out_width;
  DType weight_dtype;
  std::vector<float> x, weight, bias;
  std::vector<uint8_t> stored;
};

absl::Status RunGemm(CpuBackend& backend, const GemmParams& params) {
  const int64_t bytes =
      backend.kernels().GemmWorkspaceBytes(params.num_rows, params.in_width, params.out_width);
  return backend.kernels().Gemm(params, backend.WorkspaceOf(bytes), backend.stream());
}

class GemmTest : public TargetTest {};
LF_INSTANTIATE_TARGETS(GemmTest);

TEST_P(GemmTest, MatchesTheOracleForEveryWeightDtypeAndEdgeShape) {
  CpuBackend backend(2);
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t rows : {0, 1, 15, 16, 17, 63, 65, 257}) {
      for (auto [in, out_columns] :
           {std::pair<int64_t, int64_t>{1, 1}, {63, 65}, {64, 0}, {127, 257}, {384, 128}}) {
        SCOPED_TRACE(testing::Message()
                     << DTypeName(dtype) << " " << rows << " x " << in << " x " << out_columns);
        const Matrices data(rows, in, out_columns, dtype);
        const std::vector<double> want =
            oracle::Gemm(data.x.data(), data.weight.data(), data.bias.data(), rows, in, out_columns);
        std::vector<float> out(static_cast<size_t>(rows * out_columns) + 1, 123.0F);
        LF_ASSERT_OK(RunGemm(backend, data.Params(out.data())));
        EXPECT_EQ(out.back(), 123.0F) << "written beyond the end";
        out.pop_back();
        EXPECT_TRUE(Near(out, want, 1e-6 * std::sqrt(static_cast<double>(in)) * 8));
      }
    }
  }
}

TEST_P(GemmTest, AccumulatesIntoStridedRows) {
  CpuBackend backend(1);
  for (int64_t rows : {3, 40}) {
    const Matrices data(rows, 96, 70, DType::kBFloat16);
    const std::vector<double> product =
        oracle::Gemm(data.x.data(), data.weight.data(), nullptr, rows, 96, 70);
    const int64_t x_stride = 101, out_stride = 77;
    std::vector<float> x(static_cast<size_t>(rows * x_stride), std::nanf(""));
    std::vector<float> out(static_cast<size_t>(rows * out_stride), 0.5F);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(data.x.begin() + r * 96, 96, x.begin() + r * x_stride);
    GemmParams params = data.Params(out.data());
    params.x = x.data();
    params.x_stride = x_stride;
    params.out_stride = out_stride;
    params.bias = nullptr;
    params.accumulate = true;
    LF_ASSERT_OK(RunGemm(backend, params));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < out_stride; ++i) {
        const double want = i < 70 ? 0.5 + product[r * 70 + i] : 0.5;
        ASSERT_NEAR(out[r * out_stride + i], want, 1e-4) << r << " " << i;
      }
    }
  }
}

// What the header of the implementation states about the library on the machine at hand.
TEST(GemmBits, OfARowDependNeitherOnThreadsNorOnOtherRows) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (auto [in, out_columns] :
         {std::pair<int64_t, int64_t>{64, 100}, {576, 300}, {1536, 576}, {4096, 320}}) {
      SCOPED_TRACE(testing::Message() << DTypeName(dtype) << " in " << in << " out " << out_columns);
      const int64_t rows = 600;
      const Matrices data(rows, in, out_columns, dtype);
      std::vector<float> whole(static_cast<size_t>(rows * out_columns));
      CpuBackend one(1);
      LF_ASSERT_OK(RunGemm(one, data.Params(whole.data())));
      CpuBackend three(3);
      std::vector<float> got(whole.size());
      LF_ASSERT_OK(RunGemm(three, data.Params(got.data())));
      EXPECT_TRUE(SameBits(got, whole)) << "3 threads";
      for (int64_t piece : {1, 7, 16, 23, 24, 100, 145, 192, 257, 333}) {
        for (int64_t begin = 0; begin < rows; begin += std::max<int64_t>(piece, 97)) {
          GemmParams params = data.Params(got.data());
          params.num_rows = std::min(piece, rows - begin);
          params.x = data.x.data() + begin * in;
          params.out = got.data() + begin * out_columns;
          std::fill_n(got.data() + begin * out_columns, params.num_rows * out_columns, 0.0F);
          LF_ASSERT_OK(RunGemm(one, params));
        }
        EXPECT_TRUE(SameBits(got, whole)) << "pieces of " << piece;
      }
    }
  }
}

TEST(GemmThreads, LeaveTheCallersOpenMpSettingAlone) {
  CpuBackend backend(1);
  const Matrices data(20, 64, 32, DType::kFloat32);
  std::vector<float> out(20 * 32);
  omp_set_num_threads(3);
  LF_ASSERT_OK(RunGemm(backend, data.Params(out.data())));
  EXPECT_EQ(omp_get_max_threads(), 3);
}

TEST(GemmErrors, NameWhatIsWrong) {
  CpuBackend backend(1);
  const Matrices data(2, 8, 4, DType::kFloat32);
  std::vector<float> out(8);
  GemmParams params = data.Params(out.data());
  params.weight_dtype = DType::kInt64;
  EXPECT_THAT(RunGemm(backend, params), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("int64")));
  params = data.Params(out.data());
  params.out_dtype = DType::kBFloat16;
  EXPECT_THAT(RunGemm(backend, params),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("output of bfloat16")));
  params = data.Params(out.data());
  params.x_stride = 7;
  EXPECT_THAT(RunGemm(backend, params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("x_stride 7")));
  params = data.Params(out.data());
  params.in_width = 0;
  EXPECT_THAT(RunGemm(backend, params),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("in_width 0")));
  EXPECT_THAT(backend.kernels().Gemm(data.Params(out.data()), {}, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("workspace of 0 bytes")));
}

}  // namespace
}  // namespace longfill
