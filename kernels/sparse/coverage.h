#ifndef LONGFILL_KERNELS_SPARSE_COVERAGE_H_
#define LONGFILL_KERNELS_SPARSE_COVERAGE_H_

// From an index in host memory to the keys of one 64-row block. The coverage contract (every selected pair is
// covered, no pair twice, extra pairs only causal ones in touched tiles) is stated here; the CPU kernels and
// all pair counts on the host use it, and kernels of other devices are held to the same sets.

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/sparse/index_view.h"
#include "kernels/sparse/sparse_index.h"

namespace longfill {

inline constexpr int64_t kNoMaxDistance = std::numeric_limits<int64_t>::max();

// Keys [begin, end); the pair (query, key) is covered iff min_distance <= query - key < max_distance.
// min_distance >= 0, so causality is part of it.
struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t min_distance = 0;
  int64_t max_distance = kNoMaxDistance;
  friend bool operator==(const KeyRange&, const KeyRange&) = default;
};

// All keys of one row block. Ranges are disjoint and ascending; columns ascend, are in no range, and are
// causal like ranges (query >= key). Reused between calls to keep its capacity.
struct TileKeys {
  std::vector<KeyRange> ranges;
  std::vector<int32_t> columns;
  void Clear() {
    ranges.clear();
    columns.clear();
  }
};

// Keys of row block m of a prompt of num_tokens (0 <= 64 m < num_tokens), clipped to [0, min(64 m + 64,
// num_tokens)). Long stretches of consecutive columns come as ranges. Precondition: the lists are as
// ValidateIndex demands. O(keys of the tile + log).
void ExpandTile(const IndexView& index, int64_t row_block, int64_t num_tokens, TileKeys* keys);

// The runs [begin, end) of the published index conversion for row block m, not clipped: whole multiples of 64
// long, never touching, possibly overshooting the tile; what it calls ranges are their 64-wide pieces.
// `distances` ascend from 0. Cost: the log of the list and one short search for each piece.
void AppendPublishedRuns(std::span<const int32_t> distances, int64_t row_block, std::vector<KeyRange>* runs);

// Pairs of the query rows of row block m (rows beyond num_tokens do not count) under `keys`.
int64_t CountTilePairs(const TileKeys& keys, int64_t row_block, int64_t num_tokens);

// Pairs of the rows of row blocks [row_block_begin, row_block_end), and of the whole prompt. For a block list
// both counts are its own.
PairCounts CountRowBlockPairs(const IndexView& index, int64_t row_block_begin, int64_t row_block_end,
                              int64_t num_tokens);
PairCounts CountPairs(const IndexView& index, int64_t num_tokens);

inline int64_t CausalPairs(int64_t num_tokens) { return num_tokens * (num_tokens + 1) / 2; }

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_COVERAGE_H_
