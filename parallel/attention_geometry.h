#ifndef LONGFILL_PARALLEL_ATTENTION_GEOMETRY_H_
#define LONGFILL_PARALLEL_ATTENTION_GEOMETRY_H_

#include <cstdint>

#include "kernels/base/status.h"
#include "parallel/dual_chunk.h"

namespace longfill {

// Heads of one attention layer. Query head h reads KV head h / (num_q_heads / num_kv_heads).
struct AttentionGeometry {
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;  // divides num_q_heads
  int64_t head_dim = 0;
  float scale = 0;  // multiplies q k, usually 1 / sqrt(head_dim)
  DualChunk dual_chunk;

  int64_t q_per_kv() const { return num_q_heads / num_kv_heads; }
};

// InvalidArgument naming the field: sizes below 1, KV heads that do not divide the query heads, scale not
// above 0, chunks that are no whole token blocks.
absl::Status Validate(const AttentionGeometry& geometry);

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_ATTENTION_GEOMETRY_H_
