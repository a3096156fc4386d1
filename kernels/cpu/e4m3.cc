#include "kernels/cpu/e4m3.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "kernels/sparse/head_pattern.h"

namespace longfill {
namespace {

constexpr int32_t kSign = std::numeric_limits<int32_t>::min();
constexpr int kFractionBits = 23;
constexpr int32_t kExponentMask = 0xff << kFractionBits;
constexpr int kBias = 127;
constexpr int kE4m3FractionBits = 3;
constexpr int kE4m3LeastExponent = -6;  // of normal numbers; subnormal ones have its spacing
constexpr int kLargestExponent = 7;     // that elements are brought to

constexpr int32_t BitsOfPower(int exponent) { return (exponent + kBias) << kFractionBits; }
constexpr float Power(int exponent) { return std::bit_cast<float>(BitsOfPower(exponent)); }

// Of floats, in the order of magnitudes; beyond all finite ones for infinity and NaN.
int32_t LargestMagnitudeBits(const RowsToRound& rows) {
  int32_t largest = 0;
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const float* from = rows.from + row * rows.from_stride;
    for (int64_t i = 0; i < rows.width; ++i) {
      largest = std::max(largest, std::bit_cast<int32_t>(from[i]) & ~kSign);
    }
  }
  return largest;
}

// Of |x| below 256: adding a power of two whose last fraction bit is worth one spacing of E4M3 at x rounds
// to it, to nearest even.
float RoundOne(float x) {
  const auto bits = std::bit_cast<int32_t>(x);
  const auto magnitude = std::bit_cast<float>(bits & ~kSign);
  const int32_t exponent_bits = std::max(bits & kExponentMask, BitsOfPower(kE4m3LeastExponent));
  const auto rounder =
      std::bit_cast<float>(exponent_bits + ((kFractionBits - kE4m3FractionBits) << kFractionBits));
  const float rounded = (magnitude + rounder) - rounder;
  return std::bit_cast<float>(std::bit_cast<int32_t>(rounded) | (bits & kSign));
}

}  // namespace

void RoundToE4m3(const RowsToRound& rows) {
  const int32_t largest = LargestMagnitudeBits(rows);
  const bool copies = largest == 0 || largest >= kExponentMask;
  const int exponent =
      copies ? 0 : std::min(kMostFp8Power, kLargestExponent + kBias - (largest >> kFractionBits));
  const float up = Power(exponent), down = Power(-exponent);
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const float* from = rows.from + row * rows.from_stride;
    float* to = rows.to + row * rows.to_stride;
    if (copies) {
      if (from != to) std::copy_n(from, rows.width, to);
      continue;
    }
    for (int64_t i = 0; i < rows.width; ++i) {
      to[i] = RoundOne(from[i] * up) * down;
    }
  }
}

}  // namespace longfill
