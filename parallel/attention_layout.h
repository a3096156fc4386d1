#ifndef LONGFILL_PARALLEL_ATTENTION_LAYOUT_H_
#define LONGFILL_PARALLEL_ATTENTION_LAYOUT_H_

#include <cstdint>

#include "kernels/api/kernel_set.h"
#include "parallel/attention_geometry.h"
#include "parallel/mesh.h"

namespace longfill {

// Memory of one ParallelAttention::Run and the slices of its exchanges. Follows from the plan alone, for the
// rank that needs most, so that all ranks take the same slices.
struct AttentionLayout {
  AttentionLayout(const KernelSet& kernels, const AttentionGeometry& geometry, const ShardPlan& plan);

  bool head_exchange = false;
  bool sequence_exchange = false;
  int64_t padded_tokens = 0;  // of the prompt, whole blocks
  int64_t kv_heads = 0;       // of one round on one rank, at most
  int64_t head_slice = 0;     // token blocks of each member in one exchange
  int64_t key_slice = 0;

  // Byte offsets; pieces that the mesh does not need are not there.
  int64_t counts = 0;                // two int64: covered and computed pairs
  int64_t q = 0, out = 0;            // of the head group's rows
  int64_t group_k = 0, group_v = 0;  // of the head group's rows
  int64_t all_k = 0, all_v = 0;      // of the prompt
  int64_t send = 0, recv = 0;        // of one exchange
  int64_t workspace = 0;             // of the kernels
  int64_t workspace_bytes = 0;
  int64_t total_bytes = 0;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_ATTENTION_LAYOUT_H_
