#ifndef LONGFILL_DEPLOY_CLI_ATTENTION_CASE_H_
#define LONGFILL_DEPLOY_CLI_ATTENTION_CASE_H_

// What `longfill bench attention` measures: heads of one prompt, each with its index.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/base/thread_pool.h"
#include "kernels/sparse/head_pattern.h"
#include "kernels/sparse/sparse_index.h"
#include "models/pattern_file.h"
#include "runtime/engine/replayed_indices.h"

namespace longfill {

// Random lists of key blocks: each block of query rows takes `percent` of the key blocks up to its own, but
// no fewer than min_blocks while there are so many.
struct RandomBlocks {
  double percent = 0;
  int64_t block_rows = 0;  // 64 or 128
  int64_t block_keys = 0;  // 64 or 128
  int64_t min_blocks = 0;
};

// "random-blocks:PERCENT,ROWSxKEYS", for example random-blocks:5,128x64; at least kMinRandomBlocks a row.
// InvalidArgument naming what is wrong.
inline constexpr int64_t kMinRandomBlocks = 32;
absl::StatusOr<RandomBlocks> ParseRandomBlocks(const std::string& text);
bool IsRandomBlocks(const std::string& text);
BlockListIndex MakeRandomBlocks(const RandomBlocks& blocks, int64_t num_tokens, uint64_t seed);

struct AttentionCase {
  std::string name;
  int64_t num_tokens = 0;
  int64_t head_dim = 0;
  int64_t num_q_heads = 0;   // of a call
  int64_t num_kv_heads = 0;  // of a call
  // Of all query heads, whose number is a multiple of num_q_heads: a call after the other does them.
  std::vector<HeadPattern> patterns;  // empty: random block lists
  // Empty for vertical-slash heads whose selection is what gets built from Q and K.
  std::vector<SparseIndex> indices;
  std::string source;  // of the selections, for reports

  int64_t num_heads() const {
    return static_cast<int64_t>(patterns.empty() ? indices.size() : patterns.size());
  }
  int64_t num_calls() const { return num_heads() / num_q_heads; }
};

// Recorded selections as those of a prompt. A shorter prompt than the recorded one takes entries scaled to
// its length, each value once, in the order of their ranks, so that clusters of diagonals stay clusters.
struct RecordedPrompt {
  const RecordedIndices& recorded;
  int64_t num_tokens = 0;
  Coverage coverage = Coverage::kTiles;
};

// Indices of heads with `patterns`, each with the selection of the recorded head in its place of
// `recorded_heads`, counted through the recorded layers. InvalidArgument: a longer prompt, budgets beyond
// what was recorded. Unimplemented: block-sparse heads.
absl::StatusOr<std::vector<SparseIndex>> RecordedSelections(const RecordedPrompt& prompt,
                                                            const std::vector<HeadPattern>& patterns,
                                                            const std::vector<int64_t>& recorded_heads);

// Heads of a pattern file that share one call.
struct PatternHeads {
  int64_t layer = 0;
  int64_t first_head = 0;
  std::vector<HeadPattern> patterns;
  std::vector<int64_t> recorded_heads;  // layers and heads modulo those recorded
  double unevenness = 0;                // largest over mean covered pairs
};

// Of the layer whose heads' covered pairs are most uneven, or of `layer` where it is not negative, the
// `count` heads, from a multiple of `count` on, whose pairs are. InvalidArgument: there is no such layer,
// `count` does not divide its heads.
absl::StatusOr<PatternHeads> MostUnevenHeads(const RecordedPrompt& prompt, const PatternSet& patterns,
                                             int64_t layer, int64_t count, ThreadPool& threads);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_ATTENTION_CASE_H_
