#include "runtime/scaling/referenced_keys.h"

#include <algorithm>

#include "kernels/base/status.h"
#include "kernels/sparse/referenced_blocks.h"

namespace longfill {
namespace {

int OwnerOf(const ShardPlan& plan, int64_t position) {
  return plan.SequenceIndex(plan.RankOfToken(position));
}

}  // namespace

std::vector<double> ReferencedShares(const ShardPlan& plan, int sequence_index,
                                     std::span<const IndexView> heads, int64_t num_kv_heads) {
  LF_CHECK(plan.mesh().sequence > 1 && num_kv_heads > 0);
  LF_CHECK(static_cast<int64_t>(heads.size()) % num_kv_heads == 0);
  const int64_t num_tokens = plan.num_tokens();
  std::vector<bool> of_others;
  for (int64_t begin = 0; begin < num_tokens; begin += kTokenBlock) {
    of_others.push_back(OwnerOf(plan, begin) != sequence_index);
  }
  const int64_t all = std::ranges::count(of_others, true);
  const size_t group_size = heads.size() / static_cast<size_t>(num_kv_heads);
  std::vector<double> shares;
  for (size_t kv_head = 0; kv_head < static_cast<size_t>(num_kv_heads); ++kv_head) {
    ReferencedBlocks referenced(num_tokens, kTokenBlock);
    for (const IndexView& head : heads.subspan(kv_head * group_size, group_size)) {
      for (int64_t begin = 0; begin < num_tokens; begin += plan.deal_block()) {
        if (OwnerOf(plan, begin) != sequence_index) continue;
        referenced.Add(head, begin, std::min(begin + plan.deal_block(), num_tokens));
      }
    }
    const std::vector<bool> blocks = referenced.Blocks();
    int64_t needed = 0;
    for (size_t b = 0; b < blocks.size(); ++b) needed += of_others[b] && blocks[b] ? 1 : 0;
    shares.push_back(all == 0 ? 0 : static_cast<double>(needed) / static_cast<double>(all));
  }
  return shares;
}

ReferencedKeys SummarizeReferencedKeys(const ShardPlan& plan, std::span<const PackedIndices> layers,
                                       int64_t num_kv_heads) {
  ReferencedKeys keys{.by_kv_head = std::vector<double>(static_cast<size_t>(num_kv_heads))};
  double samples = 0;  // of each KV head
  double under_half = 0;
  for (const PackedIndices& layer : layers) {
    const std::vector<IndexView> heads = layer.Views(layer.data());
    for (int s = 0; s < plan.mesh().sequence; ++s) {
      const int64_t own = plan.GroupNumTokens(s);
      if (own == 0 || own == plan.num_tokens()) continue;  // nobody asks, or nobody is asked
      ++samples;
      const std::vector<double> shares = ReferencedShares(plan, s, heads, num_kv_heads);
      for (size_t h = 0; h < shares.size(); ++h) {
        keys.by_kv_head[h] += shares[h];
        keys.least = std::min(keys.least, shares[h]);
        if (shares[h] < kSparseExchangeShare) ++under_half;
      }
    }
  }
  if (samples == 0) return keys;
  for (double& share : keys.by_kv_head) {
    share /= samples;
    keys.mean += share / static_cast<double>(num_kv_heads);
  }
  keys.under_half = under_half / (samples * static_cast<double>(num_kv_heads));
  return keys;
}

}  // namespace longfill
