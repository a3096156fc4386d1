#ifndef LONGFILL_TESTS_MULTIRANK_DUAL_CHUNK_PROMPT_H_
#define LONGFILL_TESTS_MULTIRANK_DUAL_CHUNK_PROMPT_H_

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/multirank/prompt.h"

namespace longfill {

// A prompt for dual chunk attention: keys are rotated at their place in their chunk, queries too where there
// is one chunk, and not where there are several.
struct DualChunkPrompt : Prompt {
  DualChunkPrompt(AttentionGeometry geometry_in, const DualChunk& dual_chunk, int64_t num_tokens_in,
                  uint32_t seed)
      : Prompt(WithChunks(geometry_in, dual_chunk), num_tokens_in, seed), plain_q(q), plain_k(k) {
    const auto dim = static_cast<double>(geometry.head_dim);
    for (int i = 0; 2 * i < geometry.head_dim; ++i) inv_freq.push_back(std::pow(500.0, -2.0 * i / dim));
    std::vector<int64_t> places;
    places.reserve(static_cast<size_t>(num_tokens));
    for (int64_t token = 0; token < num_tokens; ++token) places.push_back(token % dual_chunk.chunk_len());
    RotateAll(places, &k);
    if (!dual_chunk.Splits(num_tokens)) RotateAll(places, &q);
    query_rotary.inv_freq = inv_freq;
    query_rotary.attention_scale = kScale;
    query_rotary.rotary_dim = geometry.head_dim;
    query_rotary.head_dim = geometry.head_dim;
  }
  DualChunkPrompt(const DualChunkPrompt&) = delete;  // query_rotary points into it
  DualChunkPrompt& operator=(const DualChunkPrompt&) = delete;

  oracle::DualChunkInput OracleInput() const {
    oracle::DualChunkInput input;
    input.attention = {plain_q.data(),       plain_k.data(),        v.data(),
                       geometry.num_q_heads, geometry.num_kv_heads, num_tokens,
                       num_tokens,           geometry.head_dim,     geometry.scale};
    input.inv_freq = inv_freq;
    input.attention_scale = kScale;
    input.chunk_size = geometry.dual_chunk.chunk_size;
    input.local_size = geometry.dual_chunk.local_size;
    return input;
  }

  static constexpr float kScale = 1.125f;
  std::vector<float> plain_q, plain_k;
  std::vector<double> inv_freq;

 private:
  static AttentionGeometry WithChunks(AttentionGeometry geometry, const DualChunk& dual_chunk) {
    geometry.dual_chunk = dual_chunk;
    return geometry;
  }
  void RotateAll(const std::vector<int64_t>& places, std::vector<float>* x) const {
    const auto per_head = static_cast<size_t>(num_tokens * geometry.head_dim);
    for (size_t at = 0; at < x->size(); at += per_head) {
      oracle::RotaryInput input;
      input.x = x->data() + at;
      input.inv_freq = inv_freq;
      input.position = places;
      input.attention_scale = kScale;
      input.num_heads = 1;
      input.head_dim = geometry.head_dim;
      const std::vector<double> rotated = oracle::Rotary(input);
      std::transform(rotated.begin(), rotated.end(), x->begin() + static_cast<std::ptrdiff_t>(at),
                     [](double value) { return static_cast<float>(value); });
    }
  }
};

// Caps on a tile, inside one, and nowhere.
inline constexpr DualChunk kDualChunks[] = {{192, 64}, {160, 32}, {300, 172}, {400, 144}};

}  // namespace longfill

#endif  // LONGFILL_TESTS_MULTIRANK_DUAL_CHUNK_PROMPT_H_
