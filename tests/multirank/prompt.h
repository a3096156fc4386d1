#ifndef LONGFILL_TESTS_MULTIRANK_PROMPT_H_
#define LONGFILL_TESTS_MULTIRANK_PROMPT_H_

// A random prompt's Q, K and V, whole and as one rank holds them in the memory of its backend.

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/api/backend.h"
#include "parallel/attention_geometry.h"
#include "parallel/mesh.h"
#include "parallel/staged_communicator.h"
#include "tests/testing/status_matchers.h"

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
      Round(values);
    }
  }

  ShardPlan Plan(const Mesh& mesh) const {
    return deal_block > 0 ? ShardPlan(mesh, num_tokens, deal_block) : ShardPlan(mesh, num_tokens);
  }

  AttentionGeometry geometry;
  int64_t num_tokens = 0;
  int64_t deal_block = 0;      // 0: that of its length
  std::vector<float> q, k, v;  // [heads, num_tokens, head_dim], values that bfloat16 holds exactly
  RotaryParams query_rotary;   // where dual chunks split it

 private:
  static void Round(std::vector<float>* values) {
    std::vector<uint16_t> narrow(values->size());
    const auto count = static_cast<int64_t>(values->size());
    NarrowFromFloat(values->data(), count, DType::kBFloat16, narrow.data());
    WidenToFloat(narrow.data(), DType::kBFloat16, count, values->data());
  }
};

// One rank's share.
struct RankPrompt {
  RankPrompt(const Prompt& prompt, const ShardPlan& plan, int rank, Backend& backend_in)
      : backend(backend_in), width(prompt.geometry.head_dim), num_rows(plan.NumTokens(rank)) {
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
      return Upload(mine);
    };
    q = deal(prompt.q, prompt.geometry.num_q_heads);
    k = deal(prompt.k, prompt.geometry.num_kv_heads);
    v = deal(prompt.v, prompt.geometry.num_kv_heads);
  }

  HeadsView<const void> View(const Buffer& values) const { return {values.data(), num_rows * width, width}; }

  // fp32 on the host to the compute dtype on the device and back.
  Buffer Upload(const std::vector<float>& values) const {
    const auto count = static_cast<int64_t>(values.size());
    const DType dtype = backend.kernels().compute_dtype();
    std::vector<char> narrow(count * DTypeBytes(dtype));
    NarrowFromFloat(values.data(), count, dtype, narrow.data());
    absl::StatusOr<Buffer> buffer =
        backend.memory().Allocate(static_cast<int64_t>(narrow.size()), "a test array");
    EXPECT_THAT(buffer, IsOk());
    if (!buffer.ok()) return {};
    LF_EXPECT_OK(
        backend.kernels().CopyIn(buffer->data(), narrow.data(), buffer->size_bytes(), backend.stream()));
    return *std::move(buffer);
  }
  std::vector<float> Download(const Buffer& buffer) const {
    const DType dtype = backend.kernels().compute_dtype();
    std::vector<char> narrow(buffer.size_bytes());
    LF_EXPECT_OK(
        backend.kernels().CopyOut(narrow.data(), buffer.data(), buffer.size_bytes(), backend.stream()));
    LF_EXPECT_OK(backend.stream().Sync());
    std::vector<float> values(narrow.size() / DTypeBytes(dtype));
    WidenToFloat(narrow.data(), dtype, static_cast<int64_t>(values.size()), values.data());
    return values;
  }

  Backend& backend;
  int64_t width = 0;
  int64_t num_rows = 0;
  Buffer q, k, v;
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_MULTIRANK_PROMPT_H_
