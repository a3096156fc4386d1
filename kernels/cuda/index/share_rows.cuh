#ifndef LONGFILL_KERNELS_CUDA_INDEX_SHARE_ROWS_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_SHARE_ROWS_CUH_

// The products of one warp's rows with a representative of each of 64 key blocks, by mma.sync. Representative
// r of the blocks of a chunk lies in one stage, block i in row i, so that a product for block i is at the
// same place for every r: the largest of them is an elementwise maximum of fragments.

#include <cstdint>

#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/tile_memory.cuh"
#include "kernels/cuda/index/e4m3.cuh"
#include "kernels/cuda/index/row_scores.cuh"
#include "kernels/cuda/index/share_selection_args.h"

namespace longfill::cuda::share_selection {

using attention::LoadMatrices;
using attention::MultiplyAdd;
using attention::SharedAddress;
using attention::Swizzle;

template <typename Element, typename Shape>
class ShareRows {
 public:
  static constexpr int kHeadDim = Shape::kHeadDim;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kBlockTiles = kChunkBlocks / 8;
  static constexpr int kTilesAtOnce = 4;  // of blocks, whose products are formed side by side
  static constexpr int kSteps = kHeadDim / 16;

  __device__ __forceinline__ ShareRows()
      : lane_(static_cast<int>(threadIdx.x) % 32),
        first_row_(static_cast<int>(threadIdx.x) / 32 * Shape::kWarpRows) {}

  // From the tile's rows in shared memory. Matrices 0 and 1 are the two halves of 16 rows, 2 and 3 the same
  // of the next 8 dims.
  __device__ __forceinline__ void LoadQueries(const char* rows) {
    const int row = lane_ % 8;
    const uint32_t address =
        SharedAddress(rows) +
        static_cast<uint32_t>((first_row_ + row + 8 * (lane_ / 8 % 2)) * Shape::kRowBytes);
    const int place = Swizzle<kHeadDim>(row, lane_ / 16);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        LoadMatrices(q_[i][step], Place(address, 16 * i, 2 * step ^ place));
      }
    }
  }

  // Rounds the queries to E4M3 together with those of their row block, all of whose rows are at `row_block`
  // in shared memory.
  __device__ __forceinline__ void RoundToE4m3(const char* row_block) {
    constexpr int kPieces = static_cast<int>(kRowBlock) * Shape::kRowBytes / 16;
    float largest = 0;
    for (int i = lane_; i < kPieces; i += 32) {
      const uint4 piece = reinterpret_cast<const uint4*>(row_block)[i];
      for (const uint32_t pair : {piece.x, piece.y, piece.z, piece.w}) {
        largest = fmaxf(largest, LargestMagnitude(WidenPair<Element>(pair)));
      }
    }
    const E4m3Scale scale = E4m3Scale::Of(WarpMax(largest));
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (uint32_t& pair : q_[i][step]) {
          pair =
              NarrowE4m3<Element>(FromE4m3(PairToE4m3(WidenPair<Element>(pair), scale.scale), scale.inverse));
        }
      }
    }
  }

  // Raises scores to the products with a stage, to which `bonus` is added. Matrices 0 and 1 are the two
  // halves of 16 dims of 8 blocks, 2 and 3 the same of the next 8 blocks.
  __device__ __forceinline__ void Score(const char* stage, float bonus, RowScores<kRowTiles>* rows) const {
    const int row = lane_ % 8;
    const uint32_t address =
        SharedAddress(stage) + static_cast<uint32_t>((row + 8 * (lane_ / 16)) * Shape::kRowBytes);
    const int place = Swizzle<kHeadDim>(row, lane_ / 8 % 2);
#pragma unroll
    for (int first = 0; first < kBlockTiles; first += kTilesAtOnce) {
      float products[kRowTiles][kTilesAtOnce][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int n = 0; n < kTilesAtOnce; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) products[i][n][e] = bonus;
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int n = 0; n < kTilesAtOnce; n += 2) {
          uint32_t k[4];
          LoadMatrices(k, Place(address, 8 * (first + n), 2 * step ^ place));
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            MultiplyAdd<Element>(products[i][n], q_[i][step], k[0], k[1]);
            MultiplyAdd<Element>(products[i][n + 1], q_[i][step], k[2], k[3]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int n = 0; n < kTilesAtOnce; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            rows->scores[i][first + n][e] = fmaxf(rows->scores[i][first + n][e], products[i][n][e]);
          }
        }
      }
    }
  }

 private:
  // `rows` further down, at a permuted place of 16 bytes.
  __device__ __forceinline__ static uint32_t Place(uint32_t matrix_row, int rows, int place) {
    return matrix_row + static_cast<uint32_t>(rows * Shape::kRowBytes + place * 16);
  }

  const int lane_;
  const int first_row_;  // of the warp, in the tile
  uint32_t q_[kRowTiles][kSteps][4];
};

}  // namespace longfill::cuda::share_selection

#endif  // LONGFILL_KERNELS_CUDA_INDEX_SHARE_ROWS_CUH_
