#ifndef LONGFILL_PARALLEL_VERTICAL_SLASH_SELECTOR_H_
#define LONGFILL_PARALLEL_VERTICAL_SLASH_SELECTOR_H_

// Vertical-slash selection over token-sharded keys. Scores of a rank's own keys are joined by max and
// integer-sum reductions; the distance d is dealt to ranks like the key that lies d before the last selecting
// query, so that each rank ranks as many distances as keys and only the 63 window entries behind a key block
// go to the next block's owner.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/api/kernel_set.h"
#include "kernels/sparse/head_pattern.h"
#include "parallel/attention_geometry.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"

namespace longfill {

// Which queries select, over which keys: a whole prompt, or one chunk of it. Keys are [0, last_query() + 1).
struct SelectionScope {
  int64_t first_query = 0;  // position
  int64_t num_queries = 0;  // at most 64, consecutive
  int64_t last_query() const { return first_query + num_queries - 1; }
  int64_t num_keys() const { return first_query + num_queries; }

  static SelectionScope LastQueriesOf(int64_t num_tokens) {
    const int64_t count = num_tokens < kMaxSelectingQueries ? num_tokens : kMaxSelectingQueries;
    return {num_tokens - count, count};
  }
};

struct VerticalSlashSelection {
  std::vector<int32_t> columns;
  std::vector<int32_t> distances;
};

class VerticalSlashSelector {
 public:
  // The scope's keys must be the tokens of `plan`. Heads [num_q_heads] without a VerticalSlash pattern are
  // skipped.
  VerticalSlashSelector(KernelSet& kernels, Communicator& world, const ShardPlan& plan,
                        const AttentionGeometry& geometry, const SelectionScope& scope,
                        std::span<const HeadPattern> patterns);

  int64_t PlanBytes() const;  // on the rank that needs most

  absl::Status Allocate();
  // Every rank, after Allocate succeeded on all. Returns [num_q_heads], empty where the pattern is another
  // one.
  absl::StatusOr<std::vector<VerticalSlashSelection>> Select(HeadsView<const float> q,
                                                             HeadsView<const float> k, Stream& stream);

 private:
  struct Sizes {
    int64_t queries = 0, vertical = 0, slash = 0, overlap = 0, keys = 0, kernel = 0, selection = 0;
  };
  Sizes BytesFor(int64_t local_tokens) const;
  absl::Status GatherQueries(HeadsView<const float> q, Stream& stream);
  absl::Status Score(std::span<const int32_t> heads, HeadsView<const float> k, Stream& stream);
  absl::Status ExchangeOverlaps(int64_t num_heads, Stream& stream);
  void ComposeKeys(int64_t num_heads);

  KernelSet& kernels_;
  Communicator& world_;
  const ShardPlan plan_;
  const AttentionGeometry geometry_;
  const SelectionScope scope_;
  const std::span<const HeadPattern> patterns_;
  std::vector<int32_t> heads_;  // the vertical-slash ones
  int64_t heads_at_once_ = 0;   // equal on all ranks
  int64_t local_tokens_ = 0;
  int64_t local_blocks_ = 0;      // of 128
  int64_t blocks_with_next_ = 0;  // own blocks whose next block exists: overlaps to send
  int64_t blocks_with_previous_ = 0;
  Buffer queries_, query_staging_, vertical_, slash_, overlap_out_, overlap_in_, keys_, kernel_workspace_,
      selection_workspace_;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_VERTICAL_SLASH_SELECTOR_H_
