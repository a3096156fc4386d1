#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/cpu/oracle/oracle.h"

namespace longfill::oracle {
namespace {

constexpr int64_t kBlock = 64;

// [ceil(num_tokens / 64), head_dim] means over the rows that exist.
std::vector<double> MeanPool(const float* x, int64_t num_tokens, int64_t head_dim) {
  const int64_t num_blocks = (num_tokens + kBlock - 1) / kBlock;
  std::vector<double> means(num_blocks * head_dim, 0);
  for (int64_t row = 0; row < num_tokens; ++row) {
    const int64_t block = row / kBlock;
    const double rows = static_cast<double>(std::min(kBlock, num_tokens - block * kBlock));
    for (int64_t i = 0; i < head_dim; ++i) means[block * head_dim + i] += x[row * head_dim + i] / rows;
  }
  return means;
}

}  // namespace

BlockSelection SelectBlocks(const float* q, const float* k, int64_t num_tokens, int64_t head_dim,
                            int64_t num_blocks, bool force) {
  const std::vector<double> mean_q = MeanPool(q, num_tokens, head_dim);
  const std::vector<double> mean_k = MeanPool(k, num_tokens, head_dim);
  BlockSelection result;
  for (int64_t m = 0; m * kBlock < num_tokens; ++m) {
    std::vector<double> scores(m + 1, 0);
    for (int64_t n = 0; n <= m; ++n) {
      for (int64_t i = 0; i < head_dim; ++i) scores[n] += mean_q[m * head_dim + i] * mean_k[n * head_dim + i];
    }
    std::vector<double> ranked = scores;
    if (force) {
      if (num_blocks > 1) ranked[0] = std::numeric_limits<double>::infinity();
      ranked[m] = std::numeric_limits<double>::infinity();
    }
    std::vector<int32_t> order(m + 1);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return ranked[a] > ranked[b]; });
    order.resize(std::min(num_blocks, m + 1));
    std::sort(order.begin(), order.end());
    result.scores.push_back(std::move(scores));
    result.blocks.push_back(std::move(order));
  }
  return result;
}

}  // namespace longfill::oracle
