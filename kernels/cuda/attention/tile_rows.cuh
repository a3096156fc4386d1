#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_TILE_ROWS_CUH_
#define LONGFILL_KERNELS_CUDA_ATTENTION_TILE_ROWS_CUH_

// A tile of query rows, which of its rows see a key, and what one whole warp needs to make lists of keys.

#include <cstdint>

#include "kernels/sparse/sparse_index.h"

namespace longfill::cuda::attention {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;
inline constexpr int32_t kRowBlockRows = static_cast<int32_t>(kRowBlock);

template <int kRows>
struct Tile {
  int32_t block = 0;
  int32_t first_row = 0;  // position kRows * block
  int32_t key_begin = 0;  // only keys [key_begin, key_end) take part: key range and causality
  int32_t key_end = 0;
  uint64_t rows[kRows / 64] = {};  // bit i: the row at position first_row + i is given
};

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ uint32_t LanesBelow(int lane) { return (1U << lane) - 1; }

__device__ __forceinline__ int32_t Clamp(int32_t value, int32_t low, int32_t high) {
  return min(max(value, low), high);
}

__device__ __forceinline__ int32_t InclusiveSum(int32_t value) {
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, value, step);
    if (Lane() >= step) value += other;
  }
  return value;
}
__device__ __forceinline__ int64_t WarpSum(int64_t value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Number of leading entries below `limit` of an ascending list, all lanes probing at once.
template <typename Get>
__device__ int32_t CountBelow(int32_t count, int64_t limit, const Get& get) {
  int32_t low = 0;  // entries before are below, from `high` on they are not
  int32_t high = count;
  while (low < high) {
    const int32_t step = (high - low + 31) / 32;
    const int64_t probe = low + int64_t{Lane() + 1} * step - 1;  // the last entry of the lane's part
    const bool below = probe < high && get(static_cast<int32_t>(probe)) < limit;
    low += __popc(__ballot_sync(kAllLanes, below)) * step;
    high = low + step - 1 < high ? low + step - 1 : high;
  }
  return low;
}

// No upper limit. Positions stay so far below that sums with the rows of a tile do not overflow.
inline constexpr int32_t kAnyDistance = INT32_MAX;

// Rows of the tile [from, to), counted from its first position, that see a key.
__device__ __forceinline__ uint16_t PackRows(int32_t from, int32_t to) {
  return static_cast<uint16_t>(from | to << 8);
}
inline constexpr uint16_t kNoRows = 0;
inline constexpr int32_t kNoKey = -1;

// Rows of the tile within distances [min_distance, max_distance) of a key.
template <int kRows>
__device__ __forceinline__ uint16_t RowsOfKey(const Tile<kRows>& tile, int32_t key, int32_t min_distance,
                                              int32_t max_distance) {
  const int32_t relative = key - tile.first_row;
  const int32_t from = Clamp(relative + min_distance, 0, kRows);
  const int32_t to = max_distance >= kRows - relative ? kRows : Clamp(relative + max_distance, from, kRows);
  return PackRows(from, to);
}
template <int kRows>
__device__ __forceinline__ uint16_t CausalRowsOfKey(const Tile<kRows>& tile, int32_t key) {
  return RowsOfKey(tile, key, 0, kAnyDistance);
}
// Rows given among the first `count` of the tile.
template <int kRows>
__device__ __forceinline__ int32_t RowsGiven(const Tile<kRows>& tile, int32_t count) {
  int32_t rows = 0;
#pragma unroll
  for (int i = 0; i < kRows / 64; ++i) {
    const int32_t bits = Clamp(count - 64 * i, 0, 64);
    if (bits > 0) rows += __popcll(tile.rows[i] << (64 - bits));
  }
  return rows;
}

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_TILE_ROWS_CUH_
