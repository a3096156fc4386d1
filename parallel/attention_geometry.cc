#include "parallel/attention_geometry.h"

#include "absl/strings/str_cat.h"

namespace longfill {

absl::Status Validate(const AttentionGeometry& geometry) {
  if (geometry.num_q_heads < 1 || geometry.num_kv_heads < 1 || geometry.head_dim < 1) {
    return absl::InvalidArgumentError(absl::StrCat("attention geometry: num_q_heads ", geometry.num_q_heads,
                                                   ", num_kv_heads ", geometry.num_kv_heads, ", head_dim ",
                                                   geometry.head_dim, "; each must be at least 1"));
  }
  if (geometry.num_q_heads % geometry.num_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("attention geometry: num_q_heads ", geometry.num_q_heads,
                                                   " is not a multiple of num_kv_heads ",
                                                   geometry.num_kv_heads));
  }
  if (!(geometry.scale > 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("attention geometry: scale ", geometry.scale, " is not above 0"));
  }
  const DualChunk& chunk = geometry.dual_chunk;
  if (chunk.chunk_size != 0 &&
      (chunk.local_size < 1 || chunk.chunk_len() < kTokenBlock || chunk.chunk_len() % kTokenBlock != 0)) {
    return absl::InvalidArgumentError(absl::StrCat("attention geometry: dual chunks of ", chunk.chunk_size,
                                                   " less ", chunk.local_size, " tokens are no multiple of ",
                                                   kTokenBlock));
  }
  return absl::OkStatus();
}

}  // namespace longfill
