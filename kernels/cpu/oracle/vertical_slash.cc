#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/cpu/oracle/oracle.h"

namespace longfill::oracle {
namespace {

// The `count` positions that come first when forced ones lead and larger scores follow, ties to the lower;
// ascending.
std::vector<int32_t> Largest(const std::vector<double>& scores, int64_t num_forced, int64_t count) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const bool a_forced = a < num_forced;
    const bool b_forced = b < num_forced;
    if (a_forced != b_forced) return a_forced;
    return !a_forced && scores[a] > scores[b];
  });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace

VerticalSlashSelection SelectVerticalSlash(const float* q, const float* k, int64_t num_tokens,
                                           int64_t head_dim, double scale, const VerticalSlash& budget) {
  VerticalSlashSelection result;
  result.vertical_scores.assign(num_tokens, 0);
  result.slash_scores.assign(num_tokens, 0);
  for (int64_t query = std::max<int64_t>(0, num_tokens - 64); query < num_tokens; ++query) {
    std::vector<double> p(query + 1);
    for (int64_t key = 0; key <= query; ++key) {
      double dot = 0;
      for (int64_t i = 0; i < head_dim; ++i) {
        dot += static_cast<double>(q[query * head_dim + i]) * static_cast<double>(k[key * head_dim + i]);
      }
      p[key] = dot * scale;
    }
    const double max = *std::max_element(p.begin(), p.end());
    double sum = 0;
    for (double& value : p) sum += value = std::exp(value - max);
    for (int64_t key = 0; key <= query; ++key) {
      result.vertical_scores[key] += p[key] / sum;
      result.slash_scores[query - key] += p[key] / sum;
    }
  }
  const int64_t vertical = std::min(num_tokens, std::max<int64_t>(budget.vertical, 30));
  const int64_t slash = std::min(num_tokens, std::max<int64_t>(budget.slash, 50));
  result.columns = Largest(result.vertical_scores, 30, vertical);
  result.distances = Largest(result.slash_scores, 100, slash);
  return result;
}

}  // namespace longfill::oracle
