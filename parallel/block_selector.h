#ifndef LONGFILL_PARALLEL_BLOCK_SELECTOR_H_
#define LONGFILL_PARALLEL_BLOCK_SELECTOR_H_

// Block-sparse selection over token-sharded Q and K: mean keys are gathered to all ranks, each rank selects
// for its own query row blocks, the lists are gathered.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/api/kernel_set.h"
#include "kernels/sparse/head_pattern.h"
#include "parallel/attention_geometry.h"
#include "parallel/mesh.h"
#include "parallel/selection_context.h"

namespace longfill {

class BlockSelector {
 public:
  // Heads [num_q_heads] without a BlockSparse pattern are skipped.
  BlockSelector(const KernelSet& kernels, const ShardPlan& plan, const AttentionGeometry& geometry,
                std::span<const HeadPattern> patterns);

  int64_t ScratchBytes(int rank) const;

  // Every rank. Fills the storage of the block-sparse heads and this rank's share of their pair counts, also
  // of what the published kernels, which force no block, would select. Parity coverage is that selection.
  absl::Status Select(const SelectionContext& context, HeadsView<const void> q,
                      HeadsView<const void> k) const;

 private:
  class Selection;

  // Offsets of the pieces of a rank's scratch.
  struct Scratch {
    int64_t pooled_q = 0, pooled_k = 0, published = 0, workspace = 0;
    int64_t own = 0, gathered = 0;  // where there are several ranks
    int64_t workspace_bytes = 0;
    int64_t total_bytes = 0;
  };
  Scratch ScratchFor(int64_t local_tokens) const;

  const KernelSet& kernels_;
  const ShardPlan plan_;
  const AttentionGeometry geometry_;
  std::vector<int32_t> heads_;        // the block-sparse ones
  std::vector<int64_t> row_lengths_;  // of each of them
  int64_t num_row_blocks_ = 0;        // of the prompt
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_BLOCK_SELECTOR_H_
