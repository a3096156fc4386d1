#include "deploy/cli/attention_rows.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <set>

#include "kernels/sparse/coverage.h"

namespace longfill {
namespace {

float Rounded(float value, DType dtype) {
  if (dtype == DType::kBFloat16) return BFloat16ToFloat(FloatToBFloat16(value));
  if (dtype == DType::kFloat16) return Float16ToFloat(FloatToFloat16(value));
  return value;
}

std::vector<int32_t> CoveredKeys(const RowProblem& problem) {
  TileKeys tile;
  ExpandTile(problem.index, problem.row / kRowBlock, problem.num_tokens, &tile);
  std::vector<int32_t> keys;
  for (const KeyRange& range : tile.ranges) {
    int64_t begin = range.begin;
    if (range.max_distance != kNoMaxDistance) begin = std::max(begin, problem.row - range.max_distance + 1);
    const int64_t end = std::min(range.end, problem.row - range.min_distance + 1);
    for (int64_t key = begin; key < end; ++key) keys.push_back(static_cast<int32_t>(key));
  }
  for (const int32_t key : tile.columns) {
    if (key <= problem.row) keys.push_back(key);
  }
  return keys;
}

// `round` is applied to probabilities (their sum takes them as they are) and results.
template <typename T, typename Round>
void Softmax(const RowProblem& problem, std::span<const int32_t> keys, const Round& round,
             std::vector<T>* out, T* lse) {
  const int64_t dim = problem.head_dim;
  out->assign(static_cast<size_t>(dim), 0);
  *lse = -std::numeric_limits<T>::infinity();
  if (keys.empty()) return;
  std::vector<T> scores(keys.size());
  const T scale = static_cast<T>(problem.scale);
  for (size_t i = 0; i < keys.size(); ++i) {
    scores[i] = scale * Dot<T>(problem.q, problem.k + keys[i] * dim, dim);
  }
  const T max = *std::max_element(scores.begin(), scores.end());
  T sum = 0;
  T* const sums = out->data();
  for (size_t i = 0; i < keys.size(); ++i) {
    const T p = std::exp(scores[i] - max);
    sum += p;
    const T weight = round(p);
    const float* value = problem.v + keys[i] * dim;
    for (int64_t d = 0; d < dim; ++d) sums[d] += weight * static_cast<T>(value[d]);
  }
  for (T& value : *out) value = round(value / sum);
  *lse = max + std::log(sum);
}

}  // namespace

std::vector<int64_t> SampleRows(int64_t num_tokens, int64_t count, uint64_t seed) {
  std::set<int64_t> rows;
  const auto add = [&](int64_t row) {
    if (row >= 0 && row < num_tokens && static_cast<int64_t>(rows.size()) < count) rows.insert(row);
  };
  const int64_t middle = num_tokens / 2 / 128 * 128;
  for (const int64_t border : {int64_t{0}, num_tokens, int64_t{64}, int64_t{128}, middle, middle + 64,
                               (num_tokens - 1) / 128 * 128, (num_tokens - 1) / 64 * 64}) {
    add(border - 1);
    add(border);
  }
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int64_t> draw(0, num_tokens - 1);
  const int64_t wanted = std::min(count, num_tokens);
  while (static_cast<int64_t>(rows.size()) < wanted) rows.insert(draw(random));
  return {rows.begin(), rows.end()};
}

RowAnswer ComputeRow(const RowProblem& problem) {
  const std::vector<int32_t> keys = CoveredKeys(problem);
  RowAnswer answer;
  Softmax<double>(
      problem, keys, [](double value) { return value; }, &answer.out, &answer.lse);
  Softmax<float>(
      problem, keys, [&](float value) { return Rounded(value, problem.dtype); }, &answer.naive,
      &answer.naive_lse);
  return answer;
}

double RelativeError(std::span<const float> got, std::span<const double> want) {
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double difference = double{got[i]} - want[i];
    error += difference * difference;
    norm += want[i] * want[i];
  }
  if (error == 0) return 0;
  const double relative = std::sqrt(error / norm);
  return std::isfinite(relative) ? relative : std::numeric_limits<double>::infinity();
}

}  // namespace longfill
