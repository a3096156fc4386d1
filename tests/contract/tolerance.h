#ifndef LONGFILL_TESTS_CONTRACT_TOLERANCE_H_
#define LONGFILL_TESTS_CONTRACT_TOLERANCE_H_

// How far a result may be from the fp64 oracle.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace longfill {

// Passes if no element of `got` is further from `want` than twice the largest error of `naive`: the plain
// computation in fp32, rounded to the type of `got`. Errors are relative to `scale` (one for each element:
// the magnitude of what its sum is made of). An array too small to meet a rounding error is given one,
// `epsilon`.
inline ::testing::AssertionResult WithinTwiceNaive(const std::vector<float>& got,
                                                   const std::vector<double>& want,
                                                   const std::vector<float>& naive,
                                                   const std::vector<double>& scale, double epsilon) {
  if (got.size() != want.size() || naive.size() != want.size() || scale.size() != want.size()) {
    return ::testing::AssertionFailure()
           << "sizes " << got.size() << ", " << want.size() << ", " << naive.size() << ", " << scale.size();
  }
  double naive_error = epsilon;
  for (size_t i = 0; i < want.size(); ++i) {
    if (scale[i] > 0) naive_error = std::max(naive_error, std::abs(naive[i] - want[i]) / scale[i]);
  }
  for (size_t i = 0; i < want.size(); ++i) {
    const double limit = 2 * naive_error * scale[i];
    if (!(std::abs(got[i] - want[i]) <= limit)) {
      return ::testing::AssertionFailure()
             << "element " << i << " is " << got[i] << ", the oracle has " << want[i] << ", the naive result "
             << naive[i] << "; allowed are " << limit << ", twice the naive error";
    }
  }
  return ::testing::AssertionSuccess();
}

// Scales for products, each of its own magnitude, and for sums whose parts are alike: that of the largest.
// Below 2^-13, next to where fp16 has fewer digits, errors of products count as absolute ones.
inline std::vector<double> Magnitudes(const std::vector<double>& values) {
  std::vector<double> magnitudes;
  for (const double value : values) magnitudes.push_back(std::max(std::abs(value), 0x1p-13));
  return magnitudes;
}
inline std::vector<double> LargestMagnitude(const std::vector<double>& values) {
  double largest = 0;
  for (const double value : values) largest = std::max(largest, std::abs(value));
  return std::vector<double>(values.size(), largest);
}

}  // namespace longfill

#endif  // LONGFILL_TESTS_CONTRACT_TOLERANCE_H_
