#ifndef LONGFILL_PARALLEL_SPARSE_INDEX_BUILDER_H_
#define LONGFILL_PARALLEL_SPARSE_INDEX_BUILDER_H_

// Exact selection over token-sharded Q and K. The result is a function of (all Q, all K, patterns) only:
// every rank of every mesh ends with the same index, bit for bit. How it works is in parallel/README.md.

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/sparse/head_pattern.h"
#include "kernels/sparse/index_view.h"
#include "parallel/attention_geometry.h"
#include "parallel/communicator.h"
#include "parallel/index_storage.h"
#include "parallel/mesh.h"
#include "parallel/selection_context.h"
#include "parallel/stream_timer.h"

namespace longfill {

// The selection of one layer, equal on all ranks.
struct LayerIndex {
  // [chunks, num_q_heads], in the backend's memory, which the builder owns: valid until its next Build or its
  // end. One chunk, unless dual chunks split the prompt: then each for the queries of its chunk.
  std::vector<IndexView> heads;
  std::vector<PairCounts> pairs;     // [num_q_heads], of the whole prompt
  double seconds = 0;                // on the device, from the agreement on arguments to the end
  double communication_seconds = 0;  // of these inside calls of the communicator
};

class SparseIndexBuilder {
 public:
  // `backend` and `world`, whose calls take memory of the backend, outlive the result. No communication.
  static absl::StatusOr<SparseIndexBuilder> Create(Backend& backend, Communicator& world,
                                                   const AttentionGeometry& geometry, Coverage coverage);

  // Every rank calls this with an equal plan and equal patterns ([num_q_heads]); plan.mesh().size() ==
  // world.size(). q [num_q_heads, plan.NumTokens(rank), head_dim] and k [num_kv_heads, ...] after RoPE, of
  // the backend's compute dtype, rows in the order of plan.TokenPositions(rank). Selects from the prompt's
  // last min(64, num_tokens) queries where the pattern does so. Works on the backend's main stream and waits
  // for it at the end. Bad arguments and missing memory are agreed on before the first exchange and leave the
  // group usable, and so does ResourceExhausted for block-share lists beyond their memory, which all ranks
  // return at the end; any other later error aborts the group. Patterns that select nothing (dense, A-shape)
  // cost no communication but the agreement. Where dual chunks split the prompt (dual_chunk.h), q is not
  // rotated and query_rotary says how it is; patterns that they do not have are Unimplemented
  // (CheckDualChunkPatterns). Block-share heads, whose selection grows with the square of the prompt, ask
  // should_stop between parts of it; a rank that it told to stop selects nothing more and takes part in the
  // exchanges that are left, so that Build succeeds and whoever computes with the index must ask, too.
  absl::StatusOr<LayerIndex> Build(const ShardPlan& plan, HeadsView<const void> q, HeadsView<const void> k,
                                   std::span<const HeadPattern> patterns,
                                   const RotaryParams& query_rotary = {},
                                   const std::function<bool()>& should_stop = {});

  // Bytes of the backend's memory that Build takes for such a layer at most, on the rank that needs most, and
  // those of them that stay, for the index. Both grow with the budgets of the patterns. Allocate nothing.
  static int64_t PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry, const ShardPlan& plan,
                           std::span<const HeadPattern> patterns);
  static int64_t IndexBytes(const AttentionGeometry& geometry, const ShardPlan& plan,
                            std::span<const HeadPattern> patterns);

 private:
  SparseIndexBuilder(Backend& backend, Communicator& world, const AttentionGeometry& geometry,
                     Coverage coverage);
  absl::Status Check(const ShardPlan& plan, std::span<const HeadPattern> patterns) const;
  absl::Status AllocateStorage(const ShardPlan& plan, std::span<const HeadPattern> patterns);
  absl::Status JoinPairCounts(const IndexStorage& storage);
  void AddPairs(std::span<const HeadPattern> patterns, const IndexStorage& storage,
                const SelectionScope& scope, std::vector<PairCounts>* pairs) const;

  Backend* backend_;
  Communicator* world_;
  AttentionGeometry geometry_;
  Coverage coverage_;
  std::vector<IndexStorage> storage_;  // [chunks]
  IndexReport report_;
  StreamTimer timer_;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_SPARSE_INDEX_BUILDER_H_
