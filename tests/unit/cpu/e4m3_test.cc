#include "kernels/cpu/e4m3.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/sparse/head_pattern.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

std::vector<float> Rounded(std::vector<float> x) {
  const auto width = std::ssize(x);
  RoundToE4m3({.from = x.data(), .to = x.data(), .num_rows = 1, .width = width});
  return x;
}

// By the definition: a sign, 4 bits of exponent with bias 7 and 3 of fraction; without exponent subnormal.
double ValueOf(int code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 7 - 3);
  return code < 128 ? magnitude : -magnitude;
}
constexpr int kCodeOf256 = 15 << 3;  // the largest that is reached: 256 = 1.0 * 2^8

// 128 * 2^exponent beside x * 2^exponent leaves x as it is.
float RoundedBeside128(double x, int exponent) {
  const auto scaled = [&](double value) { return static_cast<float>(std::ldexp(value, exponent)); };
  const std::vector<float> rounded = Rounded({scaled(-128), scaled(x)});
  EXPECT_EQ(rounded[0], scaled(-128));
  return static_cast<float>(std::ldexp(rounded[1], -exponent));
}

constexpr int kExponents[] = {0, 1, -1, 13, -30, -kMostFp8Power, 100, 119};

TEST(E4m3, EveryValueIsItself) {
  EXPECT_EQ(ValueOf(kCodeOf256), 256);
  for (const int exponent : kExponents) {
    for (int code = 0; code < 256; ++code) {
      if ((code & 127) >= kCodeOf256) continue;  // 256 and more, or none
      EXPECT_EQ(RoundedBeside128(ValueOf(code), exponent), ValueOf(code)) << code << " times 2^" << exponent;
    }
  }
}

TEST(E4m3, RoundsToNearestAndBetweenTwoToTheEvenOne) {
  for (const int exponent : kExponents) {
    for (const int sign : {0, 128}) {
      for (int code = sign; code < sign + kCodeOf256; ++code) {
        const double low = ValueOf(code), high = ValueOf(code + 1), middle = (low + high) / 2;
        const double even = code % 2 == 0 ? low : high;
        EXPECT_EQ(RoundedBeside128(middle, exponent), even) << middle << " times 2^" << exponent;
        const auto of_float = static_cast<float>(middle);
        EXPECT_EQ(RoundedBeside128(std::nextafter(of_float, 0.0F), exponent), low) << code;
        EXPECT_EQ(RoundedBeside128(std::nextafter(of_float, 1e9F * of_float), exponent), high) << code;
      }
    }
  }
}

TEST(E4m3, BringsTheLargestTo128To256) {
  for (const float largest : {128.0F, 1.0F, 1.9F, 255.9F, 300.0F, 1e-3F, 0x1p-40F, 0x1.fp-40F, 0x1.fp126F}) {
    // The least that is kept: just above half a spacing of subnormal numbers.
    const int exponent = std::ilogb(largest);
    const auto step = static_cast<float>(std::ldexp(1.0, exponent - 7 - 9));
    const std::vector<float> rounded = Rounded({0.5F * step, largest, 0.75F * step, -step});
    EXPECT_EQ(rounded[0], 0);
    EXPECT_NEAR(rounded[1] / largest, 1, 1.0 / 16);
    EXPECT_EQ(rounded[2], step);
    EXPECT_EQ(rounded[3], -step);
  }
}

// Subnormal numbers have steps of 2^-9, which with the largest power are 2^-56.
TEST(E4m3, BelowTheLargestPowerSmallNumbersHaveTheStepsThatItLeaves) {
  EXPECT_EQ(Rounded({0x1.2p-53F, 0x1p-57F, -0x1.8p-57F}), (std::vector<float>{0x1.2p-53F, 0, -0x1p-56F}));
  EXPECT_EQ(Rounded({0x1.3p-53F}), (std::vector<float>{0x1.4p-53F}));  // 9.5 steps, to the even one
  EXPECT_EQ(Rounded({0x1p-149F, -0x1p-58F}), (std::vector<float>{0, -0.0F}));
}

TEST(E4m3, RoundsRowsTogetherAndTouchesNothingBeside) {
  const std::vector<float> from = {1.0625F, -1000, 7, 100, 0.3F, 7};
  std::vector<float> to(8, 5.0F);
  RoundToE4m3(
      {.from = from.data(), .from_stride = 3, .to = to.data(), .to_stride = 4, .num_rows = 2, .width = 2});
  EXPECT_EQ(to, (std::vector<float>{1, -1024, 5, 5, 96, 0.3125F, 5, 5}));
  RoundToE4m3(
      {.from = from.data(), .from_stride = 3, .to = to.data(), .to_stride = 4, .num_rows = 2, .width = 0});
  RoundToE4m3({});
  EXPECT_EQ(to[0], 1);
}

TEST(E4m3, ZerosAndWhatIsNotFiniteStay) {
  EXPECT_EQ(Rounded({0, 0}), (std::vector<float>{0, 0}));
  EXPECT_TRUE(std::signbit(Rounded({-0.0F, 1})[0]));
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(Rounded({1.01F, -infinity}), (std::vector<float>{1.01F, -infinity}));
  const std::vector<float> with_nan = Rounded({1.01F, NAN});
  EXPECT_EQ(with_nan[0], 1.01F);
  EXPECT_TRUE(std::isnan(with_nan[1]));
  const std::vector<float> from = {1.01F, infinity};
  std::vector<float> to(2);
  RoundToE4m3({.from = from.data(), .to = to.data(), .num_rows = 1, .width = 2});
  EXPECT_EQ(to, from);
}

TEST(E4m3, TheLargestFloatsBecomeInfinite) {
  const float most = std::numeric_limits<float>::max();
  EXPECT_EQ(Rounded({most, 1}), (std::vector<float>{std::numeric_limits<float>::infinity(), 0}));
  EXPECT_EQ(Rounded({0x1.efp127F, -0x1.1p127F}), (std::vector<float>{0x1.ep127F, -0x1p127F}));
}

}  // namespace
}  // namespace longfill
