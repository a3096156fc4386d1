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
#include "parallel/communicator.h"
#include "parallel/mesh.h"

namespace longfill {

class BlockSelector {
 public:
  // Heads [num_q_heads] without a BlockSparse pattern are skipped. Parity coverage forces no block.
  BlockSelector(KernelSet& kernels, Communicator& world, const ShardPlan& plan,
                const AttentionGeometry& geometry, Coverage coverage, std::span<const HeadPattern> patterns);

  int64_t PlanBytes() const;  // on the rank that needs most

  absl::Status Allocate();
  // Every rank, after Allocate succeeded on all. Returns [num_q_heads], empty where the pattern is another
  // one.
  absl::StatusOr<std::vector<BlockListIndex>> Select(HeadsView<const float> q, HeadsView<const float> k,
                                                     Stream& stream);

 private:
  struct Sizes {
    int64_t pooled = 0, pooled_all = 0, selected = 0;
  };
  Sizes BytesFor(int64_t local_tokens) const;
  absl::Status GatherPooledKeys(HeadsView<const float> k, int64_t kv_head, Stream& stream);
  absl::Status SelectOwn(int64_t num_blocks, bool force, Stream& stream);
  int64_t CountOwnPairs(int64_t num_blocks) const;
  absl::Status GatherLists(int64_t num_blocks, BlockListIndex* index, Stream& stream);
  // Row blocks of a rank, as absolute numbers, in the order of its rows.
  std::vector<int32_t> RowBlocks(int rank) const;

  KernelSet& kernels_;
  Communicator& world_;
  const ShardPlan plan_;
  const AttentionGeometry geometry_;
  const Coverage coverage_;
  const std::span<const HeadPattern> patterns_;
  int64_t num_row_blocks_ = 0;       // of the prompt
  int64_t max_blocks_ = 0;           // largest clamped budget; 0: no block-sparse head
  std::vector<int32_t> row_blocks_;  // own
  Buffer pooled_, pooled_keys_, pooled_staging_, selected_;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_BLOCK_SELECTOR_H_
