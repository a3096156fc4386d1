#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/contract/backend_fixture.h"
#include "tests/contract/tolerance.h"

namespace longfill {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::IsNan;

class ElementwiseTest : public BackendTest {
 protected:
  // What two bytes 0x7F are as a number; in fp16 it is none.
  void ExpectPoison(const std::vector<float>& values) {
    const std::vector<float> poison = DownloadCompute(ComputeArray(1).data(), 1);
    if (std::isnan(poison[0])) {
      EXPECT_THAT(values, Each(IsNan()));
    } else {
      EXPECT_THAT(values, Each(poison[0]));
    }
  }
  // The first `count` elements; what follows up to `allocated` must be poison.
  std::vector<float> DownloadChecked(const Buffer& from, int64_t count, int64_t allocated) {
    std::vector<float> all = DownloadCompute(from.data(), allocated);
    ExpectPoison(std::vector<float>(all.begin() + count, all.end()));
    all.resize(static_cast<size_t>(count));
    return all;
  }
};
LF_INSTANTIATE_BACKENDS(ElementwiseTest);

// ---- Embed

TEST_P(ElementwiseTest, EmbedTakesRowsOfEveryTableType) {
  constexpr int64_t kVocabulary = 50;
  const std::vector<int32_t> ids = {0, 49, 7, 7, 13, 1, 48};
  const auto rows = static_cast<int64_t>(ids.size());
  const Buffer ids_device = Upload(ids);
  for (DType table_dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t width : {1, 8, 63, 64, 100, 4096}) {
      SCOPED_TRACE(testing::Message() << std::string(DTypeName(table_dtype)) << ", width " << width);
      const int64_t table_count = kVocabulary * width;
      std::vector<uint8_t> narrow(static_cast<size_t>(table_count * DTypeBytes(table_dtype)));
      NarrowFromFloat(NormalFloats(table_count, 1).data(), table_count, table_dtype, narrow.data());
      std::vector<float> table(static_cast<size_t>(table_count));
      WidenToFloat(narrow.data(), table_dtype, table_count, table.data());
      std::vector<float> want;
      for (const int32_t id : ids) {
        want.insert(want.end(), table.begin() + id * width, table.begin() + (id + 1) * width);
      }
      const Buffer table_device = Upload(narrow);
      const Buffer out = ComputeArray(rows * width + 3);
      LF_ASSERT_OK(kernels().Embed({.ids = ids_device.as<int32_t>(),
                                    .num_rows = rows,
                                    .table = table_device.data(),
                                    .table_dtype = table_dtype,
                                    .vocab_size = kVocabulary,
                                    .width = width,
                                    .out = out.data()},
                                   stream()));
      EXPECT_EQ(DownloadChecked(out, rows * width, rows * width + 3), Rounded(want));
    }
  }
  LF_EXPECT_OK(kernels().Embed({.num_rows = 0, .vocab_size = 1, .width = 8}, stream()));
  EXPECT_THAT(
      kernels().Embed({.num_rows = 1, .table_dtype = DType::kInt32, .vocab_size = 1, .width = 8}, stream()),
      StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("int32")));
}

// ---- RmsNorm

std::vector<float> NaiveRmsNorm(const std::vector<float>& x, const std::vector<float>& weight, float epsilon,
                                int64_t width) {
  std::vector<float> out;
  for (size_t row = 0; row < x.size(); row += static_cast<size_t>(width)) {
    float sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += x[row + i] * x[row + i];
    const float scale = 1.0F / std::sqrt(sum / static_cast<float>(width) + epsilon);
    for (int64_t i = 0; i < width; ++i) out.push_back(x[row + i] * scale * weight[i]);
  }
  return out;
}

TEST_P(ElementwiseTest, RmsNormMatchesTheOracleAlsoInPlace) {
  // Around what one thread, part of a warp, a warp and a block hold, and beyond what registers hold.
  for (int64_t width :
       {1,    7,    8,    56,   64,   72,   96,   128,  136,   248,   256,   264,   576,   896,
        1000, 1024, 1032, 1536, 3999, 4096, 4104, 8192, 16384, 16392, 32768, 40000, 65544, 65545}) {
    for (int64_t rows : {1, 37}) {
      if (rows > 1 && width > 5000) continue;
      SCOPED_TRACE(testing::Message() << rows << " x " << width);
      const std::vector<float> x = Rounded(NormalFloats(rows * width, 1, 3));
      const std::vector<float> weight = NormalFloats(width, 2);
      const std::vector<double> want = oracle::RmsNorm(x.data(), weight.data(), 1e-5F, rows, width);
      const std::vector<float> naive = Rounded(NaiveRmsNorm(x, weight, 1e-5F, width));
      const Buffer in = UploadCompute(x);
      const Buffer weight_device = Upload(weight);
      const Buffer out = ComputeArray(rows * width + 3);
      RmsNormParams params{in.data(), weight_device.as<float>(), 1e-5F, rows, width, out.data()};
      LF_ASSERT_OK(kernels().RmsNorm(params, stream()));
      const std::vector<float> got = DownloadChecked(out, rows * width, rows * width + 3);
      EXPECT_TRUE(WithinTwiceNaive(got, want, naive, Magnitudes(want), epsilon()));
      params.out = in.data();
      LF_ASSERT_OK(kernels().RmsNorm(params, stream()));
      EXPECT_TRUE(DownloadCompute(in.data(), rows * width) == got) << "in place";
    }
  }
}

TEST_P(ElementwiseTest, RmsNormOfManyShortRowsAndOfZeros) {
  for (int64_t width : {64, 80, 128, 256}) {
    constexpr int64_t kRows = 10007;
    const std::vector<float> x = Rounded(NormalFloats(kRows * width, 1));
    const std::vector<float> weight = NormalFloats(width, 2);
    const Buffer in = UploadCompute(x);
    const Buffer weight_device = Upload(weight);
    const RmsNormParams params{in.data(), weight_device.as<float>(), 1e-6F, kRows, width, in.data()};
    LF_ASSERT_OK(kernels().RmsNorm(params, stream()));
    const std::vector<double> want = oracle::RmsNorm(x.data(), weight.data(), 1e-6F, kRows, width);
    const std::vector<float> naive = Rounded(NaiveRmsNorm(x, weight, 1e-6F, width));
    EXPECT_TRUE(WithinTwiceNaive(DownloadCompute(in.data(), kRows * width), want, naive, Magnitudes(want),
                                 epsilon()));
  }
  const Buffer zeros = UploadCompute(std::vector<float>(64));
  const Buffer ones = Upload(std::vector<float>(64, 1.0F));
  LF_ASSERT_OK(kernels().RmsNorm({zeros.data(), ones.as<float>(), 1e-6F, 1, 64, zeros.data()}, stream()));
  EXPECT_THAT(DownloadCompute(zeros.data(), 64), Each(0.0F));
  LF_EXPECT_OK(kernels().RmsNorm({.num_rows = 0, .width = 64}, stream()));
  EXPECT_THAT(kernels().RmsNorm({.num_rows = 1, .width = 0}, stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("width 0")));
}

// ---- GatedActivation

float NaiveGate(Activation activation, float x) {
  if (activation == Activation::kSilu) return x / (1.0F + std::exp(-x));
  return 0.5F * x * (1.0F + std::tanh(0.7978845608F * (x + 0.044715F * x * x * x)));
}

// Gate and up of each row beside each other and `gap` apart, as one product with a joint weight leaves them.
TEST_P(ElementwiseTest, GatedActivationsMatchTheOracle) {
  for (Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    for (int64_t rows : {0, 1, 19}) {
      for (int64_t width : {0, 1, 8, 15, 64, 65, 1000, 4096, 4104, 9001}) {
        for (int64_t gap : {0, 8, 3}) {
          SCOPED_TRACE(testing::Message()
                       << static_cast<int>(activation) << ": " << rows << " x " << width << ", gap " << gap);
          const int64_t stride = 2 * width + gap;
          const std::vector<float> both = Rounded(NormalFloats(rows * stride, 5, 4.0F));
          std::vector<float> gate, up;
          for (int64_t r = 0; r < rows; ++r) {
            gate.insert(gate.end(), both.begin() + r * stride, both.begin() + r * stride + width);
            up.insert(up.end(), both.begin() + r * stride + width, both.begin() + r * stride + 2 * width);
          }
          const std::vector<double> want = oracle::GatedActivation(
              gate.data(), up.data(),
              activation == Activation::kSilu ? oracle::Gate::kSilu : oracle::Gate::kGeluTanh, rows * width);
          std::vector<float> naive;
          std::vector<double> scale = want;
          for (size_t i = 0; i < gate.size(); ++i) {
            naive.push_back(NaiveGate(activation, gate[i]) * up[i]);
            // Far out on the negative side the naive gelu is a difference of nearly equal numbers.
            if (activation == Activation::kGeluTanh) scale[i] = double{gate[i]} * up[i];
          }
          const Buffer in = UploadCompute(both);
          const Buffer out = ComputeArray(rows * width + 3);
          LF_ASSERT_OK(kernels().GatedActivation({in.data(), Advance(in.data(), width, compute_dtype()),
                                                  stride, activation, rows, width, out.data()},
                                                 stream()));
          const std::vector<float> got = DownloadChecked(out, rows * width, rows * width + 3);
          EXPECT_TRUE(WithinTwiceNaive(got, want, Rounded(naive), Magnitudes(scale), epsilon()));
          const Buffer gate_device = UploadCompute(gate);
          const Buffer up_device = UploadCompute(up);
          LF_ASSERT_OK(kernels().GatedActivation(
              {gate_device.data(), up_device.data(), width, activation, rows, width, gate_device.data()},
              stream()));
          EXPECT_TRUE(DownloadCompute(gate_device.data(), rows * width) == got) << "in place";
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, ActivationsOfHugeGatesAreFinite) {
  const float huge = compute_dtype() == DType::kFloat16 ? 6e4F : 1e30F;
  const std::vector<float> gate = Rounded({huge, -huge, 90.0F, -90.0F, 0.0F, -0.0F, 1e-7F, -200.0F});
  const auto count = static_cast<int64_t>(gate.size());
  for (Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    const Buffer in = UploadCompute(gate);
    const Buffer up = UploadCompute(std::vector<float>(gate.size(), 1.0F));
    LF_ASSERT_OK(
        kernels().GatedActivation({in.data(), up.data(), count, activation, 1, count, in.data()}, stream()));
    const std::vector<float> got = DownloadCompute(in.data(), count);
    for (size_t i = 0; i < gate.size(); ++i) {
      if (gate[i] > 50) {
        EXPECT_EQ(got[i], gate[i]);
      } else {
        EXPECT_NEAR(got[i], 0, 1e-6) << gate[i];
      }
    }
  }
}

// ---- Rotary

struct RotaryCase {
  RotaryForm form = RotaryForm::kHalfSplit;
  int64_t head_dim = 0, rotary_dim = 0, num_heads = 3, num_rows = 9, x_gap = 0;
  PositionMap positions;
};

struct RotaryYardstick {
  std::vector<double> want, scale;
  std::vector<float> naive;
};

// All in the order of the result, [head][row][dim]. The naive form turns in fp32.
RotaryYardstick Yardstick(const RotaryCase& c, const std::vector<float>& x,
                          const std::vector<double>& inv_freq, const std::vector<int64_t>& positions,
                          float attention_scale) {
  oracle::RotaryInput input;
  input.x = x.data();
  input.inv_freq = inv_freq;
  input.position = positions;
  input.attention_scale = attention_scale;
  input.pairs =
      c.form == RotaryForm::kHalfSplit ? oracle::RotaryPairs::kHalfSplit : oracle::RotaryPairs::kInterleaved;
  input.num_heads = c.num_heads;
  input.head_dim = c.head_dim;
  RotaryYardstick yardstick{oracle::Rotary(input), {}, {}};
  const int64_t pairs = c.rotary_dim / 2;
  for (int64_t h = 0; h < c.num_heads; ++h) {
    for (int64_t r = 0; r < c.num_rows; ++r) {
      const float* row = x.data() + (r * c.num_heads + h) * c.head_dim;
      for (int64_t i = 0; i < c.head_dim; ++i) {
        if (i >= c.rotary_dim) {
          yardstick.naive.push_back(row[i]);
          yardstick.scale.push_back(0);  // moved as it is
          continue;
        }
        const bool split = c.form == RotaryForm::kHalfSplit;
        const int64_t pair = split ? i % pairs : i / 2;
        const bool second = split ? i >= pairs : i % 2 == 1;
        const float a = row[split ? pair : 2 * pair];
        const float b = row[split ? pair + pairs : 2 * pair + 1];
        const double angle = static_cast<float>(static_cast<double>(positions[r]) * inv_freq[pair]);
        const auto cosine = static_cast<float>(std::cos(angle)) * attention_scale;
        const auto sine = static_cast<float>(std::sin(angle)) * attention_scale;
        yardstick.naive.push_back(second ? b * cosine + a * sine : a * cosine - b * sine);
        yardstick.scale.push_back(attention_scale * std::hypot(a, b));
      }
    }
  }
  return yardstick;
}

class RotaryTest : public ElementwiseTest {
 protected:
  void Check(const RotaryCase& c);
};
LF_INSTANTIATE_BACKENDS(RotaryTest);

void RotaryTest::Check(const RotaryCase& c) {
  SCOPED_TRACE(testing::Message() << (c.form == RotaryForm::kHalfSplit ? "half split" : "interleaved")
                                  << ", head_dim " << c.head_dim << ", rotary_dim " << c.rotary_dim << ", "
                                  << c.num_heads << " heads, " << c.num_rows << " rows, gap " << c.x_gap
                                  << ", first " << c.positions.first);
  constexpr int64_t kOffset = 4, kBehind = 2;
  const int64_t dense = c.num_heads * c.head_dim;
  const int64_t stride = dense + c.x_gap;
  const std::vector<float> spread = Rounded(NormalFloats(c.num_rows * stride, 3));
  std::vector<float> x;
  std::vector<int64_t> positions;
  for (int64_t r = 0; r < c.num_rows; ++r) {
    x.insert(x.end(), spread.begin() + r * stride, spread.begin() + r * stride + dense);
    positions.push_back(c.positions.Position(kOffset + r));
  }
  std::vector<double> inv_freq;
  for (int64_t i = 0; i < c.rotary_dim / 2; ++i) {
    inv_freq.push_back(std::pow(500000.0, -2.0 * static_cast<double>(i) / static_cast<double>(c.rotary_dim)));
  }
  const RotaryYardstick yardstick = Yardstick(c, x, inv_freq, positions, 1.25F);

  const int64_t head_stride = (kOffset + c.num_rows + kBehind) * c.head_dim;
  const Buffer in = UploadCompute(spread);
  const Buffer out = ComputeArray(c.num_heads * head_stride);
  RotaryParams params;
  params.x = in.data();
  params.x_stride = stride;
  params.inv_freq = inv_freq;
  params.attention_scale = 1.25F;
  params.form = c.form;
  params.rotary_dim = c.rotary_dim;
  params.positions = c.positions;
  params.row_offset = kOffset;
  params.num_rows = c.num_rows;
  params.num_heads = c.num_heads;
  params.head_dim = c.head_dim;
  params.out = out.data();
  params.head_stride = head_stride;
  LF_ASSERT_OK(kernels().Rotary(params, stream()));

  const std::vector<float> all = DownloadCompute(out.data(), c.num_heads * head_stride);
  std::vector<float> got, around;
  for (int64_t h = 0; h < c.num_heads; ++h) {
    const auto head = all.begin() + h * head_stride;
    const auto begin = head + kOffset * c.head_dim;
    const auto end = begin + c.num_rows * c.head_dim;
    around.insert(around.end(), head, begin);
    got.insert(got.end(), begin, end);
    around.insert(around.end(), end, head + head_stride);
  }
  ExpectPoison(around);
  EXPECT_TRUE(WithinTwiceNaive(got, yardstick.want, Rounded(yardstick.naive), yardstick.scale, epsilon()));
}

TEST_P(RotaryTest, BothFormsMatchTheOracleFarAlongThePrompt) {
  for (RotaryForm form : {RotaryForm::kHalfSplit, RotaryForm::kInterleaved}) {
    for (int64_t head_dim : {2, 64, 80, 96, 128, 256}) {
      for (const PositionMap& positions :
           {PositionMap::Contiguous(0), PositionMap::Contiguous(1048500), PositionMap{5, 3, 100000},
            PositionMap{262144, 1, 0}, PositionMap{9, 3, 1000, -500, 4}}) {
        Check({.form = form, .head_dim = head_dim, .rotary_dim = head_dim, .positions = positions});
      }
    }
  }
}

TEST_P(RotaryTest, TheRestOfAPartlyRotatedHeadIsMoved) {
  for (RotaryForm form : {RotaryForm::kHalfSplit, RotaryForm::kInterleaved}) {
    const int64_t dims[][2] = {{128, 64}, {128, 0}, {64, 24}, {64, 48}, {96, 32}, {256, 2}, {80, 40}, {8, 6}};
    for (const auto& [head_dim, rotary_dim] : dims) {
      Check({.form = form,
             .head_dim = head_dim,
             .rotary_dim = rotary_dim,
             .positions = PositionMap::Contiguous(777)});
    }
  }
}

TEST_P(RotaryTest, AnyNumberOfHeadsAndRowsAndAnyStride) {
  for (int64_t num_heads : {1, 2, 7, 32}) {
    for (int64_t num_rows : {1, 15, 16, 17, 100}) {
      for (int64_t gap : {0, 64, 5}) {
        Check({.head_dim = 64, .rotary_dim = 64, .num_heads = num_heads, .num_rows = num_rows, .x_gap = gap});
      }
    }
  }
}

TEST_P(RotaryTest, BadParametersAreNamed) {
  const std::vector<double> inv_freq(16, 0.5);
  RotaryParams params;
  params.num_rows = params.num_heads = 1;
  params.head_dim = params.x_stride = params.head_stride = 64;
  params.rotary_dim = 31;
  params.inv_freq = inv_freq;
  EXPECT_THAT(kernels().Rotary(params, stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("rotary_dim 31")));
  params.rotary_dim = 64;
  EXPECT_THAT(kernels().Rotary(params, stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("16 entries")));
  params.rotary_dim = 32;
  params.x_stride = 63;
  EXPECT_THAT(kernels().Rotary(params, stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("x_stride 63")));
  params.num_rows = 0;
  LF_EXPECT_OK(kernels().Rotary(params, stream()));
}

// ---- Beyond 32-bit offsets. The last rows of a large array must be those of the same rows alone.

class LargeTest : public ElementwiseTest {
 protected:
  void SetUp() override {
    ElementwiseTest::SetUp();
    if (!IsSkipped() && !on_gpu()) GTEST_SKIP() << "too slow on a CPU";
  }
  Buffer Random(int64_t count, uint64_t seed, int64_t first = 0) {
    absl::StatusOr<Buffer> buffer = backend().memory().Allocate(count * 2, "a large array");
    EXPECT_THAT(buffer, IsOk());
    if (!buffer.ok()) return {};
    LF_EXPECT_OK(kernels().FillRandom({.out = buffer->data(),
                                       .dtype = compute_dtype(),
                                       .count = count,
                                       .stddev = 1,
                                       .seed = seed,
                                       .first = first},
                                      stream()));
    return *std::move(buffer);
  }
  static constexpr int64_t kWidth = 4096;
  static constexpr int64_t kRows = (int64_t{1} << 31) / kWidth + 5;
  static constexpr int64_t kLast = 3;
};
LF_INSTANTIATE_BACKENDS(LargeTest);

TEST_P(LargeTest, RmsNorm) {
  const Buffer weight = Upload(NormalFloats(kWidth, 2));
  const Buffer all = Random(kRows * kWidth, 1);
  const Buffer last = Random(kLast * kWidth, 1, (kRows - kLast) * kWidth);
  LF_ASSERT_OK(
      kernels().RmsNorm({all.data(), weight.as<float>(), 1e-5F, kRows, kWidth, all.data()}, stream()));
  LF_ASSERT_OK(
      kernels().RmsNorm({last.data(), weight.as<float>(), 1e-5F, kLast, kWidth, last.data()}, stream()));
  EXPECT_EQ(DownloadCompute(Advance(all.data(), (kRows - kLast) * kWidth, compute_dtype()), kLast * kWidth),
            DownloadCompute(last.data(), kLast * kWidth));
}

TEST_P(LargeTest, GatedActivation) {
  const Buffer gate = Random(kRows * kWidth, 1), up = Random(kRows * kWidth, 2);
  const int64_t first = (kRows - kLast) * kWidth;
  const Buffer last_gate = Random(kLast * kWidth, 1, first), last_up = Random(kLast * kWidth, 2, first);
  LF_ASSERT_OK(kernels().GatedActivation(
      {gate.data(), up.data(), kWidth, Activation::kSilu, kRows, kWidth, gate.data()}, stream()));
  LF_ASSERT_OK(kernels().GatedActivation(
      {last_gate.data(), last_up.data(), kWidth, Activation::kSilu, kLast, kWidth, last_gate.data()},
      stream()));
  EXPECT_EQ(DownloadCompute(Advance(gate.data(), first, compute_dtype()), kLast * kWidth),
            DownloadCompute(last_gate.data(), kLast * kWidth));
}

TEST_P(LargeTest, EmbedAndRotary) {
  constexpr int64_t kHeads = 32, kHeadDim = kWidth / kHeads, kVocabulary = 1000;
  const Buffer table = Random(kVocabulary * kWidth, 4);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < kRows; ++i) ids.push_back(static_cast<int32_t>(i * 7919 % kVocabulary));
  const Buffer ids_device = Upload(ids);
  const std::vector<double> inv_freq(kHeadDim / 2, 0.001);
  const auto run = [&](int64_t first, int64_t rows) {
    const Buffer x = Random(rows * kWidth, 0);
    LF_EXPECT_OK(kernels().Embed({.ids = ids_device.as<int32_t>() + first,
                                  .num_rows = rows,
                                  .table = table.data(),
                                  .table_dtype = compute_dtype(),
                                  .vocab_size = kVocabulary,
                                  .width = kWidth,
                                  .out = x.data()},
                                 stream()));
    const Buffer turned = Random(rows * kWidth, 0);
    LF_EXPECT_OK(kernels().Rotary({.x = x.data(),
                                   .x_stride = kWidth,
                                   .inv_freq = inv_freq,
                                   .rotary_dim = kHeadDim,
                                   .positions = PositionMap::Contiguous(first),
                                   .num_rows = rows,
                                   .num_heads = kHeads,
                                   .head_dim = kHeadDim,
                                   .out = turned.data(),
                                   .head_stride = rows * kHeadDim},
                                  stream()));
    // The last rows of the last head.
    return DownloadCompute(Advance(turned.data(), (kHeads * rows - kLast) * kHeadDim, compute_dtype()),
                           kLast * kHeadDim);
  };
  EXPECT_EQ(run(0, kRows), run(kRows - kLast, kLast));
}

}  // namespace
}  // namespace longfill
