#ifndef LONGFILL_MODELS_ROPE_H_
#define LONGFILL_MODELS_ROPE_H_

#include <cstdint>
#include <vector>

#include "kernels/base/status.h"
#include "models/config.h"

namespace longfill {

struct RotaryTable {
  // [rotary_dim / 2] radians per position, largest first. The values are rounded to fp32, since every decoder
  // that continues from our keys holds them in fp32: at position 1,000,000 the rounding turns the fastest
  // pairs by up to 0.03.
  std::vector<double> inv_freq;
  float attention_scale = 1.0f;  // multiplies cos and sin, so that cached keys have it too
};

// `num_tokens` is the length of the whole prompt: LongRoPE, whose frequencies depend on it, uses one table
// for all of its positions, as transformers does for a prompt given at once. A decoder that goes on past
// original_max_position_embeddings from a shorter prompt keeps the keys of the short factors, or prefills
// anew. The scale of dual chunk attention depends on it too. InvalidArgument names a field that is out of its
// range.
absl::StatusOr<RotaryTable> BuildRotaryTable(const RopeConfig& rope, int64_t num_tokens);

}  // namespace longfill

#endif  // LONGFILL_MODELS_ROPE_H_
