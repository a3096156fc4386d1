#include "deploy/cli/index_steps.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "parallel/index_storage.h"

namespace longfill {
namespace {

constexpr int64_t kForcedKeys = 30;
constexpr int64_t kForcedDistances = 100;

template <typename T>
constexpr int64_t kBytes = static_cast<int64_t>(sizeof(T));

Workspace WorkspaceOf(const Buffer& buffer) { return {buffer.data(), buffer.size_bytes()}; }

}  // namespace

IndexSteps::IndexSteps(Backend& backend, IndexProblem problem)
    : backend_(backend),
      kernels_(backend.kernels()),
      stream_(backend.stream()),
      problem_(std::move(problem)),
      num_heads_(static_cast<int64_t>(problem_.heads.size())),
      num_blocks_((problem_.num_tokens + kSelectionBlock - 1) / kSelectionBlock),
      words_((problem_.num_tokens + 63) / 64) {}

absl::StatusOr<std::unique_ptr<IndexSteps>> IndexSteps::Create(Backend& backend, IndexProblem problem) {
  std::unique_ptr<IndexSteps> steps(new IndexSteps(backend, std::move(problem)));
  LF_RETURN_IF_ERROR(steps->Allocate());
  LF_RETURN_IF_ERROR(steps->AllocateLists());
  steps->FillParams();
  steps->FillSteps();
  return steps;
}

absl::Status IndexSteps::Allocate() {
  const auto allocate = [this](Buffer* buffer, int64_t bytes, const char* what) -> absl::Status {
    LF_ASSIGN_OR_RETURN(*buffer, backend_.memory().Allocate(bytes, what));
    return absl::OkStatus();
  };
  const int64_t tokens = problem_.num_tokens;
  const int64_t lists = 2 * num_heads_;
  const int64_t queries = num_heads_ * kMaxSelectingQueries;
  LF_RETURN_IF_ERROR(allocate(&row_max_, queries * kBytes<float>, "row maxima"));
  LF_RETURN_IF_ERROR(allocate(&row_sum_, queries * kBytes<uint64_t>, "row sums"));
  LF_RETURN_IF_ERROR(allocate(&scores_, lists * tokens * kBytes<float>, "scores"));
  LF_RETURN_IF_ERROR(
      allocate(&slash_, num_heads_ * num_blocks_ * kDiagonalWindow * kBytes<float>, "diagonal windows"));
  LF_RETURN_IF_ERROR(allocate(&cuts_, lists * kBytes<SelectionCut>, "selection cuts"));
  LF_RETURN_IF_ERROR(allocate(&histogram_, lists * kSelectionBins * kBytes<uint64_t>, "histograms"));
  LF_RETURN_IF_ERROR(allocate(&bits_, lists * words_ * kBytes<uint64_t>, "selected bits"));
  LF_RETURN_IF_ERROR(allocate(&counts_, num_heads_ * kBytes<IndexCounts>, "index counts"));
  LF_RETURN_IF_ERROR(allocate(&pairs_, num_heads_ * kBytes<PairCounts>, "pair counts"));
  LF_RETURN_IF_ERROR(allocate(&last_workspace_,
                              kernels_.LastQueryWorkspaceBytes(num_heads_, tokens, problem_.head_dim),
                              "the workspace of scores"));
  LF_RETURN_IF_ERROR(allocate(&build_workspace_, kernels_.BuildIndexWorkspaceBytes(num_heads_, words_),
                              "the workspace of indices"));
  return allocate(&count_workspace_, kernels_.CountPairsWorkspaceBytes(num_heads_, tokens),
                  "the workspace of pair counts");
}

absl::Status IndexSteps::AllocateLists() {
  for (int64_t i = 0; i < num_heads_; ++i) {
    const VerticalSlashBudget budget(problem_.budgets[i], problem_.num_tokens);
    // Distance 0 is added where it is missing.
    const int64_t max_distances = std::min(problem_.num_tokens, budget.distances + 1);
    budgets_.push_back(budget.columns);
    budgets_.push_back(budget.distances);
    Lists lists;
    LF_ASSIGN_OR_RETURN(lists.columns,
                        backend_.memory().Allocate(budget.columns * kBytes<int32_t>, "columns"));
    LF_ASSIGN_OR_RETURN(lists.distances,
                        backend_.memory().Allocate(max_distances * kBytes<int32_t>, "distances"));
    LF_ASSIGN_OR_RETURN(lists.runs, backend_.memory().Allocate(max_distances * kBytes<DistanceRun>, "runs"));
    const IndexBuffers out = {.columns = lists.columns.as<int32_t>(),
                              .distances = lists.distances.as<int32_t>(),
                              .runs = lists.runs.as<DistanceRun>(),
                              .counts = counts_.as<IndexCounts>() + i,
                              .column_capacity = static_cast<int32_t>(budget.columns),
                              .distance_capacity = static_cast<int32_t>(max_distances),
                              .run_capacity = static_cast<int32_t>(max_distances)};
    IndexView view;
    view.coverage = problem_.coverage;
    view.columns = out.columns;
    view.distances = out.distances;
    view.runs = out.runs;
    view.counts = out.counts;
    lists_.push_back(std::move(lists));
    out_.push_back(out);
    views_.push_back(view);
  }
  return absl::OkStatus();
}

void IndexSteps::FillParams() {
  last_.q = problem_.last_q;
  last_.num_queries = problem_.num_queries();
  last_.first_query_position = problem_.num_tokens - problem_.num_queries();
  last_.k = problem_.k;
  last_.num_keys = problem_.num_tokens;
  last_.heads = problem_.heads;
  last_.num_q_heads = problem_.num_q_heads;
  last_.num_kv_heads = problem_.num_kv_heads;
  last_.head_dim = problem_.head_dim;
  last_.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(problem_.head_dim)));
  join_.slash = slash_.as<float>();
  join_.num_heads = num_heads_;
  join_.num_keys = problem_.num_tokens;
  join_.last_query = problem_.num_tokens - 1;
  join_.forced_keys = kForcedKeys;
  join_.forced_distances = kForcedDistances;
  join_.scores = scores_.as<float>();
  join_.score_stride = problem_.num_tokens;
  selection_.scores = scores_.as<float>();
  selection_.list_stride = problem_.num_tokens;
  selection_.num_entries = problem_.num_tokens;
  selection_.num_lists = 2 * num_heads_;
  selection_.last_query = problem_.num_tokens - 1;
}

void IndexSteps::FillSteps() {
  const auto add = [this](const char* name, std::function<absl::Status()> run) {
    steps_.push_back({name, std::move(run)});
  };
  add("row max", [this] {
    return kernels_.LastQueryRowMax(last_, row_max_.as<float>(), WorkspaceOf(last_workspace_), stream_);
  });
  add("row sum", [this] {
    return kernels_.LastQueryRowSum(last_, row_max_.as<float>(), row_sum_.as<uint64_t>(),
                                    WorkspaceOf(last_workspace_), stream_);
  });
  add("scores", [this] {
    const LastQueryScores out = {scores_.as<float>(), 2 * problem_.num_tokens, slash_.as<float>()};
    return kernels_.LastQueryScore(last_, row_max_.as<float>(), row_sum_.as<uint64_t>(), out,
                                   WorkspaceOf(last_workspace_), stream_);
  });
  add("join", [this] { return kernels_.JoinScores(join_, stream_); });
  add("cuts", [this] {
    auto* cuts = cuts_.as<SelectionCut>();
    auto* histogram = histogram_.as<uint64_t>();
    LF_RETURN_IF_ERROR(kernels_.SelectionStart(budgets_, cuts, stream_));
    for (int pass = 0; pass < kSelectionPasses; ++pass) {
      LF_RETURN_IF_ERROR(kernels_.SelectionHistogram(selection_, pass, cuts, histogram, stream_));
      LF_RETURN_IF_ERROR(kernels_.SelectionAdvance(selection_.num_lists, pass, histogram, cuts, stream_));
    }
    return absl::OkStatus();
  });
  add("mark", [this] {
    LF_RETURN_IF_ERROR(kernels_.Zero(bits_.data(), bits_.size_bytes(), stream_));
    return kernels_.SelectionMark(selection_, cuts_.as<SelectionCut>(), bits_.as<uint64_t>(), words_,
                                  stream_);
  });
  add("build", [this] {
    return kernels_.BuildIndex({bits_.as<uint64_t>(), words_, problem_.coverage, out_},
                               WorkspaceOf(build_workspace_), stream_);
  });
}

absl::Status IndexSteps::RunAll() {
  for (const Step& step : steps_) LF_RETURN_IF_ERROR(step.run());
  return absl::OkStatus();
}

absl::Status IndexSteps::CountPairs() {
  return kernels_.CountPairs({views_, problem_.num_tokens, pairs_.as<PairCounts>()},
                             WorkspaceOf(count_workspace_), stream_);
}

template <typename T>
absl::StatusOr<std::vector<T>> IndexSteps::Download(const T* from, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  LF_RETURN_IF_ERROR(kernels_.CopyOut(values.data(), from, count * kBytes<T>, stream_));
  LF_RETURN_IF_ERROR(stream_.Sync());
  return values;
}

absl::StatusOr<DiagonalColumnIndex> IndexSteps::DownloadIndex(size_t i) {
  LF_ASSIGN_OR_RETURN(const std::vector<IndexCounts> counts, Download<IndexCounts>(views_[i].counts, 1));
  if (counts[0].overflow != 0) {
    return absl::InternalError("index: a list of a head has not the room that its budget needs");
  }
  DiagonalColumnIndex index;
  index.coverage = problem_.coverage;
  LF_ASSIGN_OR_RETURN(index.columns, Download<int32_t>(views_[i].columns, counts[0].columns));
  LF_ASSIGN_OR_RETURN(index.distances, Download<int32_t>(views_[i].distances, counts[0].distances));
  LF_ASSIGN_OR_RETURN(index.runs, Download<DistanceRun>(views_[i].runs, counts[0].runs));
  return index;
}

absl::StatusOr<PairCounts> IndexSteps::DownloadPairs(size_t i) {
  LF_ASSIGN_OR_RETURN(const std::vector<PairCounts> pairs,
                      Download<PairCounts>(pairs_.as<PairCounts>() + i, 1));
  return pairs[0];
}

absl::StatusOr<std::vector<float>> IndexSteps::DownloadVertical(size_t i) {
  const int64_t list = 2 * static_cast<int64_t>(i);
  return Download<float>(scores_.as<float>() + list * problem_.num_tokens, problem_.num_tokens);
}

absl::StatusOr<std::vector<float>> IndexSteps::DownloadSlash(size_t i) {
  const int64_t list = 2 * static_cast<int64_t>(i) + 1;
  LF_ASSIGN_OR_RETURN(std::vector<float> scores,
                      Download<float>(scores_.as<float>() + list * problem_.num_tokens, problem_.num_tokens));
  std::reverse(scores.begin(), scores.end());  // entry e is of the distance num_tokens - 1 - e
  return scores;
}

}  // namespace longfill
