#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_ARGS_H_
#define LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_ARGS_H_

// What the attention kernels are given. The tables lie in the workspace; attention.cc fills them.

#include <cstdint>

#include "kernels/sparse/index_view.h"
#include "kernels/sparse/position_map.h"

namespace longfill::cuda::attention {

// One sequence that has query rows. An item is one tile of one of its query heads: 64 or 128 rows at
// positions that are multiples of that.
struct SequenceEntry {
  int32_t first_item = 0;  // number of its first in the launch
  int32_t num_tiles = 0;   // of each head, that may hold rows
  PositionMap tiles;       // tile at place t is tiles.Position(t)
  int64_t q_begin = 0;
  int64_t num_rows = 0;
  PositionMap q_positions;
  int64_t k_row_of_0 = 0;  // row of k and v of the key at position 0, may be negative
  int32_t key_range_begin = 0;
  int32_t key_range_end = 0;
  int64_t first_index = 0;  // of query head 0, in `indices`
};

// Query heads in the order in which they run: those of one KV head side by side.
struct HeadEntry {
  int32_t head = 0;
  int32_t kv_head = 0;
  int32_t group_begin = 0;  // entries [group_begin, group_begin + group_size) share the KV head
  int32_t group_size = 0;
};

struct Args {
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;
  float* lse = nullptr;
  int64_t q_head_stride = 0, q_row_stride = 0;  // elements
  int64_t k_head_stride = 0, k_row_stride = 0;
  int64_t v_head_stride = 0, v_row_stride = 0;
  int64_t out_head_stride = 0, out_row_stride = 0;
  int64_t lse_head_stride = 0;
  float scale = 0;
  float scale_log2 = 0;  // scale / ln 2
  bool merge = false;
  bool wide_tiles = true;  // false: heads that want tiles of 128 rows get those of 64
  // Whether all tiles of a query head come before those of the next, or tiles of the heads of a KV head by
  // turns.
  bool head_by_head = false;
  const SequenceEntry* sequences = nullptr;
  int32_t num_sequences = 0;
  const HeadEntry* heads = nullptr;
  const IndexView* indices = nullptr;
  int32_t num_items = 0;
  int32_t* items_taken = nullptr;  // beyond the first item of each thread block; 0 at the start
  unsigned long long* covered_pairs = nullptr;
  unsigned long long* computed_pairs = nullptr;
  // For kernels/cuda/hopper: a CUtensorMap of K and one of V for each sequence, and when its blocks ended.
  const void* tensor_maps = nullptr;

  unsigned long long* block_finish_ns = nullptr;
};

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_ARGS_H_
