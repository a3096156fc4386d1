#include "kernels/cuda/attention/attention_tables.h"

#include <algorithm>

namespace longfill::cuda::attention {
namespace {

constexpr float kLog2E = 1.44269504F;

// Tiles that may hold rows: where the map deals whole ones, exactly those that do.
struct Tiles {
  PositionMap map;
  int64_t count = 0;
};
Tiles TilesOf(const PositionMap& map, int64_t num_rows, int64_t tile_rows) {
  if (map.HasWholeBlocks(tile_rows)) {
    return {map.OfBlocks(tile_rows), (num_rows + tile_rows - 1) / tile_rows};
  }
  const int64_t first = map.Position(0) / tile_rows;
  return {PositionMap::Contiguous(first), map.Position(num_rows - 1) / tile_rows - first + 1};
}

}  // namespace

std::vector<HeadEntry> HeadsByKvHead(const AttentionParams& params, std::span<const int32_t> heads) {
  const auto kv_head = [&](int64_t head) {
    return params.kv_head.empty() ? static_cast<int32_t>(head / (params.num_q_heads / params.num_kv_heads))
                                  : params.kv_head[static_cast<size_t>(head)];
  };
  std::vector<HeadEntry> entries;
  for (const int32_t head : heads) entries.push_back({.head = head, .kv_head = kv_head(head)});
  std::stable_sort(entries.begin(), entries.end(),
                   [](const HeadEntry& a, const HeadEntry& b) { return a.kv_head < b.kv_head; });
  for (size_t begin = 0; begin < entries.size();) {
    size_t end = begin;
    while (end < entries.size() && entries[end].kv_head == entries[begin].kv_head) ++end;
    for (size_t i = begin; i < end; ++i) {
      entries[i].group_begin = static_cast<int32_t>(begin);
      entries[i].group_size = static_cast<int32_t>(end - begin);
    }
    begin = end;
  }
  return entries;
}

SequenceTable SequencesOf(const AttentionParams& params, int64_t num_heads, int64_t tile_rows) {
  SequenceTable table;
  int64_t num_with_rows = 0;
  for (const AttentionSequence& sequence : params.sequences) {
    if (sequence.q_begin == sequence.q_end) continue;
    SequenceEntry entry;
    entry.q_begin = sequence.q_begin;
    entry.num_rows = sequence.q_end - sequence.q_begin;
    entry.q_positions = sequence.q_positions;
    const Tiles tiles = TilesOf(sequence.q_positions, entry.num_rows, tile_rows);
    entry.tiles = tiles.map;
    entry.num_tiles = static_cast<int32_t>(tiles.count);
    entry.first_item = static_cast<int32_t>(std::min(table.num_items, kMaxItems));
    entry.k_row_of_0 = sequence.k_begin - sequence.key_first;
    if (sequence.key_range_begin < sequence.key_range_end) {
      // Keys beyond the prompt take no part; this keeps positions within 32 bits.
      entry.key_range_begin = static_cast<int32_t>(std::min(sequence.key_range_begin, sequence.num_tokens));
      entry.key_range_end = static_cast<int32_t>(std::min(sequence.key_range_end, sequence.num_tokens));
    }
    entry.first_index = num_with_rows++ * params.num_q_heads;
    table.entries.push_back(entry);
    table.num_items += tiles.count * num_heads;
  }
  return table;
}

std::vector<IndexView> IndicesOf(const AttentionParams& params) {
  std::vector<IndexView> indices;
  for (const AttentionSequence& sequence : params.sequences) {
    if (sequence.q_begin == sequence.q_end) continue;
    indices.insert(indices.end(), sequence.indices.begin(), sequence.indices.end());
  }
  return indices;
}

Args ArgsOf(const AttentionParams& params) {
  Args args;
  args.q = params.q.data;
  args.k = params.k.data;
  args.v = params.v.data;
  args.out = params.out.data;
  args.lse = params.lse;
  args.q_head_stride = params.q.head_stride;
  args.q_row_stride = params.q.row_stride;
  args.k_head_stride = params.k.head_stride;
  args.k_row_stride = params.k.row_stride;
  args.v_head_stride = params.v.head_stride;
  args.v_row_stride = params.v.row_stride;
  args.out_head_stride = params.out.head_stride;
  args.out_row_stride = params.out.row_stride;
  args.lse_head_stride = params.lse_head_stride;
  args.scale = params.scale;
  args.scale_log2 = params.scale * kLog2E;
  args.merge = params.merge;
  args.covered_pairs = reinterpret_cast<unsigned long long*>(params.covered_pairs);
  args.computed_pairs = reinterpret_cast<unsigned long long*>(params.computed_pairs);
  args.block_finish_ns = reinterpret_cast<unsigned long long*>(params.block_finish_ns);
  return args;
}

}  // namespace longfill::cuda::attention
