#include "kernels/cpu/elementwise_simd.h"

#include <cmath>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/elementwise_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace longfill {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using RowTag = hn::CappedTag<float, 16>;

// The last, partial vector of a row goes through a buffer, so that it is computed like all others and nothing
// is read or written beyond the row.
struct TailBuffer {
  alignas(64) float data[16] = {};
};

float SumOfSquares(const float* x, int64_t width) {
  const RowTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto sum0 = hn::Zero(d);
  auto sum1 = hn::Zero(d);
  int64_t i = 0;
  for (; i + 2 * lanes <= width; i += 2 * lanes) {
    const auto a = hn::LoadU(d, x + i);
    const auto b = hn::LoadU(d, x + i + lanes);
    sum0 = hn::MulAdd(a, a, sum0);
    sum1 = hn::MulAdd(b, b, sum1);
  }
  for (; i < width; i += lanes) {
    TailBuffer tail;
    std::memcpy(tail.data, x + i, static_cast<size_t>(HWY_MIN(lanes, width - i)) * sizeof(float));
    const auto a = hn::Load(d, tail.data);
    sum0 = hn::MulAdd(a, a, sum0);
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(sum0, sum1)));
}

void ScaleRow(const float* x, const float* weight, float factor, int64_t width, float* out) {
  const RowTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto scale = hn::Set(d, factor);
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    hn::StoreU(hn::Mul(hn::Mul(hn::LoadU(d, x + i), scale), hn::LoadU(d, weight + i)), d, out + i);
  }
  for (; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

// 1 / (1 + e^-x) without overflow on either side.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Sigmoid(D d, V x) {
  const V one = hn::Set(d, 1.0F);
  const V e = Exp(d, hn::Neg(hn::Abs(x)));
  return hn::Div(hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one), hn::Add(one, e));
}

template <bool kGelu, class D, class V = hn::Vec<D>>
HWY_INLINE V Activate(D d, V x) {
  if (!kGelu) return hn::Mul(x, Sigmoid(d, x));
  // x / 2 (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3); arXiv 1606.08415.
  const V cubic = hn::MulAdd(hn::Mul(x, x), hn::Set(d, 0.044715F * 1.59576912F), hn::Set(d, 1.59576912F));
  return hn::Mul(x, Sigmoid(d, hn::Mul(x, cubic)));
}

template <bool kGelu>
void GatedRow(const float* gate, const float* up, int64_t width, float* out) {
  const RowTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) {
    hn::StoreU(hn::Mul(Activate<kGelu>(d, hn::LoadU(d, gate + i)), hn::LoadU(d, up + i)), d, out + i);
  }
  if (i == width) return;
  const size_t rest_bytes = static_cast<size_t>(width - i) * sizeof(float);
  TailBuffer a, b;
  std::memcpy(a.data, gate + i, rest_bytes);
  std::memcpy(b.data, up + i, rest_bytes);
  hn::Store(hn::Mul(Activate<kGelu>(d, hn::Load(d, a.data)), hn::Load(d, b.data)), d, a.data);
  std::memcpy(out + i, a.data, rest_bytes);
}

void SiluRow(const float* gate, const float* up, int64_t width, float* out) {
  GatedRow<false>(gate, up, width, out);
}
void GeluRow(const float* gate, const float* up, int64_t width, float* out) {
  GatedRow<true>(gate, up, width, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace longfill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longfill {

HWY_EXPORT(SumOfSquares);
HWY_EXPORT(ScaleRow);
HWY_EXPORT(SiluRow);
HWY_EXPORT(GeluRow);

void RmsNormRow(const float* x, const float* weight, float epsilon, int64_t width, float* out) {
  const double mean = double{HWY_DYNAMIC_DISPATCH(SumOfSquares)(x, width)} / static_cast<double>(width);
  const float factor = static_cast<float>(1.0 / std::sqrt(mean + epsilon));
  HWY_DYNAMIC_DISPATCH(ScaleRow)(x, weight, factor, width, out);
}

void GatedActivationRow(const float* gate, const float* up, Activation activation, int64_t width,
                        float* out) {
  switch (activation) {
    case Activation::kSilu:
      HWY_DYNAMIC_DISPATCH(SiluRow)(gate, up, width, out);
      return;
    case Activation::kGeluTanh:
      HWY_DYNAMIC_DISPATCH(GeluRow)(gate, up, width, out);
      return;
  }
}

}  // namespace longfill
#endif  // HWY_ONCE
