// Vector functions in fp32, included once for each Highway target. Sequences of exactly rounded operations
// only, so that every target with fused multiply-add gives the same bits.
#if defined(LONGFILL_KERNELS_CPU_VECTOR_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LONGFILL_KERNELS_CPU_VECTOR_MATH_INL_H_
#undef LONGFILL_KERNELS_CPU_VECTOR_MATH_INL_H_
#else
#define LONGFILL_KERNELS_CPU_VECTOR_MATH_INL_H_
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace longfill {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// 2^(x + low) for x <= 127 and |low| tiny against x; exactly 0 below 2^-125, so that no subnormal is formed;
// NaN stays NaN. Relative error below 1.5 units in the last place (polynomial 9e-9).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp2WithLow(D d, V x, V low) {
  const hn::RebindToSigned<D> di;
  // The low bits of x + magic are round(x) + 127, the exponent field of 2^round(x).
  const V magic = hn::Set(d, 12582912.0F + 127.0F);  // 1.5 * 2^23 + 127
  const V shifted = hn::Add(x, magic);
  const V r = hn::Add(hn::Sub(x, hn::Sub(shifted, magic)), low);
  V p = hn::MulAdd(r, hn::Set(d, 0.000154531634F), hn::Set(d, 0.00133908633F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.00961808302F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.0555035695F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.240226507F));
  p = hn::MulAdd(p, r, hn::Set(d, 0.693147182F));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0F));
  const V power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(di, shifted)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -125.0F)), hn::Mul(p, power));
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp2(D d, V x) {
  return Exp2WithLow(d, x, hn::Zero(d));
}

// e^x for x <= 88; below about -86.6 exactly 0.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp(D d, V x) {
  const V log2_e = hn::Set(d, 1.44269502F);
  const V log2_e_low = hn::Set(d, 1.92596303e-8F);  // log2(e) - log2_e
  const V t = hn::Mul(x, log2_e);
  const V product_error = hn::MulSub(x, log2_e, t);  // 0 without fused multiply-add
  // -inf - -inf and -inf * 0 would be NaN in the low part, but such lanes are zeroed by t < -125.
  return Exp2WithLow(d, t, hn::MulAdd(x, log2_e_low, product_error));
}

}  // namespace HWY_NAMESPACE
}  // namespace longfill
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
