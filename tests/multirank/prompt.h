#ifndef LONGFILL_TESTS_MULTIRANK_PROMPT_H_
#define LONGFILL_TESTS_MULTIRANK_PROMPT_H_

// A random prompt's Q, K and V, whole and as one rank holds them, and everything a rank needs to work on
// them.

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cpu/cpu_kernel_set.h"
#include "parallel/attention_geometry.h"
#include "parallel/mesh.h"

namespace longfill {

inline AttentionGeometry MakeGeometry(int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim = 64) {
  return {num_q_heads, num_kv_heads, head_dim, 1.0f / std::sqrt(static_cast<float>(head_dim))};
}

struct Prompt {
  Prompt(const AttentionGeometry& geometry_in, int64_t num_tokens_in, uint32_t seed)
      : geometry(geometry_in), num_tokens(num_tokens_in) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 1.5f);
    const int64_t per_head = num_tokens * geometry.head_dim;
    for (auto* values : {&q, &k, &v}) {
      values->resize(per_head * (values == &q ? geometry.num_q_heads : geometry.num_kv_heads));
      for (float& value : *values) value = normal(random);
    }
  }

  AttentionGeometry geometry;
  int64_t num_tokens = 0;
  std::vector<float> q, k, v;  // [heads, num_tokens, head_dim]
};

// One rank's share, and its backend.
struct RankPrompt {
  RankPrompt(const Prompt& prompt, const ShardPlan& plan, int rank, int64_t memory_limit_bytes = 0)
      : memory(memory_limit_bytes),
        kernels(CreateCpuKernelSet(pool, memory)),
        width(prompt.geometry.head_dim),
        num_rows(plan.NumTokens(rank)) {
    const PositionMap positions = plan.TokenPositions(rank);
    const auto deal = [&](const std::vector<float>& whole, int64_t heads) {
      std::vector<float> mine(heads * num_rows * width);
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t row = 0; row < num_rows; ++row) {
          std::memcpy(&mine[(h * num_rows + row) * width],
                      &whole[(h * prompt.num_tokens + positions.Position(row)) * width],
                      width * sizeof(float));
        }
      }
      return mine;
    };
    q = deal(prompt.q, prompt.geometry.num_q_heads);
    k = deal(prompt.k, prompt.geometry.num_kv_heads);
    v = deal(prompt.v, prompt.geometry.num_kv_heads);
  }

  HeadsView<const float> View(const std::vector<float>& values) const {
    return {values.data(), num_rows * width, width};
  }

  ThreadPool pool{1};
  CpuMemoryResource memory;
  std::unique_ptr<KernelSet> kernels;
  int64_t width = 0;
  int64_t num_rows = 0;
  std::vector<float> q, k, v;
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_MULTIRANK_PROMPT_H_
