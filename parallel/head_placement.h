#ifndef LONGFILL_PARALLEL_HEAD_PLACEMENT_H_
#define LONGFILL_PARALLEL_HEAD_PLACEMENT_H_

#include <cstdint>
#include <span>
#include <vector>

namespace longfill {

// Which query heads each member of a head group computes.
struct HeadPlacement {
  std::vector<std::vector<int32_t>> heads;  // [num_ranks], ascending; may be empty
  int64_t max_load = 0;                     // largest sum of costs of one rank
  int64_t kv_copies = 0;                    // sum over ranks of the KV heads that its query heads read
};

// Whole heads on `num_ranks` >= 1 ranks: minimises the maximum load, then the copies of KV heads. cost[h] >=
// 0 (covered pairs), kv_head[h] is the KV head of query head h. Exact when the search ends within its node
// limit (always for up to 10 heads), otherwise the best of several starts with moves and swaps. Integers
// only, so equal on every rank.
HeadPlacement PlaceHeads(std::span<const int64_t> cost, std::span<const int32_t> kv_head, int num_ranks);

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_HEAD_PLACEMENT_H_
