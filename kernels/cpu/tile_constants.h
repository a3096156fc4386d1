#ifndef LONGFILL_KERNELS_CPU_TILE_CONSTANTS_H_
#define LONGFILL_KERNELS_CPU_TILE_CONSTANTS_H_

#include <cstdint>

namespace longfill {

inline constexpr int64_t kTileLanes = 64;  // vectors packed side by side; one row block of queries
inline constexpr int64_t kScoreRows = 6;   // rows multiplied with them at a time
inline constexpr int64_t kValueDims = 4;   // output dims accumulated at a time
inline constexpr int64_t kChunkKeys =
    96;  // keys between two steps of the online softmax; scores of 24 KiB stay in L1
inline constexpr int64_t kMaxHeadDim = 256;

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_TILE_CONSTANTS_H_
