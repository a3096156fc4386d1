#ifndef LONGFILL_PARALLEL_ATTENTION_LAYOUT_H_
#define LONGFILL_PARALLEL_ATTENTION_LAYOUT_H_

#include <array>
#include <cstdint>

#include "kernels/api/kernel_set.h"
#include "parallel/attention_geometry.h"
#include "parallel/mesh.h"

namespace longfill {

// Memory of one ParallelAttention::Run and the slices of its exchanges. Follows from the plan alone, for the
// rank that needs most, so that all ranks take the same slices.
struct AttentionLayout {
  struct Options {
    // Of what a round receives, at most, but that of one KV head; 0: that of the device.
    int64_t round_bytes = 0;
    int64_t num_sampled = 0;  // rows whose lse is asked for; 0: no lse is kept
    bool from_peers = false;  // keys and values come from PeerMemory
    bool relayed = false;     // and those of other hosts through the memory of this one
  };
  AttentionLayout(const KernelSet& kernels, const AttentionGeometry& geometry, const ShardPlan& plan,
                  const Options& options);

  // What rounds receive, by turns, so that one is exchanged while another computes.
  struct Received {
    int64_t kv_heads = 0;          // that it has room for
    int64_t q = 0, out = 0;        // of the head group's rows
    int64_t all_k = 0, all_v = 0;  // of the prompt
  };

  bool head_exchange = false;
  bool sequence_exchange = false;
  bool one_place = false;      // both of `received` are the same memory
  int64_t padded_tokens = 0;   // of the prompt, whole blocks
  int64_t kv_heads = 0;        // of one round on one rank, at most
  int64_t first_kv_heads = 0;  // of the first round: fewer, if little or nothing computes beside its exchange
  int64_t head_slice = 0;      // dealt blocks of each member in one exchange
  int64_t key_slice = 0;
  int64_t rotated_rows = 0;  // whose queries are rotated at a time; 0: they come rotated

  // Byte offsets; pieces that the mesh does not need are not there.
  int64_t counts = 0;                // two int64: covered and computed pairs
  int64_t word = 0;                  // an int64 by which peers wait for one another
  std::array<Received, 2> received;  // the second is the first where there is one round
  int64_t group_k = 0, group_v = 0;  // of the head group's rows
  int64_t send = 0, recv = 0;        // of one exchange
  int64_t rotated_q = 0;             // queries of one launch for one part of the keys
  int64_t rotated_lse = 0;           // of these rows, over the parts so far
  int64_t lse = 0;                   // of one round: [query heads, head group's rows], fp32
  int64_t sampled_lse = 0;           // [query heads, num_sampled], fp32
  int64_t workspace = 0;             // of the kernels
  int64_t workspace_bytes = 0;
  int64_t total_bytes = 0;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_ATTENTION_LAYOUT_H_
