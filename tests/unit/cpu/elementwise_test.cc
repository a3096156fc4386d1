#include "kernels/cpu/oracle/oracle.h"
#include "tests/unit/cpu/cpu_test_util.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

class ElementwiseTest : public TargetTest {
 protected:
  CpuBackend backend_{2};
};
LF_INSTANTIATE_TARGETS(ElementwiseTest);

TEST_P(ElementwiseTest, RmsNormMatchesTheOracleAlsoInPlace) {
  for (int64_t rows : {0, 1, 37}) {
    for (int64_t width : {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 576, 1009}) {
      SCOPED_TRACE(testing::Message() << rows << " x " << width);
      std::vector<float> x = RandomFloats(rows * width, 1, 3.0F);
      const std::vector<float> weight = RandomFloats(width, 2);
      const std::vector<double> want = oracle::RmsNorm(x.data(), weight.data(), 1e-5, rows, width);
      std::vector<float> out(static_cast<size_t>(rows * width) + 1, 123.0F);
      RmsNormParams params{x.data(), weight.data(), 1e-5F, rows, width, out.data()};
      LF_ASSERT_OK(backend_.kernels().RmsNorm(params, backend_.stream()));
      EXPECT_EQ(out.back(), 123.0F) << "written beyond the end";
      out.pop_back();
      EXPECT_TRUE(Near(out, want, 5e-6));
      params.out = x.data();
      LF_ASSERT_OK(backend_.kernels().RmsNorm(params, backend_.stream()));
      EXPECT_TRUE(SameBits(x, out));
    }
  }
}

TEST_P(ElementwiseTest, RmsNormOfZerosIsZero) {
  std::vector<float> x(64), weight(64, 1.0F);
  const RmsNormParams params{x.data(), weight.data(), 1e-6F, 1, 64, x.data()};
  LF_ASSERT_OK(backend_.kernels().RmsNorm(params, backend_.stream()));
  EXPECT_EQ(x, std::vector<float>(64));
}

TEST_P(ElementwiseTest, GatedActivationsMatchTheOracle) {
  for (Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    for (int64_t rows : {0, 1, 19}) {
      for (int64_t width : {0, 1, 15, 16, 17, 64, 65, 1009}) {
        SCOPED_TRACE(testing::Message() << static_cast<int>(activation) << ": " << rows << " x " << width);
        const int64_t stride = width + 3;
        const std::vector<float> both = RandomFloats(2 * rows * stride, 5, 4.0F);
        std::vector<float> gate, up;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < width; ++i) {
            gate.push_back(both[r * stride + i]);
            up.push_back(both[(rows + r) * stride + i]);
          }
        }
        const std::vector<double> want = oracle::GatedActivation(
            gate.data(), up.data(),
            activation == Activation::kSilu ? oracle::Gate::kSilu : oracle::Gate::kGeluTanh, rows * width);
        std::vector<float> out(static_cast<size_t>(rows * width) + 1, 123.0F);
        GatedActivationParams params{
            both.data(), both.data() + rows * stride, stride, activation, rows, width, out.data()};
        LF_ASSERT_OK(backend_.kernels().GatedActivation(params, backend_.stream()));
        EXPECT_EQ(out.back(), 123.0F) << "written beyond the end";
        out.pop_back();
        for (size_t i = 0; i < want.size(); ++i) {
          ASSERT_NEAR(out[i], want[i], 1e-6 * std::abs(want[i]) + 1e-7) << "at " << i << " gate " << gate[i];
        }
        params = {gate.data(), up.data(), width, activation, rows, width, gate.data()};
        LF_ASSERT_OK(backend_.kernels().GatedActivation(params, backend_.stream()));
        EXPECT_TRUE(SameBits(gate, out)) << "in place";
      }
    }
  }
}

TEST_P(ElementwiseTest, ActivationsOfHugeGatesAreFinite) {
  std::vector<float> gate = {1e30F, -1e30F, 100.0F, -100.0F, 0.0F, -0.0F, 1e-30F, -1e20F};
  const std::vector<float> up(gate.size(), 1.0F);
  for (Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    std::vector<float> out(gate.size());
    const int64_t n = static_cast<int64_t>(gate.size());
    const GatedActivationParams params{gate.data(), up.data(), n, activation, 1, n, out.data()};
    LF_ASSERT_OK(backend_.kernels().GatedActivation(params, backend_.stream()));
    for (size_t i = 0; i < gate.size(); ++i) {
      EXPECT_NEAR(out[i], gate[i] > 50 ? gate[i] : 0.0F, 1e-6F * std::abs(out[i]) + 1e-12F) << gate[i];
    }
  }
}

TEST_P(ElementwiseTest, RotaryMatchesTheOracleInBothFormsAndFarAlongThePrompt) {
  for (RotaryForm form : {RotaryForm::kHalfSplit, RotaryForm::kInterleaved}) {
    for (int64_t head_dim : {2, 64, 80, 256}) {
      for (int64_t rotary_dim : {int64_t{0}, head_dim / 4 * 2, head_dim}) {
        for (const PositionMap& map : {PositionMap::Contiguous(1048500), PositionMap{5, 3, 100000}}) {
          SCOPED_TRACE(testing::Message() << "head_dim " << head_dim << " rotary_dim " << rotary_dim);
          const int64_t rows = 9, heads = 3, offset = 4, stride = heads * head_dim + 5;
          const std::vector<float> x = RandomFloats(rows * stride, 3);
          std::vector<float> dense;
          std::vector<int64_t> positions;
          for (int64_t r = 0; r < rows; ++r) {
            dense.insert(dense.end(), x.begin() + r * stride, x.begin() + r * stride + heads * head_dim);
            positions.push_back(map.Position(offset + r));
          }
          std::vector<double> inv_freq;
          for (int64_t i = 0; i < rotary_dim / 2; ++i) {
            inv_freq.push_back(
                std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim)));
          }
          oracle::RotaryInput input;
          input.x = dense.data();
          input.inv_freq = inv_freq;
          input.position = positions;
          input.attention_scale = 1.25;
          input.pairs = form == RotaryForm::kHalfSplit ? oracle::RotaryPairs::kHalfSplit
                                                       : oracle::RotaryPairs::kInterleaved;
          input.num_heads = heads;
          input.head_dim = head_dim;
          const std::vector<double> want = oracle::Rotary(input);

          const int64_t head_stride = (offset + rows + 2) * head_dim;
          std::vector<float> out(static_cast<size_t>(heads * head_stride), 123.0F);
          RotaryParams params;
          params.x = x.data();
          params.x_stride = stride;
          params.inv_freq = inv_freq;
          params.attention_scale = 1.25F;
          params.form = form;
          params.rotary_dim = rotary_dim;
          params.positions = map;
          params.row_offset = offset;
          params.num_rows = rows;
          params.num_heads = heads;
          params.head_dim = head_dim;
          params.out = out.data();
          params.head_stride = head_stride;
          LF_ASSERT_OK(backend_.kernels().Rotary(params, backend_.stream()));
          std::vector<float> got;
          for (int64_t h = 0; h < heads; ++h) {
            const auto head = out.begin() + h * head_stride;
            got.insert(got.end(), head + offset * head_dim, head + (offset + rows) * head_dim);
            for (int64_t i = 0; i < offset * head_dim; ++i) ASSERT_EQ(head[i], 123.0F) << "before the rows";
            for (int64_t i = (offset + rows) * head_dim; i < head_stride; ++i) {
              ASSERT_EQ(head[i], 123.0F) << "after the rows";
            }
          }
          EXPECT_TRUE(Near(got, want, 2e-6));
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, EmbedWidensEveryTableDtype) {
  const int64_t vocab = 11, width = 37;
  const std::vector<int32_t> ids = {0, 10, 3, 3, 7};
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    std::vector<float> table = RandomFloats(vocab * width, 9);
    table[3] = 65504.0F;
    table[4] = 6e-8F;  // subnormal in fp16
    table[5] = -kTestInfinity;
    std::vector<uint8_t> stored(static_cast<size_t>(vocab * width * DTypeBytes(dtype)));
    NarrowFromFloat(table.data(), vocab * width, dtype, stored.data());
    WidenToFloat(stored.data(), dtype, vocab * width, table.data());
    std::vector<float> out(ids.size() * width);
    LF_ASSERT_OK(backend_.kernels().Embed(
        {ids.data(), static_cast<int64_t>(ids.size()), stored.data(), dtype, vocab, width, out.data()},
        backend_.stream()));
    const std::vector<double> want = oracle::Embed(ids, table.data(), width);
    EXPECT_TRUE(Near(out, want, 0.0)) << DTypeName(dtype);
  }
}

TEST(ElementwiseErrors, NameWhatIsWrong) {
  CpuBackend backend(1);
  std::vector<float> data(64);
  const std::vector<int32_t> ids = {1, 4};
  EXPECT_THAT(backend.kernels().Embed({ids.data(), 2, data.data(), DType::kFloat32, 4, 4, data.data()},
                                      backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("id 4 at 1")));
  EXPECT_THAT(
      backend.kernels().Embed({nullptr, 0, data.data(), DType::kInt32, 4, 4, data.data()}, backend.stream()),
      StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("int32")));
  EXPECT_THAT(
      backend.kernels().RmsNorm({data.data(), data.data(), 1e-5F, -1, 4, data.data()}, backend.stream()),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_rows -1")));
  EXPECT_THAT(backend.kernels().GatedActivation(
                  {data.data(), data.data(), 3, Activation::kSilu, 1, 4, data.data()}, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("in_stride 3")));
  RotaryParams params;
  params.num_rows = params.num_heads = 1;
  params.head_dim = params.x_stride = params.head_stride = 8;
  params.rotary_dim = 3;
  EXPECT_THAT(backend.kernels().Rotary(params, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("rotary_dim 3")));
  params.rotary_dim = 4;
  EXPECT_THAT(backend.kernels().Rotary(params, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("inv_freq has 0 entries")));
}

}  // namespace
}  // namespace longfill
