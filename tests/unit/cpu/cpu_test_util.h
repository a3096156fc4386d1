#ifndef LONGFILL_TESTS_UNIT_CPU_CPU_TEST_UTIL_H_
#define LONGFILL_TESTS_UNIT_CPU_CPU_TEST_UTIL_H_

// What the tests of the CPU kernels share: a backend with its threads and workspace, every instruction set of
// the machine as a test parameter, random arrays, strided arrays with canaries, comparisons that name the
// worst place.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "hwy/highway.h"
#include "kernels/api/backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {

inline constexpr float kTestInfinity = std::numeric_limits<float>::infinity();

class CpuBackend {
 public:
  explicit CpuBackend(int num_threads) : backend_(CreateCpuBackend(num_threads)) {}

  KernelSet& kernels() { return backend_->kernels(); }
  Stream& stream() { return backend_->stream(); }
  // Valid until the next call. Deliberately not aligned.
  Workspace WorkspaceOf(int64_t size_bytes) {
    scratch_.assign(static_cast<size_t>(size_bytes) + 4, 0x7F);
    return {scratch_.data() + 4, size_bytes};
  }

 private:
  const std::unique_ptr<Backend> backend_;
  std::vector<uint8_t> scratch_;
};

// Instruction sets that are compiled in and run on this machine.
inline std::vector<int64_t> TestTargets() {
  std::vector<int64_t> targets;
  for (int64_t target : {HWY_AVX3, HWY_AVX2, HWY_SSE4, HWY_STATIC_TARGET}) {
    const bool runs = target == HWY_STATIC_TARGET || (hwy::SupportedTargets() & target) != 0;
    if (runs && std::find(targets.begin(), targets.end(), target) == targets.end()) targets.push_back(target);
  }
  return targets;
}
inline bool HasFma(int64_t target) { return target == HWY_AVX3 || target == HWY_AVX2; }

// The code under test dispatches to `target` while this lives.
class ScopedTarget {
 public:
  explicit ScopedTarget(int64_t target) { hwy::GetChosenTarget().Update(target); }
  ~ScopedTarget() { hwy::GetChosenTarget().DeInit(); }
  ScopedTarget(const ScopedTarget&) = delete;
  ScopedTarget& operator=(const ScopedTarget&) = delete;
};

class TargetTest : public ::testing::TestWithParam<int64_t> {
 protected:
  ScopedTarget target_{GetParam()};
};
#define LF_INSTANTIATE_TARGETS(suite)                                                      \
  INSTANTIATE_TEST_SUITE_P(Targets, suite, ::testing::ValuesIn(::longfill::TestTargets()), \
                           [](const ::testing::TestParamInfo<int64_t>& target) {           \
                             return std::string(hwy::TargetName(target.param));            \
                           })

inline std::vector<float> RandomFloats(int64_t count, uint32_t seed, float scale = 1.0F) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// [heads, rows, dim] with gaps after rows and heads; the gaps hold NaN, so that whatever reads them shows.
struct StridedHeads {
  StridedHeads(const float* dense, int64_t heads, int64_t rows, int64_t dim, int64_t row_gap = 3,
               int64_t head_gap = 5)
      : num_heads(heads),
        num_rows(rows),
        head_dim(dim),
        row_stride(dim + row_gap),
        head_stride(rows * (dim + row_gap) + head_gap),
        // Nothing after the last row: a sanitizer sees what reads on.
        data(static_cast<size_t>(
                 heads * rows == 0 ? 0 : (heads - 1) * head_stride + (rows - 1) * row_stride + dim),
             std::numeric_limits<float>::quiet_NaN()) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < dim; ++i) {
          At(h, r, i) =
              dense == nullptr ? std::numeric_limits<float>::quiet_NaN() : dense[(h * rows + r) * dim + i];
        }
      }
    }
  }
  float& At(int64_t h, int64_t r, int64_t i) {
    return data[static_cast<size_t>(h * head_stride + r * row_stride + i)];
  }
  HeadsView<const float> view() const { return {data.data(), head_stride, row_stride}; }
  HeadsView<float> mutable_view() { return {data.data(), head_stride, row_stride}; }
  // Whether the gaps still hold NaN.
  bool GapsUntouched() const {
    for (size_t i = 0; i < data.size(); ++i) {
      const int64_t in_head = static_cast<int64_t>(i) % head_stride;
      const bool gap = in_head >= num_rows * row_stride || in_head % row_stride >= head_dim;
      if (gap && !std::isnan(data[i])) return false;
    }
    return true;
  }

  int64_t num_heads, num_rows, head_dim, row_stride, head_stride;
  std::vector<float> data;
};

// |got - want| <= tolerance everywhere, infinities equal, no NaN.
template <typename T, typename U>
::testing::AssertionResult Near(const std::vector<T>& got, const std::vector<U>& want, double tolerance) {
  if (got.size() != want.size()) {
    return ::testing::AssertionFailure() << "sizes " << got.size() << " and " << want.size();
  }
  size_t worst = 0;
  double worst_error = -1;
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = static_cast<double>(got[i]);
    const double b = static_cast<double>(want[i]);
    double error = a == b ? 0 : std::abs(a - b);
    if (std::isnan(error)) error = std::numeric_limits<double>::infinity();
    if (error > worst_error) {
      worst_error = error;
      worst = i;
    }
  }
  if (worst_error <= tolerance) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "at " << worst << ": " << got[worst] << " instead of "
                                       << want[worst] << ", error " << worst_error << " above " << tolerance;
}

template <typename T>
::testing::AssertionResult SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size())
    return ::testing::AssertionFailure() << "sizes " << a.size() << " and " << b.size();
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(T)) != 0) {
      return ::testing::AssertionFailure() << "at " << i << ": " << a[i] << " and " << b[i];
    }
  }
  return ::testing::AssertionSuccess();
}

template <typename T, typename U>
double MaxError(const std::vector<T>& a, const std::vector<U>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (static_cast<double>(a[i]) == static_cast<double>(b[i])) continue;
    worst = std::max(worst, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  }
  return worst;
}

}  // namespace longfill

#endif  // LONGFILL_TESTS_UNIT_CPU_CPU_TEST_UTIL_H_
