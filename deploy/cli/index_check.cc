#include "deploy/cli/index_check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "deploy/cli/attention_rows.h"
#include "kernels/sparse/coverage.h"
#include "parallel/index_storage.h"

namespace longfill {
namespace {

constexpr double kScoreTolerance = 1e-3;  // relative; the contract suite holds the bits to a tighter bound

// Attention probabilities of the last queries of one head in fp64.
class Probabilities {
 public:
  Probabilities(const IndexProblem& problem, const IndexCheckInput& input, ThreadPool& threads)
      : problem_(problem),
        input_(input),
        scale_(1 / std::sqrt(static_cast<double>(problem.head_dim))),
        max_(static_cast<size_t>(problem.num_queries()), -std::numeric_limits<double>::infinity()),
        sum_(max_.size(), 0) {
    threads.ParallelFor(problem.num_queries(), [this](int64_t query, int) { Normalise(query); });
  }

  int64_t Position(int64_t query) const { return problem_.num_tokens - problem_.num_queries() + query; }
  double At(int64_t query, int64_t key) const {
    return key > Position(query) ? 0 : std::exp(Score(query, key) - max_[query]) / sum_[query];
  }

 private:
  double Score(int64_t query, int64_t key) const {
    const int64_t dim = problem_.head_dim;
    return scale_ * Dot<double>(input_.last_q.data() + query * dim, input_.k.data() + key * dim, dim);
  }
  void Normalise(int64_t query) {
    std::vector<double> scores(static_cast<size_t>(Position(query) + 1));
    for (int64_t key = 0; key <= Position(query); ++key) scores[key] = Score(query, key);
    max_[query] = *std::max_element(scores.begin(), scores.end());
    for (const double score : scores) sum_[query] += std::exp(score - max_[query]);
  }

  const IndexProblem& problem_;
  const IndexCheckInput& input_;
  const double scale_;
  std::vector<double> max_, sum_;
};

// Sampled entries of one list: sums over the queries of the probability of a key, or at a distance.
absl::StatusOr<double> CheckScores(const Probabilities& probabilities, const IndexProblem& problem,
                                   std::span<const float> scores, bool slash, int64_t samples,
                                   ThreadPool& threads) {
  const std::vector<int64_t> entries = SampleRows(problem.num_tokens, samples, 7);
  std::vector<double> errors(entries.size(), 0);
  threads.ParallelFor(std::ssize(entries), [&](int64_t e, int) {
    const float got = scores[entries[e]];
    if (got == std::numeric_limits<float>::infinity()) return;  // forced
    double want = 0;
    for (int64_t query = 0; query < problem.num_queries(); ++query) {
      const int64_t key = slash ? probabilities.Position(query) - entries[e] : entries[e];
      if (key >= 0) want += probabilities.At(query, key);
    }
    errors[e] = want == double{got} ? 0 : std::abs(double{got} / want - 1);
  });
  for (size_t e = 0; e < entries.size(); ++e) {
    if (errors[e] <= kScoreTolerance) continue;
    return absl::InternalError(absl::StrCat(slash ? "distance " : "key ", entries[e], ": score ",
                                            scores[entries[e]], ", relative error ", errors[e]));
  }
  return *std::max_element(errors.begin(), errors.end());
}

// The `count` entries with the largest scores, ties to the lower entry.
std::vector<int32_t> Select(std::span<const float> scores, int64_t count) {
  std::vector<int32_t> entries(scores.size());
  std::iota(entries.begin(), entries.end(), 0);
  std::nth_element(entries.begin(), entries.begin() + count, entries.end(), [&](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  entries.resize(static_cast<size_t>(count));
  return entries;
}

absl::Status CheckPairs(IndexSteps& steps, size_t i, const SparseIndex& index) {
  const PackedIndices packed({&index, 1});
  const PairCounts want = CountPairs(packed.Views(packed.data())[0], steps.problem().num_tokens);
  LF_ASSIGN_OR_RETURN(const PairCounts got, steps.DownloadPairs(i));
  if (got == want) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("pair counts are ", got.published, " published, ", got.covered,
                                          " covered, instead of ", want.published, " and ", want.covered));
}

}  // namespace

absl::StatusOr<double> CheckIndex(IndexSteps& steps, size_t i, const IndexCheckInput& input, int64_t samples,
                                  ThreadPool& threads) {
  const IndexProblem& problem = steps.problem();
  const VerticalSlashBudget budget(problem.budgets[i], problem.num_tokens);
  LF_ASSIGN_OR_RETURN(const std::vector<float> vertical, steps.DownloadVertical(i));
  LF_ASSIGN_OR_RETURN(const std::vector<float> slash, steps.DownloadSlash(i));
  const Probabilities probabilities(problem, input, threads);
  LF_ASSIGN_OR_RETURN(const double vertical_error,
                      CheckScores(probabilities, problem, vertical, /*slash=*/false, samples, threads));
  LF_ASSIGN_OR_RETURN(const double slash_error,
                      CheckScores(probabilities, problem, slash, /*slash=*/true, samples, threads));
  const SparseIndex want = MakeVerticalSlashIndex(Select(vertical, budget.columns),
                                                  Select(slash, budget.distances), problem.coverage);
  LF_ASSIGN_OR_RETURN(DiagonalColumnIndex got, steps.DownloadIndex(i));
  if (const auto& wanted = std::get<DiagonalColumnIndex>(want); got != wanted) {
    const char* const part = got.columns != wanted.columns       ? "columns"
                             : got.distances != wanted.distances ? "distances"
                                                                 : "runs";
    return absl::InternalError(absl::StrCat("the ", part, " are not those of the scores"));
  }
  LF_RETURN_IF_ERROR(CheckPairs(steps, i, want));
  return std::max(vertical_error, slash_error);
}

}  // namespace longfill
