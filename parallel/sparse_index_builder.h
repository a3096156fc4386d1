#ifndef LONGFILL_PARALLEL_SPARSE_INDEX_BUILDER_H_
#define LONGFILL_PARALLEL_SPARSE_INDEX_BUILDER_H_

// Exact selection over token-sharded Q and K. The result is a function of (all Q, all K, patterns) only:
// every rank of every mesh ends with the same index, bit for bit. How it works is in parallel/README.md.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/api/kernel_set.h"
#include "kernels/sparse/coverage.h"
#include "kernels/sparse/head_pattern.h"
#include "kernels/sparse/sparse_index.h"
#include "parallel/attention_geometry.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"

namespace longfill {

// The selection of one layer, equal on all ranks.
struct LayerIndex {
  std::vector<SparseIndex> heads;  // [num_q_heads]
  std::vector<PairCounts> pairs;   // [num_q_heads], of the whole prompt
  double seconds = 0;              // wall time of Build here, communication and waiting included
  double communication_seconds = 0;
};

class SparseIndexBuilder {
 public:
  // `kernels` and `world` outlive the result. No communication. Unimplemented for kernels that are not on the
  // CPU.
  static absl::StatusOr<SparseIndexBuilder> Create(KernelSet& kernels, Communicator& world,
                                                   const AttentionGeometry& geometry, Coverage coverage);

  // Every rank calls this with an equal plan and equal patterns ([num_q_heads]); plan.mesh().size() ==
  // world.size(). q [num_q_heads, plan.NumTokens(rank), head_dim] and k [num_kv_heads, ...] after RoPE, rows
  // in the order of plan.TokenPositions(rank). Selects from the prompt's last min(64, num_tokens) queries
  // where the pattern does so. Bad arguments and missing memory are agreed on before the first exchange and
  // leave the group usable; a later error aborts the group. Patterns that select nothing (dense, A-shape)
  // cost no communication but for the pair counts.
  absl::StatusOr<LayerIndex> Build(const ShardPlan& plan, HeadsView<const float> q, HeadsView<const float> k,
                                   std::span<const HeadPattern> patterns, Stream& stream);

  // Bytes that Build takes from kernels.memory() at most, on the rank that needs most, without the scratch
  // that SelectBlocks may take itself. Allocates nothing.
  static int64_t PlanBytes(KernelSet& kernels, const AttentionGeometry& geometry, const ShardPlan& plan,
                           std::span<const HeadPattern> patterns);

 private:
  SparseIndexBuilder(KernelSet& kernels, Communicator& world, const AttentionGeometry& geometry,
                     Coverage coverage)
      : kernels_(&kernels), world_(&world), geometry_(geometry), coverage_(coverage) {}

  KernelSet* kernels_;
  Communicator* world_;
  AttentionGeometry geometry_;
  Coverage coverage_;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_SPARSE_INDEX_BUILDER_H_
