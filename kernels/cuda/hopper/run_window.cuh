#ifndef LONGFILL_KERNELS_CUDA_HOPPER_RUN_WINDOW_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_RUN_WINDOW_CUH_

// A run as the keys that it covers for the two halves of a tile, and how these are cut into slots.

#include <cstdint>

#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/cuda/hopper/slot.cuh"
#include "kernels/sparse/sparse_index.h"

namespace longfill::cuda::hopper {

using TileRows = attention::Tile<kTileRows>;

// A tile with what follows from it for each half.
struct PlanTile {
  TileRows rows;
  int32_t half_end[2];  // what the last row of the half sees ends here; INT32_MIN without rows
  int32_t num_rows[2];
};

inline constexpr int kPlanWindows = 32;                      // in the table, one for each lane
inline constexpr int32_t kNoWindow = INT32_MAX - kHalfRows;  // beyond all keys

// A run in a tile. A row sees a key at a distance in [min_distance, max_distance); coarse runs limit nothing
// but what is after the row.
struct RunWindow {
  int32_t begin;  // keys [begin, end) of half 0, not clipped
  int32_t end;
  int32_t min_distance;
  int32_t max_distance;
  uint32_t halves;       // that the window is for, as in Slot::used
  int32_t first_slot;    // first key of its first slot
  int32_t slots_before;  // of all windows before it in the table
};

// Keys [begin, end) of a slot that some row of a half may see.
struct HalfKeys {
  int32_t begin;
  int32_t end;
  bool used;
  bool masked;
};

// The limits of an exact run hide what is outside of its window.
__device__ __forceinline__ bool IsExact(const RunWindow& window) {
  return window.min_distance != 0 || window.max_distance != attention::kAnyDistance;
}

// The window that limits nothing.
__device__ __forceinline__ RunWindow AllKeys() {
  return {INT32_MIN, kNoWindow, 0, attention::kAnyDistance, 3, 0, 0};
}

__device__ __forceinline__ RunWindow WindowOf(const TileRows& tile, const DistanceRun& run) {
  const int32_t d_lo = static_cast<int32_t>(run.d_lo);  // some row of the tile is that far from key 0
  const int32_t d_hi = static_cast<int32_t>(min(run.d_hi, int64_t{attention::kAnyDistance}));
  const int32_t first_row = tile.first_row;
  RunWindow window = {
      first_row - d_hi + 1, first_row + kHalfRows - d_lo, 0, attention::kAnyDistance, 3, 0, 0};
  if (run.exact) {
    window.min_distance = d_lo;
    window.max_distance = d_hi;
  }
  return window;
}

// The keys of a slot that begins at `first`, for one half.
__device__ __forceinline__ HalfKeys KeysOfHalf(const PlanTile& tile, int half, int32_t first,
                                               const RunWindow& window) {
  const int32_t first_row = tile.rows.first_row + half * kHalfRows;
  const int32_t begin = max(max(window.begin + half * kHalfRows, tile.rows.key_begin), first);
  const int32_t end = min(window.end + half * kHalfRows, first + kSlotKeys);
  const bool exact = IsExact(window);
  HalfKeys keys;
  keys.used = begin < min(end, tile.half_end[half]);
  keys.begin = exact ? max(tile.rows.key_begin, first) : begin;
  keys.end = min(exact ? first + kSlotKeys : end, tile.rows.key_end);
  keys.masked = keys.begin > first || keys.end < first + kSlotKeys ||
                first_row - (first + kSlotKeys - 1) < window.min_distance ||
                first_row + kHalfRows - 1 - first >= window.max_distance;
  return keys;
}

// Where the window's slots begin; returns how many there are.
__device__ __forceinline__ int32_t PlaceSlots(const PlanTile& tile, RunWindow* window) {
  const int32_t skipped = tile.num_rows[0] == 0 ? kHalfRows : 0;
  const int32_t begin = max(window->begin + skipped, tile.rows.key_begin);
  const int32_t end = max(min(window->end, tile.half_end[0]), min(window->end + kHalfRows, tile.half_end[1]));
  if (begin >= end) return 0;
  const auto origin =
      static_cast<uint32_t>(window->end > tile.rows.first_row ? tile.rows.first_row : window->begin);
  const uint32_t whole = (static_cast<uint32_t>(begin) - origin) & ~uint32_t{kSlotKeys - 1};
  window->first_slot = static_cast<int32_t>(origin + whole);
  return (end - window->first_slot + kSlotKeys - 1) / kSlotKeys;
}

// Rows given of [from, to).
__device__ __forceinline__ int32_t RowsBetween(const TileRows& rows, int32_t from, int32_t to) {
  return from >= to ? 0 : attention::RowsGiven(rows, to) - attention::RowsGiven(rows, from);
}

// The lane's share of the pairs of a slot of consecutive keys in the halves that mask it.
__device__ __forceinline__ int32_t MaskedPairs(const PlanTile& tile, const Slot& slot) {
  int32_t pairs = 0;
  const int32_t end = min(slot.first + kSlotKeys, slot.key_end);
#pragma unroll 1
  for (int32_t key = max(slot.first, slot.key_begin) + attention::Lane(); key < end; key += 32) {
    const uint32_t rows = attention::RowsOfKey(tile.rows, key, slot.min_distance, slot.max_distance);
    const int32_t from = static_cast<int32_t>(rows & 0xFF);
    const int32_t to = static_cast<int32_t>(rows >> 8);
    if ((slot.masked & 1) != 0) pairs += RowsBetween(tile.rows, from, min(to, kHalfRows));
    if ((slot.masked & 2) != 0) pairs += RowsBetween(tile.rows, max(from, kHalfRows), to);
  }
  return pairs;
}

// Of an entry of the gather ring: bits 0 and 1 are halves with rows that see the key, bits 2 and 3 halves
// with rows that do not.
__device__ __forceinline__ uint32_t HalvesOfEntry(uint32_t rows) {
  const uint32_t from = rows & 0xFF;
  const uint32_t to = rows >> 8;
  return (from < to && from < kHalfRows ? 1 : 0) | (to > kHalfRows ? 2 : 0) |
         (from > 0 || to < kHalfRows ? 4 : 0) | (from > kHalfRows || to < kTileRows ? 8 : 0);
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_RUN_WINDOW_CUH_
