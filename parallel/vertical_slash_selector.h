#ifndef LONGFILL_PARALLEL_VERTICAL_SLASH_SELECTOR_H_
#define LONGFILL_PARALLEL_VERTICAL_SLASH_SELECTOR_H_

// Vertical-slash selection over token-sharded keys. Scores of a rank's own keys are joined by max and
// integer-sum reductions; the distance d is dealt to ranks like the key that lies d before the last selecting
// query, so that each rank ranks as many distances as keys and only the 63 window entries behind a key block
// go to the next block's owner. The k-th largest comes from all-reduced radix histograms, the selected bits
// of all ranks are added up, and each rank makes the index of them.

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <span>
#include <vector>

#include "kernels/api/kernel_set.h"
#include "kernels/sparse/head_pattern.h"
#include "parallel/attention_geometry.h"
#include "parallel/index_storage.h"
#include "parallel/mesh.h"
#include "parallel/selection_context.h"

namespace longfill {

class VerticalSlashSelector {
 public:
  // The scope's keys must be the tokens of `plan`, which may be the first of a longer prompt. Heads
  // [num_q_heads] without a VerticalSlash pattern are skipped.
  VerticalSlashSelector(const KernelSet& kernels, const ShardPlan& plan, const AttentionGeometry& geometry,
                        const SelectionScope& scope, std::span<const HeadPattern> patterns);

  int64_t ScratchBytes(int rank) const;

  // Every rank. Fills the storage of the vertical-slash heads, and this rank's share of their pair counts.
  absl::Status Select(const SelectionContext& context, HeadsView<const void> q,
                      HeadsView<const void> k) const;

  // With what was fetched after that: Internal naming the head and the list that did not become what its
  // budget says.
  absl::Status Check(const IndexReport& report) const;

 private:
  class Batch;

  // Offsets of the pieces of a rank's scratch.
  struct Scratch {
    int64_t query_staging = 0, gathered_queries = 0;           // where there are several ranks
    int64_t queries = 0;                                       // there, and where they come unrotated
    std::array<int64_t, std::size(kChunkParts)> rotated = {};  // where they do, for each part of the keys
    int64_t part_slash = 0;                                    // there: windows of one part
    int64_t row_max = 0, row_sum = 0, scores = 0, slash = 0;   // rows of each part
    int64_t overlaps_sent = 0, overlaps_received = 0, overlaps = 0;  // where there are several ranks
    int64_t histogram = 0, bits = 0, workspace = 0;
    int64_t workspace_bytes = 0;
    // From there, of each part, which keeps it until it has its scores.
    std::array<int64_t, std::size(kChunkParts)> score_workspace = {}, score_workspace_bytes = {};
    int64_t total_bytes = 0;
  };
  Scratch ScratchFor(int rank) const;
  // Parts of the keys that the queries ask with rotations of their own; one where they come rotated.
  int NumParts() const { return scope_.split ? static_cast<int>(std::min<int64_t>(scope_.chunk, 2)) + 1 : 1; }
  TokenRange PartRows(int part, int rank) const;  // of the rank's keys
  int64_t WordsPerList() const;

  const KernelSet& kernels_;
  const ShardPlan plan_;
  const AttentionGeometry geometry_;
  const SelectionScope scope_;
  std::vector<int32_t> heads_;  // the vertical-slash ones
  std::vector<VerticalSlashBudget> budgets_;
  int64_t heads_at_once_ = 0;  // equal on all ranks
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_VERTICAL_SLASH_SELECTOR_H_
