#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_TILE_MEMORY_CUH_
#define LONGFILL_KERNELS_CUDA_ATTENTION_TILE_MEMORY_CUH_

// Shape of a thread block for each head dim and tile, its shared memory, and how rows of Q, K and V get
// there.

#include <cstdint>

#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/attention/key_queue.cuh"
#include "kernels/cuda/attention/key_ranges.cuh"
#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/tile_task.cuh"

namespace longfill::cuda::attention {

// A tile of 64 or 128 rows. 32 rows a warp use each matrix of K and V that they read from shared memory
// twice, without which its bandwidth would be the limit; at head dim 256 the registers hold only 16.
template <int kHeadDimOf, int kRowsOf>
struct TileShape {
  static constexpr int kHeadDim = kHeadDimOf;
  static constexpr int kRows = kRowsOf;
  static constexpr int kRowTiles = kHeadDim <= 128 ? 2 : 1;  // of 16 rows, in each warp
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kThreads = kRows / kWarpRows * 32;
  static constexpr int kChunkKeys = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kBlocksPerSm = 8 * 32 / kThreads;  // eight warps of 255 registers
  static constexpr int kRowBytes = kHeadDim * 2;
};

// What changes seldom is read from here each time: registers are for the sums.
template <typename Shape>
struct SharedMemory {
  alignas(128) char q[Shape::kRows * Shape::kRowBytes];
  alignas(128) char k[Shape::kChunkKeys * Shape::kRowBytes];
  alignas(128) char v[Shape::kChunkKeys * Shape::kRowBytes];
  KeyQueue queue;
  TileTask<Shape::kRows> task;
  int32_t row[Shape::kRows];  // row of the sequence at each position of the tile, or -1
  int32_t has_rows;           // 0: the tile is none of this launch
  int32_t next_item;
};

// Rows lie in shared memory in pieces of 16 bytes, permuted so that eight rows at one place touch all banks.
template <int kHeadDim>
__device__ __forceinline__ int Swizzle(int row, int piece) {
  constexpr int kPieces = kHeadDim / 8;
  static_assert(kPieces % 4 == 0);
  if constexpr (kPieces % 8 == 0) return piece ^ (row & 7);
  return piece ^ (row >> 1 & 3);  // odd rows start in the middle of the banks
}

struct RowSource {
  const char* data = nullptr;
  bool valid = false;  // false: zeros, nothing is read
};

// Starts copies of kRows rows to shared memory; source_of(i) says where row i is.
template <typename Shape, int kRows, typename SourceOf>
__device__ __forceinline__ void CopyRows(const char* to, const SourceOf& source_of) {
  constexpr int kPieces = Shape::kHeadDim / 8;
  constexpr int kThreadsOfRow = kPieces % 8 == 0 ? 8 : 4;
  constexpr int kRowsAtOnce = Shape::kThreads / kThreadsOfRow;
  static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0);  // so a thread's places stay the same
  const int thread = Thread();
  const int first_row = thread / kThreadsOfRow;
  const int first_piece = thread % kThreadsOfRow;
  const uint32_t shared_row = SharedAddress(to) + static_cast<uint32_t>(first_row * Shape::kRowBytes);
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce) {
    const RowSource source = source_of(first_row + i);
#pragma unroll
    for (int j = 0; j < kPieces / kThreadsOfRow; ++j) {
      const int piece = first_piece + j * kThreadsOfRow;
      CopyAsync16(shared_row + static_cast<uint32_t>(i * Shape::kRowBytes +
                                                     Swizzle<Shape::kHeadDim>(first_row, piece) * 16),
                  source.data + piece * 16, source.valid);
    }
  }
}

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_TILE_MEMORY_CUH_
