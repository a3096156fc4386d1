#ifndef LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_ROWS_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_ROWS_CUH_

// What the passes of the last queries over K have in common on every architecture. Queries are in reverse:
// row l is the query l before the last one, so that e = l + (key in block) is the window entry of a pair
// (kernel_set.h, LastQueryScores).

#include <cmath>
#include <cstdint>

#include "kernels/cuda/index/last_query_args.h"

namespace longfill::cuda::last_query {

// Which keys of a block the queries see.
struct BlockVisibility {
  __device__ BlockVisibility(const LastQueryArgs& args, int block) {
    const uint32_t place = static_cast<uint32_t>(block) + args.blocks.skipped;
    const uint32_t piece = place / args.blocks.of_piece;
    const uint32_t position_block = args.blocks.first + piece * args.blocks.stride +
                                    (piece & 1) * args.blocks.odd_shift + place % args.blocks.of_piece;
    last_distance = args.last_query_position - static_cast<int>(position_block) * int{kSelectionBlock};
    num_keys = static_cast<int>(min(args.num_keys - block * kSelectionBlock, kSelectionBlock));
  }
  __device__ bool All() const { return num_keys == kSelectionBlock && last_distance >= kDiagonalWindow - 1; }
  __device__ bool Sees(int row, int key) const { return key < num_keys && row + key <= last_distance; }

  int last_distance = 0;  // of key 0 from the last query
  int num_keys = 0;
};

// `value` is not NaN and not -0. As integers, floats of equal sign ascend if positive and descend if
// negative.
__device__ inline void AtomicMax(float* target, float value) {
  if (value >= 0) {
    atomicMax(reinterpret_cast<int*>(target), __float_as_int(value));
  } else {
    atomicMin(reinterpret_cast<unsigned*>(target), __float_as_uint(value));
  }
}

// Brings the largest product of a row, not scaled, to its maximum. `list` is the head's place in the call.
__device__ inline void RaiseRowMax(const LastQueryArgs& args, int list, int row, float product,
                                   float* row_max) {
  const int query = args.num_queries - 1 - row;
  if (query < 0 || product == -INFINITY) return;
  // Adding 0 turns -0 into 0, which of the two is the maximum depends on the order.
  AtomicMax(row_max + int64_t{list} * kMaxSelectingQueries + query, product * args.scale + 0.0F);
}

// log2 of 1 / row_sum, less the row's maximum; -infinity for a row that sees no key or does not exist.
__device__ inline float RowOffset(const LastQueryArgs& args, const float* row_max, const uint64_t* row_sum,
                                  int64_t list, int row) {
  const int query = args.num_queries - 1 - row;
  if (query < 0) return -INFINITY;
  const int64_t place = list * kMaxSelectingQueries + query;
  if (row_sum[place] == 0) return -INFINITY;
  constexpr double kLog2E = 1.4426950408889634;
  const double sum_log2 = log2(static_cast<double>(row_sum[place])) - 40;
  return static_cast<float>(-(row_max[place] * kLog2E + sum_log2));
}

// Window entries are sums over antidiagonals of [rows, keys]. The 8 x 8 parts (i, j) of the products with
// equal i + j have the same entries in the same places, so they are added up where they are, in registers;
// what is left for each of the kCount sums of parts are the antidiagonals of one 8 x 8 tile, which shared
// memory gives. Tile t holds the entries 8 t to 8 t + 14.
template <int kKeys, int kRows>
struct DiagonalTiles {
  static constexpr int kCount = kKeys / 8 + kRows / 8 - 1;
  static constexpr int kEntries = kKeys + kRows - 1;
  static constexpr int kPitch = 72;  // 64 and a quarter of the banks, so that four tiles are read at a time

  float tiles[kCount + 2][kPitch];  // one of zeros before and after the others

  __device__ void Clear(int lane) {
    for (int i = lane; i < kPitch; i += 32) tiles[0][i] = tiles[kCount + 1][i] = 0.0F;
  }

  // Two neighbours of tile t: `place` is even, 8 * (one coordinate in the part) + the other.
  __device__ __forceinline__ void Store(int t, int place, float first, float second) {
    *reinterpret_cast<float2*>(&tiles[1 + t][place]) = make_float2(first, second);
  }

  // Sum of the entry's products, which lie in tile e / 8 and the one before; 0 for e outside of the window.
  __device__ __forceinline__ float Entry(int e) const {
    if (e < 0 || e >= kEntries) return 0.0F;
    const int diagonal = e % 8;
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum += tiles[e / 8 + (i <= diagonal ? 1 : 0)][8 * i + (diagonal - i & 7)];
    }
    return sum;
  }
};

}  // namespace longfill::cuda::last_query

#endif  // LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_ROWS_CUH_
