#include "models/recall_guard.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/sparse/coverage.h"
#include "kernels/sparse/sparse_index.h"
#include "parallel/index_storage.h"

namespace longfill {
namespace {

// The budgets times `factor`; Dense where one of them reaches the prompt.
struct Widen {
  int64_t factor;
  int64_t num_tokens;

  // `unit`: tokens that one of a budget stands for.
  bool Reaches(int64_t budget, int64_t unit = 1) const { return budget >= num_tokens / unit / factor; }

  HeadPattern operator()(const Dense&) const { return Dense{}; }
  HeadPattern operator()(const AShape& a) const {
    if (Reaches(a.n_local)) return Dense{};
    return AShape{a.n_init, a.n_local * factor};
  }
  HeadPattern operator()(const VerticalSlash& lines) const {
    const VerticalSlashBudget budget(lines, num_tokens);  // what is selected at run time, at least
    if (Reaches(budget.columns) || Reaches(budget.distances)) return Dense{};
    return VerticalSlash{budget.columns * factor, budget.distances * factor};
  }
  HeadPattern operator()(const BlockSparse& blocks) const {
    if (Reaches(blocks.num_blocks, kRowBlock)) return Dense{};
    return BlockSparse{blocks.num_blocks * factor};
  }
  HeadPattern operator()(const BlockShare& share) const {
    BlockShare widened = share;
    widened.min_share = std::max(kLeastShare, share.min_share / static_cast<double>(factor));
    return widened;
  }
};

}  // namespace

absl::Status Validate(const RecallOptions& options) {
  if (options.min_recall == 0 || (options.min_recall > 0 && options.min_recall <= 1)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("min_recall ", options.min_recall, " is not in (0, 1]"));  // NaN as well
}

HeadPattern WidenedPattern(const HeadPattern& pattern, int64_t factor, int64_t window, int64_t num_tokens) {
  return BoundByWindow(std::visit(Widen{factor, num_tokens}, pattern), window, num_tokens);
}

HeadPattern SeesAllPattern(int64_t window, int64_t num_tokens) {
  return BoundByWindow(Dense{}, window, num_tokens);
}

bool SomeLeaveOutKeys(std::span<const HeadPattern> patterns, int64_t window, int64_t num_tokens) {
  const HeadPattern all_keys = SeesAllPattern(window, num_tokens);
  return std::any_of(patterns.begin(), patterns.end(),
                     [&](const HeadPattern& pattern) { return pattern != all_keys; });
}

bool SeesAllKeys(const HeadPattern& pattern, const PairCounts& pairs, int64_t window, int64_t num_tokens) {
  return pattern == SeesAllPattern(window, num_tokens) || pairs.covered == CausalPairs(num_tokens);
}

}  // namespace longfill
