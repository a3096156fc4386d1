#ifndef LONGFILL_KERNELS_SPARSE_SPARSE_INDEX_H_
#define LONGFILL_KERNELS_SPARSE_SPARSE_INDEX_H_

// The index of one query head for one prompt: which (query, key) pairs its attention covers. Host objects;
// plain data, no device code. Query rows are grouped in 64-row blocks at absolute positions (block m is [64m,
// 64m + 64)), so an index means the same on every rank and for every chunk.

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <variant>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/sparse/head_pattern.h"

namespace longfill {

inline constexpr int64_t kRowBlock = 64;  // query rows that share one list of keys
// That hold `rows` rows, the last one maybe in part.
constexpr int64_t RowBlocksOf(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// Distances [d_lo, d_hi). An exact run covers exactly its pairs; a coarse run covers, for row block m, every
// causal pair with the keys [64m - d_hi + 1, 64m + 64 - d_lo).
struct DistanceRun {
  int64_t d_lo = 0;
  int64_t d_hi = 0;
  bool exact = false;
  friend bool operator==(const DistanceRun&, const DistanceRun&) = default;
};

// Dense, A-shape, window and vertical-slash heads. A pair is covered if a run covers it, or if its key is one
// of `columns` and not after the query.
struct DiagonalColumnIndex {
  std::vector<int32_t> distances;  // the selected distances, ascending, unique; empty for dense and A-shape
  // Ascending, disjoint; an exact run is at least 64 from its neighbours, so that no key of a row block needs
  // two predicates. With `distances` they are CoarseRuns of these. Empty in parity coverage, which walks
  // `distances` for each row block.
  std::vector<DistanceRun> runs;
  std::vector<int32_t> columns;  // key positions, ascending, unique
  Coverage coverage = Coverage::kTiles;
  friend bool operator==(const DiagonalColumnIndex&, const DiagonalColumnIndex&) = default;
};

// CSR of 64-wide key blocks: row block m attends causally to the key blocks key_blocks[row_offsets[m] ..
// row_offsets[m + 1]), ascending, unique. row_offsets has one entry more than the prompt has row blocks.
struct BlockListIndex {
  std::vector<int64_t> row_offsets;
  std::vector<int32_t> key_blocks;
  friend bool operator==(const BlockListIndex&, const BlockListIndex&) = default;
};

using SparseIndex = std::variant<DiagonalColumnIndex, BlockListIndex>;

// The coarse runs of distances that ascend: whole pieces of 64 keys, which cover all windows. The piece at p
// is the keys [64m - p, 64m - p + 64) of row block m. The first one is at the largest distance; after a piece
// at p the next is at min(largest distance below p, p - 64), until no distance is below p. Pieces that touch
// are one run, so d_hi - 1 - d_lo is a multiple of 64, but for a last piece below 0, which is cut there. This
// is the published walk (coverage.h) of a row block that all distances reach, taken for every row block.
std::vector<DistanceRun> CoarseRuns(std::span<const int32_t> distances);

// Lowerings. `distances` and `columns` come in any order, without duplicates; distance 0 is added when it is
// missing.
SparseIndex MakeDenseIndex();
// Keys at or beyond num_tokens get no column: give it, or n_init integers are stored however short the prompt
// is.
SparseIndex MakeAShapeIndex(const AShape& pattern, int64_t num_tokens = std::numeric_limits<int32_t>::max());
// Of a pattern that says all, dense or A-shape; empty: its keys are selected for each prompt.
std::optional<SparseIndex> MakeFixedIndex(const HeadPattern& pattern, int64_t num_tokens);
SparseIndex MakeVerticalSlashIndex(std::vector<int32_t> columns, std::vector<int32_t> distances,
                                   Coverage coverage);

// Structure against a prompt of num_tokens: sorted, unique, in range, runs disjoint, CSR monotone, no key
// block after its row block. Internal error naming what is broken. Cheap: linear in the index. Columns beyond
// num_tokens are broken in a vertical-slash index only (an A-shape's n_init may exceed the prompt).
absl::Status ValidateIndex(const SparseIndex& index, int64_t num_tokens);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_SPARSE_INDEX_H_
