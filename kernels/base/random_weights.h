#ifndef LONGFILL_KERNELS_BASE_RANDOM_WEIGHTS_H_
#define LONGFILL_KERNELS_BASE_RANDOM_WEIGHTS_H_

// The numbers of KernelSet::FillRandom, for host and device code alike (nvcc: --expt-relaxed-constexpr).
//
// Element i of seed s takes the outputs 3i, 3i + 1 and 3i + 2 of the splitmix64 generator (Steele, Lea and
// Flood, OOPSLA 2014) whose state starts at Mix(s), cuts each into four 16-bit integers, and sums the twelve:
// mean 6 * 65535, variance 2^32 - 1. Minus the mean and over 2^16 that is a number of mean 0 and variance 1
// within [-6, 6] whose distribution is close to normal. It is a multiple of 2^-16 below 2^3: exact in
// fp32. One fp32 product with stddev, then one rounding to the storage type.

#include <cstdint>

namespace longfill::random_weights {

constexpr uint64_t Mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// Where the generator of a seed starts; once for a whole array.
constexpr uint64_t Start(uint64_t seed) { return Mix(seed); }

// Element `index`, of variance 1.
constexpr float Standard(uint64_t start, int64_t index) {
  constexpr uint64_t kStep = 0x9E3779B97F4A7C15;
  constexpr uint64_t kEven = 0x0000FFFF0000FFFF;
  uint64_t state = start + 3 * static_cast<uint64_t>(index) * kStep;
  uint64_t sums = 0;  // two sums of 16-bit integers, 32 bits apart
  for (int draw = 0; draw < 3; ++draw) {
    state += kStep;
    const uint64_t bits = Mix(state);
    sums += (bits & kEven) + ((bits >> 16) & kEven);
  }
  const auto sum = static_cast<int32_t>((sums & 0xFFFFFFFF) + (sums >> 32));
  return static_cast<float>(sum - 6 * 65535) * 0x1p-16F;
}

constexpr float Element(uint64_t start, int64_t index, float stddev) {
  return stddev * Standard(start, index);
}

}  // namespace longfill::random_weights

#endif  // LONGFILL_KERNELS_BASE_RANDOM_WEIGHTS_H_
