#ifndef LONGFILL_KERNELS_CPU_ATTENTION_TILE_H_
#define LONGFILL_KERNELS_CPU_ATTENTION_TILE_H_

// Online-softmax attention of one 64-row block, fed with keys in chunks (arXiv 2205.14135, section 3.1).
// Queries lie in vector lanes, so that maxima and sums over keys need no step across lanes; see
// score_rows-inl.h for the keys.

#include <cstdint>
#include <string_view>

#include "kernels/cpu/tile_constants.h"

namespace longfill {

// Keys of one step. Lane i sees key j iff visible_from[j] <= tile position of lane i < visible_to[j].
struct AttentionChunk {
  const float* k_rows[kChunkKeys];
  const float* v_rows[kChunkKeys];
  float visible_from[kChunkKeys];
  float visible_to[kChunkKeys];
  int64_t num_keys = 0;
  bool masked = false;  // false: every lane sees every key, the limits are not read
};

// Scratch of one tile; all arrays are aligned to 64 bytes.
struct AttentionTile {
  float* queries = nullptr;        // [head_dim, kTileLanes], times scale * log2(e)
  float* sums = nullptr;           // [head_dim, kTileLanes], unnormalised output
  float* scores = nullptr;         // [kChunkKeys, kTileLanes]
  float* lane_position = nullptr;  // [kTileLanes] position of each lane's row less that of the block's first
  float* row_max = nullptr;        // [kTileLanes], in units of log2
  float* row_sum = nullptr;        // [kTileLanes]
  float* factor = nullptr;         // [kTileLanes]
  float* lines = nullptr;          // [kTileLanes, 4] for transpositions
  int64_t head_dim = 0;            // a multiple of 8, at most kMaxHeadDim
};

// Floats of the arrays of a tile, and their placement in memory aligned to 64 bytes.
int64_t AttentionTileFloats(int64_t head_dim);
AttentionTile PlaceAttentionTile(float* memory, int64_t head_dim);

// Packs rows [0, num_rows) of q, num_rows in [1, 64], and clears the sums; the other lanes are zero.
void StartAttentionTile(const AttentionTile& tile, const float* q, int64_t row_stride, int64_t num_rows,
                        float scale);
void AddAttentionChunk(const AttentionTile& tile, const AttentionChunk& chunk);
// Normalises, writes out rows and the natural-log lse[0, num_rows) when it is not nullptr. With merge, both
// are read first and become the attention over the union of keys. A row that saw no key: 0 and -infinity, or
// left as it was.
void FinishAttentionTile(const AttentionTile& tile, int64_t num_rows, bool merge, float* out,
                         int64_t row_stride, float* lse);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_ATTENTION_TILE_H_
