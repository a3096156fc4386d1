#include <algorithm>
#include <cmath>

#include "kernels/cpu/oracle/oracle.h"

namespace longfill::oracle {

int64_t DualChunkDistance(int64_t query, int64_t key, int64_t chunk_size, int64_t local_size) {
  const int64_t length = chunk_size - local_size;
  const int64_t chunks_apart = query / length - key / length;
  if (chunks_apart == 0) return query - key;
  const int64_t last_of_succ = std::min(length - 1 + length, chunk_size);
  const int64_t asked_at = chunks_apart == 1 ? std::min(query % length + length, chunk_size) : last_of_succ;
  return asked_at - key % length;
}

double DualChunkScore(const DualChunkInput& in, const float* q, const float* k, int64_t distance) {
  const int64_t half = std::ssize(in.inv_freq);
  double dot = 0;
  for (int64_t pair = 0; pair < half; ++pair) {
    const bool split = in.pairs == RotaryPairs::kHalfSplit;
    const int64_t a = split ? pair : 2 * pair;
    const int64_t b = split ? pair + half : 2 * pair + 1;
    const double angle = static_cast<double>(distance) * in.inv_freq[pair];
    const double cosine = std::cos(angle);
    const double sine = std::sin(angle);
    dot += (q[a] * cosine - q[b] * sine) * k[a] + (q[b] * cosine + q[a] * sine) * k[b];
  }
  return dot * in.attention_scale * in.attention_scale * in.attention.scale;
}

AttentionOutput<double> DualChunkAttention(const DualChunkInput& in, std::span<const Mask* const> masks) {
  const AttentionInput& at = in.attention;
  AttentionOutput<double> result;
  for (int64_t head = 0; head < at.num_q_heads; ++head) {
    const int64_t kv_head = head / (at.num_q_heads / at.num_kv_heads);
    const float* k = at.k + kv_head * at.num_keys * at.head_dim;
    const float* v = at.v + kv_head * at.num_keys * at.head_dim;
    for (int64_t query = 0; query < at.num_queries; ++query) {
      const float* q = at.q + (head * at.num_queries + query) * at.head_dim;
      double sum = 0;
      std::vector<double> out(at.head_dim, 0);
      for (int64_t key = 0; key <= query; ++key) {
        if (!masks[head]->At(query, key)) continue;
        const int64_t distance = DualChunkDistance(query, key, in.chunk_size, in.local_size);
        const double weight = std::exp(DualChunkScore(in, q, k + key * at.head_dim, distance));
        sum += weight;
        for (int64_t i = 0; i < at.head_dim; ++i) out[i] += weight * v[key * at.head_dim + i];
      }
      for (const double value : out) result.out.push_back(value / sum);
      result.lse.push_back(std::log(sum));
    }
  }
  return result;
}

}  // namespace longfill::oracle
