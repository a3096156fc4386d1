#ifndef LONGFILL_DEPLOY_CLI_INDEX_STEPS_H_
#define LONGFILL_DEPLOY_CLI_INDEX_STEPS_H_

// The vertical-slash selection of one layer as the steps that a backend has for it, so that each can be timed
// and looked at. One rank that holds all keys.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/sparse/head_pattern.h"

namespace longfill {

struct IndexProblem {
  int64_t num_tokens = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  Coverage coverage = Coverage::kTiles;
  HeadsView<const void> last_q;        // [num_q_heads, num_queries(), head_dim]: the prompt's last queries
  HeadsView<const void> k;             // [num_kv_heads, num_tokens, head_dim]
  std::vector<int32_t> heads;          // query heads that select, ascending
  std::vector<VerticalSlash> budgets;  // of each of them

  int64_t num_queries() const { return std::min(kMaxSelectingQueries, num_tokens); }
};

class IndexSteps {
 public:
  struct Step {
    std::string name;
    std::function<absl::Status()> run;
  };

  // Allocates everything. `backend` and what `problem` points to outlive the result.
  static absl::StatusOr<std::unique_ptr<IndexSteps>> Create(Backend& backend, IndexProblem problem);
  IndexSteps(const IndexSteps&) = delete;
  IndexSteps& operator=(const IndexSteps&) = delete;

  // To be run in this order, on the main stream: from the scores to the index.
  std::span<const Step> steps() const { return steps_; }
  absl::Status RunAll();
  // Pairs of all indices, for reports only. After the steps.
  absl::Status CountPairs();

  const IndexProblem& problem() const { return problem_; }
  // Results, of place `i` of problem().heads; each call waits for the stream.
  std::span<const IndexView> views() const { return views_; }
  absl::StatusOr<DiagonalColumnIndex> DownloadIndex(size_t i);
  absl::StatusOr<PairCounts> DownloadPairs(size_t i);
  // Scores by key and by distance, forced entries +infinity.
  absl::StatusOr<std::vector<float>> DownloadVertical(size_t i);
  absl::StatusOr<std::vector<float>> DownloadSlash(size_t i);

 private:
  struct Lists {
    Buffer columns, distances, runs;
  };
  IndexSteps(Backend& backend, IndexProblem problem);
  absl::Status Allocate();
  absl::Status AllocateLists();
  void FillParams();
  void FillSteps();
  template <typename T>
  absl::StatusOr<std::vector<T>> Download(const T* from, int64_t count);

  Backend& backend_;
  KernelSet& kernels_;
  Stream& stream_;
  const IndexProblem problem_;
  const int64_t num_heads_, num_blocks_, words_;
  Buffer row_max_, row_sum_, scores_, slash_, cuts_, histogram_, bits_, counts_, pairs_;
  Buffer last_workspace_, build_workspace_, count_workspace_;
  std::vector<Lists> lists_;
  std::vector<int64_t> budgets_;  // [2 * num_heads_]
  std::vector<IndexBuffers> out_;
  std::vector<IndexView> views_;
  LastQueryParams last_;
  JoinScoresParams join_;
  SelectionLists selection_;
  std::vector<Step> steps_;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_INDEX_STEPS_H_
