#ifndef LONGFILL_MODELS_SEARCH_LAYER_SCORER_H_
#define LONGFILL_MODELS_SEARCH_LAYER_SCORER_H_

// What a pattern keeps of each head's attention in one layer of one prompt, and what it takes: the indices
// that a prefill would build, run by the kernels that a prefill would run, beside full attention.

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/base/thread_pool.h"
#include "kernels/sparse/head_pattern.h"
#include "models/transformer.h"
#include "parallel/communicator.h"
#include "parallel/parallel_attention.h"
#include "parallel/sparse_index_builder.h"

namespace longfill {

inline constexpr int64_t kScoreBlock = 128;  // query rows that are sampled together
inline constexpr int64_t kLastRows = 64;     // of HeadScore::last_recall: those that select

// Of one head. Recall of a query row is the share of the softmax that the covered keys hold,
// exp(lse_sparse - lse_full): exact, not above 1 but for rounding.
struct HeadScore {
  double recall = 0;       // mean over the sampled rows
  double last_recall = 0;  // mean over those of the prompt's last kLastRows rows that are sampled
  double error = 0;        // ||sparse - full|| / ||full|| of the outputs of the sampled rows
  int64_t pairs = 0;       // covered, of the whole prompt
  friend bool operator==(const HeadScore&, const HeadScore&) = default;
};

// Of all heads of the layer together, as a prefill computes them.
struct LayerTime {
  double index_seconds = 0;
  double attention_seconds = 0;
  int64_t pairs = 0;  // covered
};

// The sampled query rows: every `step`-th block of 128, counted back from the prompt's last one, so that the
// last rows are always among them; step is the smallest for which they are not more than
// max(kScoreBlock, max_rows).
struct RowSample {
  int64_t num_rows = 0;
  PositionMap positions;
};
RowSample SampleRows(int64_t num_tokens, int64_t max_rows);

struct LayerScorerOptions {
  Coverage coverage = Coverage::kTiles;
  int64_t num_tokens = 0;
  int64_t max_rows = 0;
  int num_threads = 1;                        // that compare outputs on the host
  std::function<absl::Status()> should_stop;  // asked between launches
};

// One prompt on one rank, layer after layer. All memory is taken in Create but for that of Measure. Works on
// the backend's main stream. Not thread-safe. Equal inputs give equal scores, whatever the threads.
class LayerScorer {
 public:
  // `backend` outlives the result.
  static absl::StatusOr<std::unique_ptr<LayerScorer>> Create(Backend& backend,
                                                             const AttentionGeometry& geometry,
                                                             const LayerScorerOptions& options);

  // Full attention of all rows into heads.out, which the forward pass goes on with. With `keep`, its lse and
  // the outputs of the sampled rows stay here for Score.
  absl::Status AttendFully(const LayerHeads& heads, bool keep);
  // Of the layer that AttendFully kept. patterns: [num_q_heads]. ResourceExhausted as
  // SparseIndexBuilder::Build.
  absl::StatusOr<std::vector<HeadScore>> Score(const LayerHeads& heads,
                                               std::span<const HeadPattern> patterns);
  // Index and attention of all heads and rows, `runs` times after one that warms up; the median of each.
  absl::StatusOr<LayerTime> Measure(const LayerHeads& heads, std::span<const HeadPattern> patterns, int runs);

 private:
  LayerScorer(Backend& backend, const AttentionGeometry& geometry, const LayerScorerOptions& options);
  absl::Status Allocate();
  absl::Status Launch(const LayerHeads& heads, HeadsView<const void> q, HeadsView<void> out, float* lse,
                      const RowSample& rows, std::span<const IndexView> indices, double pairs);
  absl::Status GatherRows(const void* from, int64_t row_bytes, void* to);
  absl::Status Fetch(const Buffer& host_out, const Buffer& host_lse);
  HeadScore Compare(int64_t head, int64_t pairs) const;

  Backend& backend_;
  KernelSet& kernels_;
  Stream& stream_;
  const AttentionGeometry geometry_;
  const LayerScorerOptions options_;
  const ShardPlan plan_;
  const RowSample all_rows_;
  const RowSample sample_;
  const std::unique_ptr<Communicator> single_;  // of the builder and of Measure
  ThreadPool threads_;
  std::unique_ptr<SparseIndexBuilder> builder_;
  std::unique_ptr<ParallelAttention> attention_;

  Buffer dense_index_;  // IndexCounts and the one run of a dense index, packed
  std::vector<IndexView> dense_views_;
  Buffer workspace_;
  Buffer full_lse_;  // [num_q_heads, num_tokens] fp32
  // Of the sampled rows: [num_q_heads, rows, head_dim], [rows, num_q_heads, head_dim], [num_q_heads, rows]
  // fp32
  Buffer q_, out_, lse_;
  Buffer host_full_out_, host_full_lse_;    // out_ and lse_ of full attention, on the host
  Buffer host_out_, host_lse_;              // and of a pattern
  std::unique_ptr<Event> launch_ended_[2];  // by turns
  size_t num_launches_ = 0;
};

}  // namespace longfill

#endif  // LONGFILL_MODELS_SEARCH_LAYER_SCORER_H_
