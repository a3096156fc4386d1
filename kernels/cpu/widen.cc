#include "kernels/cpu/widen.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/widen.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace longfill {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Each returns how many leading elements it converted; the caller does the rest.
int64_t WidenBFloat16(const uint16_t* source, int64_t count, float* destination) {
  const hn::ScalableTag<float> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  const hn::Rebind<uint16_t, decltype(d)> du16;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto bits = hn::PromoteTo(du, hn::LoadU(du16, source + i));
    hn::StoreU(hn::BitCast(d, hn::ShiftLeft<16>(bits)), d, destination + i);
  }
  return i;
}

// Where the instruction set lacks the conversion, Highway's emulation takes infinities for numbers, so the
// exact scalar code of the caller does it all.
int64_t WidenFloat16([[maybe_unused]] const uint16_t* source, [[maybe_unused]] int64_t count,
                     [[maybe_unused]] float* destination) {
#if HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128
  return 0;
#else
  const hn::ScalableTag<float> d;
  const hn::Rebind<hwy::float16_t, decltype(d)> d16;
  const hn::Rebind<uint16_t, decltype(d)> du16;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    hn::StoreU(hn::PromoteTo(d, hn::BitCast(d16, hn::LoadU(du16, source + i))), d, destination + i);
  }
  return i;
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace longfill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longfill {

HWY_EXPORT(WidenBFloat16);
HWY_EXPORT(WidenFloat16);

void Widen(const uint16_t* source, DType source_dtype, int64_t count, float* destination) {
  const int64_t done = source_dtype == DType::kBFloat16
                           ? HWY_DYNAMIC_DISPATCH(WidenBFloat16)(source, count, destination)
                           : HWY_DYNAMIC_DISPATCH(WidenFloat16)(source, count, destination);
  WidenToFloat(source + done, source_dtype, count - done, destination + done);
}

}  // namespace longfill
#endif  // HWY_ONCE
