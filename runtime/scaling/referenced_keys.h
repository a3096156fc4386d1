#ifndef LONGFILL_RUNTIME_SCALING_REFERENCED_KEYS_H_
#define LONGFILL_RUNTIME_SCALING_REFERENCED_KEYS_H_

// Which of the keys that are gathered by sequence any row needs. An exchange of those alone would move so
// much less. Pure functions of values.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sparse/index_view.h"
#include "parallel/mesh.h"

namespace longfill {

// Of the key blocks (kTokenBlock keys) of the prompt that other head groups hold, the share that rows of head
// group `sequence_index` reference in one layer: [num_kv_heads], through any of the query heads of each.
// `heads`: the indices of the layer's query heads in host memory, a multiple of num_kv_heads; plan of at
// least two head groups. 0 where the others hold nothing.
std::vector<double> ReferencedShares(const ShardPlan& plan, int sequence_index,
                                     std::span<const IndexView> heads, int64_t num_kv_heads);

// Under this share of a KV head an exchange of its referenced blocks would be worth building.
inline constexpr double kSparseExchangeShare = 0.5;

// Of all layers, and of head groups that have rows and do not have all.
struct ReferencedKeys {
  std::vector<double> by_kv_head;  // [KV heads], the means
  double mean = 0;
  double least = 1;
  double under_half =
      0;  // of (layer, head group, KV head), the part whose share is below kSparseExchangeShare
};

// `layers`: the indices of the query heads of each; not empty.
ReferencedKeys SummarizeReferencedKeys(const ShardPlan& plan, std::span<const PackedIndices> layers,
                                       int64_t num_kv_heads);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SCALING_REFERENCED_KEYS_H_
