#ifndef LONGFILL_DEPLOY_CLI_ATTENTION_ROWS_H_
#define LONGFILL_DEPLOY_CLI_ATTENTION_ROWS_H_

// Single rows of attention by the definition, in fp64, and as a naive computation at the precision of a
// backend: what answers of any size are held to.

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/sparse/index_view.h"

namespace longfill {

// The inner product of `count` values, in sums that the compiler can vectorise.
template <typename T>
T Dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t kLanes = 8;
  std::array<T, kLanes> sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += static_cast<T>(a[i + lane]) * static_cast<T>(b[i + lane]);
    }
  }
  T sum = 0;
  for (; i < count; ++i) sum += static_cast<T>(a[i]) * static_cast<T>(b[i]);
  for (const T lane : sums) sum += lane;
  return sum;
}

// Rows of [0, num_tokens) to look at: first and last ones, those about borders of blocks of 64 and 128 rows,
// the rest at random, `count` in all where there are so many. Ascending.
std::vector<int64_t> SampleRows(int64_t num_tokens, int64_t count, uint64_t seed);

struct RowProblem {
  const float* q = nullptr;  // [head_dim]
  const float* k = nullptr;  // [num_tokens, head_dim]
  const float* v = nullptr;  // [num_tokens, head_dim]
  int64_t head_dim = 0;
  int64_t num_tokens = 0;
  int64_t row = 0;  // its position
  IndexView index;  // in host memory
  double scale = 0;
  DType dtype = DType::kFloat32;  // of the naive computation: scores and sums in fp32, probabilities and
                                  // results rounded to it
};

struct RowAnswer {
  std::vector<double> out;   // [head_dim]; 0 where the row covers no key
  double lse = 0;            // natural log; -infinity there
  std::vector<float> naive;  // [head_dim]
  float naive_lse = 0;
};

// Which keys the row covers is what kernels/sparse/coverage.h says.
RowAnswer ComputeRow(const RowProblem& problem);

// Euclidean |got - want| / |want|; 0 if both are 0, infinity where only `want` is 0 or `got` is no number.
double RelativeError(std::span<const float> got, std::span<const double> want);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_ATTENTION_ROWS_H_
