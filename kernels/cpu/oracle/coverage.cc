#include <algorithm>
#include <functional>
#include <iterator>
#include <set>

#include "kernels/cpu/oracle/oracle.h"

namespace longfill::oracle {
namespace {

constexpr int64_t kBlock = 64;

template <typename Covered>
Mask CausalMask(int64_t num_tokens, const Covered& covered) {
  Mask mask(num_tokens, num_tokens);
  for (int64_t query = 0; query < num_tokens; ++query) {
    for (int64_t key = 0; key <= query; ++key) {
      if (covered(query, key)) mask.Set(query, key);
    }
  }
  return mask;
}

}  // namespace

int64_t Mask::CountPairs() const { return std::count(covered.begin(), covered.end(), uint8_t{1}); }

Mask DenseMask(int64_t num_tokens) {
  return CausalMask(num_tokens, [](int64_t, int64_t) { return true; });
}

Mask AShapeMask(const AShape& pattern, int64_t num_tokens) {
  return CausalMask(num_tokens, [&](int64_t query, int64_t key) {
    return key < pattern.n_init || query - key < pattern.n_local;
  });
}

std::vector<int64_t> TilePieces(std::span<const int32_t> distances) {
  const std::set<int64_t> left(distances.begin(), distances.end());
  std::vector<int64_t> pieces;
  for (auto above = left.end(); above != left.begin(); above = left.lower_bound(pieces.back())) {
    const int64_t distance = *std::prev(above);
    const bool adjoins = !pieces.empty() && distance >= pieces.back() - kBlock;
    pieces.push_back(adjoins ? pieces.back() - kBlock : distance);
  }
  return pieces;
}

Mask TilesMask(std::span<const int32_t> columns, std::span<const int32_t> distances, int64_t num_tokens) {
  const std::vector<int64_t> pieces = TilePieces(distances);
  return CausalMask(num_tokens, [&](int64_t query, int64_t key) {
    if (std::find(columns.begin(), columns.end(), key) != columns.end()) return true;
    const int64_t start = query / kBlock * kBlock;
    return std::any_of(pieces.begin(), pieces.end(),
                       [&](int64_t p) { return key >= start - p && key < start + kBlock - p; });
  });
}

PublishedTile ConvertPublished(std::span<const int32_t> columns, std::span<const int32_t> distances,
                               int64_t row_block) {
  std::vector<int64_t> ascending(columns.begin(), columns.end());
  std::vector<int64_t> descending(distances.begin(), distances.end());
  std::sort(ascending.begin(), ascending.end());
  std::sort(descending.begin(), descending.end(), std::greater<>());

  PublishedTile tile;
  const int64_t end = row_block * kBlock + kBlock;
  size_t slash = 0;
  while (slash < descending.size() && descending[slash] >= end) ++slash;
  if (slash == descending.size()) return tile;

  size_t vertical = 0;
  const auto emit = [&](int64_t begin, int64_t stop) {
    for (int64_t start = begin; start < stop; start += kBlock) tile.range_starts.push_back(start);
    while (vertical < ascending.size() && ascending[vertical] < stop) {
      if (ascending[vertical] < begin) tile.columns.push_back(ascending[vertical]);
      ++vertical;
    }
  };
  int64_t run_stop = std::max(end - descending[slash], kBlock);
  int64_t run_begin = run_stop - kBlock;
  for (++slash; slash < descending.size(); ++slash) {
    const int64_t edge = std::max(end - descending[slash], kBlock);
    if (edge > run_stop + kBlock) {
      emit(run_begin, run_stop);
      run_begin = edge - kBlock;
      run_stop = edge;
    } else if (edge > run_stop) {
      run_stop += kBlock;
    }
  }
  emit(run_begin, run_stop);
  return tile;
}

Mask ParityMask(std::span<const int32_t> columns, std::span<const int32_t> distances, int64_t num_tokens) {
  Mask mask(num_tokens, num_tokens);
  for (int64_t start = 0; start < num_tokens; start += kBlock) {
    const PublishedTile tile = ConvertPublished(columns, distances, start / kBlock);
    for (int64_t query = start; query < std::min(start + kBlock, num_tokens); ++query) {
      for (const int64_t range : tile.range_starts) {
        for (int64_t key = range; key < range + kBlock; ++key) {
          if (key <= query) mask.Set(query, key);
        }
      }
      for (const int64_t key : tile.columns) {
        if (key < num_tokens) mask.Set(query, key);  // the published kernel has no causal test here
      }
    }
  }
  return mask;
}

Mask BlockMask(const std::vector<std::vector<int32_t>>& blocks, int64_t num_tokens) {
  return CausalMask(num_tokens, [&](int64_t query, int64_t key) {
    const std::vector<int32_t>& row = blocks[query / kBlock];
    return std::find(row.begin(), row.end(), key / kBlock) != row.end();
  });
}

}  // namespace longfill::oracle
