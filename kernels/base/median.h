#ifndef LONGFILL_KERNELS_BASE_MEDIAN_H_
#define LONGFILL_KERNELS_BASE_MEDIAN_H_

#include <algorithm>
#include <cstddef>
#include <vector>

namespace longfill {

// Of an even number the mean of the middle two. Precondition: not empty.
inline double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

}  // namespace longfill

#endif  // LONGFILL_KERNELS_BASE_MEDIAN_H_
