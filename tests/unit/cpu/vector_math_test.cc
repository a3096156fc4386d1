// The exponentials of kernels/cpu/vector_math-inl.h on every instruction set, against long double.
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/unit/cpu/vector_math_test.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/vector_math-inl.h"
#include "tests/unit/cpu/cpu_test_util.h"

HWY_BEFORE_NAMESPACE();
namespace longfill {
namespace HWY_NAMESPACE {

void Exponentials(const float* x, int64_t count, bool base2, float* out) {
  const hn::ScalableTag<float> d;
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(hn::Lanes(d))) {
    const auto v = hn::LoadU(d, x + i);
    hn::StoreU(base2 ? Exp2(d, v) : Exp(d, v), d, out + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace longfill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longfill {
namespace {

HWY_EXPORT(Exponentials);

class VectorMathTest : public TargetTest {
 protected:
  static std::vector<float> Compute(std::vector<float> x, bool base2) {
    const size_t count = x.size();
    x.resize(count + 64);  // whole vectors
    std::vector<float> out(x.size());
    HWY_DYNAMIC_DISPATCH(Exponentials)(x.data(), static_cast<int64_t>(count), base2, out.data());
    out.resize(count);
    return out;
  }
};
LF_INSTANTIATE_TARGETS(VectorMathTest);

TEST_P(VectorMathTest, AreWithinTwoUnitsInTheLastPlace) {
  for (bool base2 : {true, false}) {
    const float low = base2 ? -125.0F : -86.5F;
    std::vector<float> x;
    for (int64_t i = 0; i <= 400000; ++i)
      x.push_back(low + (10.0F - low) * static_cast<float>(i) / 400000.0F);
    const std::vector<float> got = Compute(x, base2);
    // Without fused multiply-add the rounding of x * log2(e) stays in the result.
    const double allowed_ulp = base2 ? 2.0 : HasFma(GetParam()) ? 2.0 : 80.0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = base2 ? std::exp2(double{x[i]}) : std::exp(double{x[i]});
      const double ulp = std::ldexp(1.0, std::ilogb(want) - 23);
      ASSERT_LE(std::abs(got[i] - want), allowed_ulp * ulp) << (base2 ? "2^" : "e^") << x[i];
    }
  }
}

TEST_P(VectorMathTest, AreExactAtTheEdges) {
  const float nan = std::nanf("");
  for (bool base2 : {true, false}) {
    const std::vector<float> got =
        Compute({0.0F, -0.0F, -kTestInfinity, -1e30F, -130.0F, -3e38F, nan}, base2);
    EXPECT_EQ(got[0], 1.0F);
    EXPECT_EQ(got[1], 1.0F);
    for (size_t i = 2; i < 6; ++i) EXPECT_EQ(got[i], 0.0F) << i;
    EXPECT_TRUE(std::isnan(got[6]));
  }
  EXPECT_EQ(Compute({-3.0F}, true)[0], 0.125F);
}

}  // namespace
}  // namespace longfill
#endif  // HWY_ONCE
