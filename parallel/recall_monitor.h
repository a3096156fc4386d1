#ifndef LONGFILL_PARALLEL_RECALL_MONITOR_H_
#define LONGFILL_PARALLEL_RECALL_MONITOR_H_

// How much of the attention that a prompt's rows give lies in what a sparse index covers. The recall of a row
// is exp(lse_sparse - lse_full): the softmax weight, over all keys that the row may see, of the keys that are
// covered. The recall of a head is the mean over the sampled rows.
//
// The sampled rows of all query heads of a KV head share row tiles, and causality is cut into key ranges, so
// that rows from anywhere in the prompt cost one pass over the keys. Each rank takes its own keys, of all
// heads, so the work is split evenly on every mesh, and nothing of K or V moves.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/api/backend.h"
#include "parallel/attention_geometry.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "parallel/stream_timer.h"

namespace longfill {

// Positions, ascending, that stand for the rows of a prompt: a quarter of them among the last 64, where
// questions are, the others one in each of as many equal parts of the prompt. As many as fill the 64 rows of
// a tile with those of all query heads of a KV head, but between 8 and 16, and at most num_tokens. A function
// of its arguments only, so that every mesh samples the same rows.
std::vector<int64_t> SampledPositions(int64_t num_tokens, int64_t q_per_kv);

class RecallMonitor {
 public:
  // `backend` and `world`, whose calls take memory of the backend or, with a CpuStream, of the host, outlive
  // the result. No communication.
  static absl::StatusOr<RecallMonitor> Create(Backend& backend, Communicator& world,
                                              const AttentionGeometry& geometry, const ShardPlan& plan);

  const std::vector<int64_t>& positions() const { return positions_; }

  // Every rank calls this for a layer, with equal arguments but for its own rows: q [num_q_heads, own tokens,
  // head_dim] and k [num_kv_heads, ...] after RoPE. Rows see the `window` keys up to their own (0: all before
  // them). Works on the backend's main stream and waits for it. Missing memory is agreed on before the first
  // exchange and leaves the group usable; a later error aborts it.
  absl::Status Measure(HeadsView<const void> q, HeadsView<const void> k, int64_t window);

  // Every rank calls this after Measure with the lse of positions() under the sparse index
  // (ParallelAttentionStats::sampled_lse); may be repeated for other indices. Returns the recall of each
  // query head, equal on all ranks, at most 1; that of heads that no rank computed is 0.
  absl::StatusOr<std::vector<double>> Recall(std::span<const float> sampled_lse);

  // Sums since Create: on the device, without exchanges.
  double seconds() const { return seconds_; }

  // (row, key) pairs that Measure multiplies on all ranks together, whole row tiles of 64 as kernels compute
  // them: what to compare with the pairs of the attention that is watched.
  static int64_t ComputedPairs(const AttentionGeometry& geometry, int64_t num_tokens, int64_t window);
  // Bytes of the backend's memory that Measure takes, the same on all ranks.
  static int64_t PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry, const ShardPlan& plan,
                           int64_t window);

 private:
  RecallMonitor(Backend& backend, Communicator& world, const AttentionGeometry& geometry,
                const ShardPlan& plan);

  Backend* backend_;
  Communicator* world_;
  AttentionGeometry geometry_;
  ShardPlan plan_;
  std::vector<int64_t> positions_;
  StreamTimer timer_;
  double seconds_ = 0;
  std::vector<double> full_lse_;  // [num_q_heads, positions_.size()], natural log, of the last Measure
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_RECALL_MONITOR_H_
