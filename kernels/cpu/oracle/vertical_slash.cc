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

// score(query, key) of the queries [first_query, num_keys) for the keys before each and its own.
template <typename Score>
VerticalSlashSelection Select(int64_t first_query, int64_t num_keys, const VerticalSlash& budget,
                              const Score& score) {
  VerticalSlashSelection result;
  result.vertical_scores.assign(num_keys, 0);
  result.slash_scores.assign(num_keys, 0);
  for (int64_t query = first_query; query < num_keys; ++query) {
    std::vector<double> p(query + 1);
    for (int64_t key = 0; key <= query; ++key) p[key] = score(query, key);
    const double max = *std::max_element(p.begin(), p.end());
    double sum = 0;
    for (double& value : p) sum += value = std::exp(value - max);
    for (int64_t key = 0; key <= query; ++key) {
      result.vertical_scores[key] += p[key] / sum;
      result.slash_scores[query - key] += p[key] / sum;
    }
  }
  const int64_t vertical = std::min(num_keys, std::max<int64_t>(budget.vertical, 30));
  const int64_t slash = std::min(num_keys, std::max<int64_t>(budget.slash, 50));
  result.columns = Largest(result.vertical_scores, 30, vertical);
  result.distances = Largest(result.slash_scores, 100, slash);
  return result;
}

}  // namespace

VerticalSlashSelection SelectVerticalSlash(const float* q, const float* k, int64_t num_tokens,
                                           int64_t head_dim, double scale, const VerticalSlash& budget) {
  return Select(std::max<int64_t>(0, num_tokens - 64), num_tokens, budget, [&](int64_t query, int64_t key) {
    double dot = 0;
    for (int64_t i = 0; i < head_dim; ++i) {
      dot += static_cast<double>(q[query * head_dim + i]) * static_cast<double>(k[key * head_dim + i]);
    }
    return dot * scale;
  });
}

VerticalSlashSelection SelectInDualChunk(const DualChunkInput& in, int64_t head, int64_t chunk,
                                         const VerticalSlash& budget) {
  const int64_t length = in.chunk_size - in.local_size;
  const int64_t end = std::min(in.attention.num_keys, (chunk + 1) * length);
  const int64_t kv_head = head / (in.attention.num_q_heads / in.attention.num_kv_heads);
  const int64_t dim = in.attention.head_dim;
  return Select(std::max(chunk * length, end - 64), end, budget, [&](int64_t query, int64_t key) {
    const float* q = in.attention.q + (head * in.attention.num_queries + query) * dim;
    const float* k = in.attention.k + (kv_head * in.attention.num_keys + key) * dim;
    const bool near = query / length - key / length <= 1;
    return DualChunkScore(in, q, k, near ? query - key : query % length + in.chunk_size - key % length);
  });
}

}  // namespace longfill::oracle
