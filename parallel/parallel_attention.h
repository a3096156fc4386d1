#ifndef LONGFILL_PARALLEL_PARALLEL_ATTENTION_H_
#define LONGFILL_PARALLEL_PARALLEL_ATTENTION_H_

// Attention of one layer over a mesh {sequence, head}: tokens to heads inside the head group, keys and values
// gathered over the sequence group, attention, heads back to tokens. One path for all meshes; groups of one
// copy nothing.

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "kernels/api/kernel_set.h"
#include "kernels/sparse/coverage.h"
#include "kernels/sparse/sparse_index.h"
#include "parallel/attention_geometry.h"
#include "parallel/communicator.h"
#include "parallel/head_placement.h"
#include "parallel/mesh.h"

namespace longfill {

struct ParallelAttentionParams {
  HeadsView<const float> q;     // [num_q_heads, local tokens, head_dim], rows as plan.TokenPositions(rank)
  HeadsView<const float> k, v;  // [num_kv_heads, local tokens, head_dim]
  std::span<const SparseIndex> indices;  // [num_q_heads], equal on all ranks (LayerIndex::heads)
  std::span<const PairCounts>
      pairs;             // [num_q_heads], equal on all ranks (LayerIndex::pairs); decides the placement
  float* out = nullptr;  // [local tokens, num_q_heads * head_dim], token-major, overwritten
  // Asked between launches; once true, the rest of the compute is skipped here. May be empty. Any thread's
  // flag.
  std::function<bool()> should_stop;
};

struct ParallelAttentionStats {
  double attention_seconds = 0;
  double communication_seconds = 0;  // exchanges with their packing and waiting
  int64_t covered_pairs = 0;         // of this rank
  int64_t computed_pairs = 0;
};

class ParallelAttention {
 public:
  // Every rank of `world` calls this with an equal mesh and geometry; splits `world` into head and sequence
  // groups. `kernels` and `world` outlive the result. InvalidArgument when the mesh does not match
  // world.size().
  static absl::StatusOr<std::unique_ptr<ParallelAttention>> Create(KernelSet& kernels, Communicator& world,
                                                                   const Mesh& mesh,
                                                                   const AttentionGeometry& geometry);

  // Every rank calls this with an equal plan, whose mesh is the one of Create. Bad arguments and missing
  // memory are agreed on before the first exchange and leave the group usable; a later error aborts it, and
  // peers return Unavailable. Cancelled: should_stop said so here. This rank has still taken part in every
  // exchange, so that the group stays in step and usable; `out` is then undefined here and on peers, which
  // the caller settles by agreeing on cancellation.
  absl::StatusOr<ParallelAttentionStats> Run(const ShardPlan& plan, const ParallelAttentionParams& params,
                                             Stream& stream);

  // Bytes that Run takes from kernels.memory() at most, on the rank that needs most. Allocates nothing.
  static int64_t PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry,
                           const ShardPlan& plan);

 private:
  ParallelAttention(KernelSet& kernels, Communicator& world, const Mesh& mesh,
                    const AttentionGeometry& geometry)
      : kernels_(kernels), world_(world), mesh_(mesh), geometry_(geometry) {}

  KernelSet& kernels_;
  Communicator& world_;
  const Mesh mesh_;
  const AttentionGeometry geometry_;
  std::unique_ptr<Communicator> head_group_;      // equal sequence index, ordered by head index
  std::unique_ptr<Communicator> sequence_group_;  // equal head index, ordered by sequence index
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_PARALLEL_ATTENTION_H_
