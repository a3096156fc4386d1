#ifndef LONGFILL_KERNELS_CUDA_INDEX_SHARE_SELECTION_ARGS_H_
#define LONGFILL_KERNELS_CUDA_INDEX_SHARE_SELECTION_ARGS_H_

// What the kernel of selection by share is given, and the shape of its thread blocks.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/api/kernel_set.h"

namespace longfill {

inline constexpr int kMaxShareHeads = 64;  // of a launch: kernel parameters are limited

struct ShareSelectionArgs {
  const void* q = nullptr;
  int64_t q_head_stride = 0, q_row_stride = 0;  // elements
  const void* representatives = nullptr;        // [num_representatives, plane_stride / head_dim, head_dim]
  int64_t plane_stride = 0;                     // elements
  int32_t num_representatives = 0;
  int32_t num_samples = 0;       // the first of them; 0: none
  float sample_bonus = 0;        // added to products with samples: ln(block_keys / num_samples) / scale
  const void* own_k = nullptr;   // the key of each row, where there are samples
  int64_t own_k_row_stride = 0;  // elements
  // Queries are to be rounded to E4M3; representatives and own keys are. The Hopper kernel has these as E4M3,
  // with the factors that belong to products with them; the generic one as 16-bit elements, without.
  bool fp8 = false;
  const float* block_scales = nullptr;  // [blocks, rounded up to whole eights]
  const float* own_scales = nullptr;    // [ceil(num_rows / 64)]
  int32_t num_heads = 0;                // of the launch
  int64_t num_rows = 0;                 // of a head
  PositionMap positions;
  float scale_log2 = 0;            // scale / ln 2
  int32_t block_keys = kRowBlock;  // of a key block, or of a coarse block
  uint64_t* bits = nullptr;
  int64_t words_per_row = 0;
  // Of a selection of coarse blocks, the first of two launches: log2 of each row's sum, [num_heads,
  // num_rows], -infinity where it has neither a block nor own keys. It forces no blocks.
  float* sums = nullptr;
  // Of the second: what the first has written, of the same rows.
  const uint64_t* open = nullptr;  // [num_heads, ceil(num_rows / 64), open_words]; null: all blocks are open
  int64_t open_words = 0;
  const float* coarse_sums = nullptr;
  int64_t end_tile = 0;  // the tile behind the launch's last one
  float share_log2[kMaxShareHeads] = {};
};

// A tile of 64 or 128 rows. 32 rows a warp use each matrix of representatives that they read from shared
// memory twice, without which its bandwidth would be the limit; at head dim 256 registers hold only 16.
template <int kHeadDimOf>
struct ShareShape {
  static constexpr int kHeadDim = kHeadDimOf;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kHeadDim <= 128 ? 2 : 1;  // of 16 rows, in each warp
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kWarpsOfRowBlock = static_cast<int>(kRowBlock) / kWarpRows;
  static constexpr int kStages = 2;  // of one representative of each block of a chunk
  static constexpr int kRowBytes = 2 * kHeadDim;
  static constexpr int kBlocksPerSm = 2;
};

// One launch over `num_tiles` tiles before args.end_tile of all heads.
absl::Status LaunchShareSelection(const ShareSelectionArgs& args, int64_t num_tiles, int64_t head_dim,
                                  DType dtype, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_SHARE_SELECTION_ARGS_H_
