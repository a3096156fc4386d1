#include "kernels/sparse/sparse_index.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/sparse/coverage.h"

namespace longfill {
namespace {

// Ascending, unique, in [0, limit).
absl::Status CheckPositions(const char* what, const std::vector<int32_t>& values, int64_t limit) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      return absl::InternalError(
          absl::StrCat("sparse index: ", what, "[", i, "] = ", values[i], " is not in [0, ", limit, ")"));
    }
    if (i > 0 && values[i] <= values[i - 1]) {
      return absl::InternalError(absl::StrCat("sparse index: ", what, "[", i, "] = ", values[i], " follows ",
                                              values[i - 1], ", not ascending and unique"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckRuns(const std::vector<DistanceRun>& runs) {
  for (size_t i = 0; i < runs.size(); ++i) {
    const DistanceRun& run = runs[i];
    if (run.d_lo < 0 || run.d_hi <= run.d_lo) {
      return absl::InternalError(absl::StrCat("sparse index: runs[", i, "] = [", run.d_lo, ", ", run.d_hi,
                                              ") is empty or negative"));
    }
    if (i == 0) continue;
    const DistanceRun& before = runs[i - 1];
    if (run.d_lo < before.d_hi) {
      return absl::InternalError(absl::StrCat("sparse index: runs[", i, "] starts at ", run.d_lo,
                                              " before the end ", before.d_hi, " of the run before it"));
    }
    // Otherwise one key would need two predicates in one row block.
    if ((run.exact || before.exact) && run.d_lo - (before.d_hi - 1) < kRowBlock) {
      return absl::InternalError(absl::StrCat("sparse index: runs[", i, "] starts at ", run.d_lo,
                                              ", nearer than ", kRowBlock, " to distance ", before.d_hi - 1,
                                              " of the run before it, and one of them is exact"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckIndex(const DiagonalColumnIndex& index, int64_t num_tokens) {
  const bool selected = !index.distances.empty();
  const int64_t limit = selected ? num_tokens : int64_t{1} << 31;
  LF_RETURN_IF_ERROR(CheckPositions("distances", index.distances, limit));
  LF_RETURN_IF_ERROR(CheckPositions("columns", index.columns, limit));
  LF_RETURN_IF_ERROR(CheckRuns(index.runs));
  if (!selected) {
    if (index.coverage == Coverage::kTiles) return absl::OkStatus();
    return absl::InternalError("sparse index: parity coverage without distances");
  }
  if (index.distances.front() != 0) {
    return absl::InternalError(absl::StrCat("sparse index: distances start at ", index.distances.front(),
                                            ", distance 0 is missing"));
  }
  if (index.coverage == Coverage::kTiles && index.runs != CoarseRuns(index.distances)) {
    return absl::InternalError(absl::StrCat("sparse index: the ", index.runs.size(),
                                            " runs are not those of the ", index.distances.size(),
                                            " distances"));
  }
  return absl::OkStatus();
}

absl::Status CheckIndex(const BlockListIndex& index, int64_t num_tokens) {
  const int64_t num_row_blocks = RowBlocksOf(num_tokens);
  const std::vector<int64_t>& offsets = index.row_offsets;
  if (static_cast<int64_t>(offsets.size()) != num_row_blocks + 1) {
    return absl::InternalError(absl::StrCat("sparse index: row_offsets has ", offsets.size(),
                                            " entries, expected ", num_row_blocks + 1, " for ", num_tokens,
                                            " tokens"));
  }
  if (offsets.front() != 0 || offsets.back() != static_cast<int64_t>(index.key_blocks.size())) {
    return absl::InternalError(absl::StrCat("sparse index: row_offsets run from ", offsets.front(), " to ",
                                            offsets.back(), ", expected 0 to ", index.key_blocks.size()));
  }
  for (int64_t m = 0; m < num_row_blocks; ++m) {  // all of them first: the next loop reads through them
    if (offsets[m + 1] >= offsets[m]) continue;
    return absl::InternalError(
        absl::StrCat("sparse index: row_offsets[", m + 1, "] = ", offsets[m + 1], " is below ", offsets[m]));
  }
  for (int64_t m = 0; m < num_row_blocks; ++m) {
    for (int64_t i = offsets[m]; i < offsets[m + 1]; ++i) {
      const int32_t block = index.key_blocks[i];
      if (block < 0 || block > m) {
        return absl::InternalError(
            absl::StrCat("sparse index: key block ", block, " of row block ", m, " is not in [0, ", m, "]"));
      }
      if (i > offsets[m] && block <= index.key_blocks[i - 1]) {
        return absl::InternalError(absl::StrCat("sparse index: key block ", block, " of row block ", m,
                                                " follows ", index.key_blocks[i - 1],
                                                ", not ascending and unique"));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::vector<DistanceRun> CoarseRuns(std::span<const int32_t> distances) {
  std::vector<DistanceRun> runs;  // from the largest distances on; d_lo is where the last piece is
  for (auto it = distances.rbegin(); it != distances.rend(); ++it) {
    const int64_t d = *it;
    if (runs.empty() || d < runs.back().d_lo - kRowBlock) {
      runs.push_back({d, d + 1, false});
    } else if (d < runs.back().d_lo) {
      runs.back().d_lo -= kRowBlock;
    }
  }
  std::reverse(runs.begin(), runs.end());
  if (!runs.empty()) runs.front().d_lo = std::max<int64_t>(runs.front().d_lo, 0);
  return runs;
}

SparseIndex MakeDenseIndex() {
  DiagonalColumnIndex index;
  index.runs = {{0, kNoMaxDistance, true}};
  return index;
}

SparseIndex MakeAShapeIndex(const AShape& pattern, int64_t num_tokens) {
  DiagonalColumnIndex index;
  index.runs = {{0, pattern.n_local, true}};
  index.columns.resize(std::max<int64_t>(0, std::min(pattern.n_init, num_tokens)));
  std::iota(index.columns.begin(), index.columns.end(), 0);
  return index;
}

std::optional<SparseIndex> MakeFixedIndex(const HeadPattern& pattern, int64_t num_tokens) {
  if (std::holds_alternative<Dense>(pattern)) return MakeDenseIndex();
  const auto* a_shape = std::get_if<AShape>(&pattern);
  if (a_shape == nullptr) return std::nullopt;
  return MakeAShapeIndex(*a_shape, num_tokens);
}

SparseIndex MakeVerticalSlashIndex(std::vector<int32_t> columns, std::vector<int32_t> distances,
                                   Coverage coverage) {
  DiagonalColumnIndex index;
  std::sort(columns.begin(), columns.end());
  std::sort(distances.begin(), distances.end());
  if (!std::binary_search(distances.begin(), distances.end(), 0)) distances.insert(distances.begin(), 0);
  if (coverage == Coverage::kTiles) index.runs = CoarseRuns(distances);
  index.distances = std::move(distances);
  index.columns = std::move(columns);
  index.coverage = coverage;
  return index;
}

absl::Status ValidateIndex(const SparseIndex& index, int64_t num_tokens) {
  return std::visit([num_tokens](const auto& form) { return CheckIndex(form, num_tokens); }, index);
}

}  // namespace longfill
