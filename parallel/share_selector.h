#ifndef LONGFILL_PARALLEL_SHARE_SELECTOR_H_
#define LONGFILL_PARALLEL_SHARE_SELECTOR_H_

// Selection by share over token-sharded Q and K: each rank makes the representatives of its own key blocks,
// which are gathered to all ranks; each rank selects for its own query row blocks; the bits that it sets are
// gathered, and each rank makes the lists of them.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/api/kernel_set.h"
#include "kernels/sparse/head_pattern.h"
#include "parallel/attention_geometry.h"
#include "parallel/index_storage.h"
#include "parallel/mesh.h"
#include "parallel/selection_context.h"

namespace longfill {

class ShareSelector {
 public:
  // Heads [num_q_heads] without a BlockShare pattern are skipped.
  ShareSelector(const KernelSet& kernels, const ShardPlan& plan, const AttentionGeometry& geometry,
                std::span<const HeadPattern> patterns);

  int64_t ScratchBytes(int rank) const;  // grows with the prompt, not with its square

  // Every rank. Fills the storage of the block-share heads and this rank's share of their pair counts.
  absl::Status Select(const SelectionContext& context, HeadsView<const void> q,
                      HeadsView<const void> k) const;

  // With what was fetched after that: ResourceExhausted, equal on all ranks, where the lists of the layer
  // have more entries than there is room for (index_storage.h, ShareListCapacity).
  absl::Status Check(const IndexReport& report) const;
  // Whether Check returned this error.
  static bool HadNoRoom(const absl::Status& status);

 private:
  class Selection;

  // Heads that read the same representatives in the same precision, ascending.
  struct Group {
    int64_t kv_head = 0;
    int64_t outliers = 0, samples = 0, coarse = 0;
    bool fp8 = false;
    int64_t num_representatives() const { return NumRepresentatives(samples, outliers); }
    int64_t first_place = 0;     // of its first head among the block-share heads
    std::vector<int32_t> heads;  // query heads
    std::vector<float> min_share;
  };

  // Offsets of the pieces of a rank's scratch.
  struct Scratch {
    int64_t representatives = 0, coarse = 0, bits = 0, workspace = 0;
    int64_t own = 0, gathered = 0;  // where there are several ranks
    int64_t workspace_bytes = 0;
    int64_t total_bytes = 0;
  };
  Scratch ScratchFor(int64_t local_tokens) const;
  int64_t RowBytes() const;         // of the bits of one row block
  int64_t HeadsAtOnce() const;      // whose bits are kept together; 1 where those of one head are too many
  int64_t RowBlocksAtOnce() const;  // of the prompt, for each of these heads
  int64_t OwnRowBlocks(int64_t local_tokens) const;  // at most, of those

  const KernelSet& kernels_;
  const ShardPlan plan_;
  const AttentionGeometry geometry_;
  std::vector<Group> groups_;
  int64_t num_heads_ = 0;       // the block-share ones
  int64_t most_heads_ = 0;      // of a group
  int64_t num_row_blocks_ = 0;  // of the prompt
  int64_t num_key_blocks_ = 0;  // of the prompt, whole ones
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_SHARE_SELECTOR_H_
