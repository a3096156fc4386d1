#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/oracle/oracle.h"

namespace longfill::oracle {
namespace {

template <typename T>
AttentionOutput<T> MaskedAttention(const AttentionInput& in, std::span<const Mask* const> masks) {
  const int64_t dim = in.head_dim;
  AttentionOutput<T> result;
  result.out.assign(in.num_q_heads * in.num_queries * dim, 0);
  result.lse.assign(in.num_q_heads * in.num_queries, -std::numeric_limits<T>::infinity());
  std::vector<T> scores(in.num_keys);
  for (int64_t head = 0; head < in.num_q_heads; ++head) {
    const int64_t kv_head = head / (in.num_q_heads / in.num_kv_heads);
    const float* k = in.k + kv_head * in.num_keys * dim;
    const float* v = in.v + kv_head * in.num_keys * dim;
    for (int64_t row = 0; row < in.num_queries; ++row) {
      const int64_t at = head * in.num_queries + row;
      const float* q = in.q + at * dim;
      T max = -std::numeric_limits<T>::infinity();
      for (int64_t key = 0; key < in.num_keys; ++key) {
        if (!masks[head]->At(row, key)) continue;
        T dot = 0;
        for (int64_t i = 0; i < dim; ++i) dot += static_cast<T>(q[i]) * static_cast<T>(k[key * dim + i]);
        scores[key] = dot * static_cast<T>(in.scale);
        max = std::max(max, scores[key]);
      }
      if (max == -std::numeric_limits<T>::infinity()) continue;
      T sum = 0;
      T* out = result.out.data() + at * dim;
      for (int64_t key = 0; key < in.num_keys; ++key) {
        if (!masks[head]->At(row, key)) continue;
        const T weight = std::exp(scores[key] - max);
        sum += weight;
        for (int64_t i = 0; i < dim; ++i) out[i] += weight * static_cast<T>(v[key * dim + i]);
      }
      for (int64_t i = 0; i < dim; ++i) out[i] /= sum;
      result.lse[at] = max + std::log(sum);
    }
  }
  return result;
}

}  // namespace

AttentionOutput<double> Attention(const AttentionInput& input, std::span<const Mask* const> masks) {
  return MaskedAttention<double>(input, masks);
}

AttentionOutput<float> NaiveFloatAttention(const AttentionInput& input, std::span<const Mask* const> masks) {
  return MaskedAttention<float>(input, masks);
}

}  // namespace longfill::oracle
