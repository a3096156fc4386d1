#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_KEY_WALK_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_KEY_WALK_CUH_

// What both passes of the last queries over K share. A thread block stays on its SM and takes an equal
// stretch of all pairs of a group of heads and a block of 128 keys, group by group. The queries of a group's
// (at most four) heads lie in shared memory while the stretch is in the group, blocks of keys come through a
// ring that one thread fills with the copy engine. Rows of queries and keys are rows of 64 elements, one
// column of such rows after the other, with the swizzle of 128 bytes.

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/hopper/barrier.cuh"
#include "kernels/cuda/hopper/index/row_products.cuh"
#include "kernels/cuda/hopper/tma.cuh"
#include "kernels/cuda/index/last_query_args.h"
#include "kernels/cuda/index/last_query_rows.cuh"

namespace longfill::cuda::hopper {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;
inline constexpr int kKeyTile = static_cast<int>(kSelectionBlock);
inline constexpr int kHeadRows = static_cast<int>(kMaxSelectingQueries);
inline constexpr int kGroupRows = kLastQueryWarps * kHeadRows;  // queries of a group
inline constexpr int kWarpgroupWarps = 4;

template <int kHeadDim>
struct KeyTileShape {
  static constexpr int kColumns = (kHeadDim + 63) / 64;  // of 64 elements; what lies beyond the head dim is
                                                         // never multiplied
  static constexpr int kSteps = kHeadDim / 16;           // products of 16 elements
  static constexpr int kKeyColumnBytes = kKeyTile * kSwizzledRowBytes;
  static constexpr int kTileBytes = kColumns * kKeyColumnBytes;
  static constexpr int kQueryColumnBytes = kGroupRows * kSwizzledRowBytes;
  static constexpr int kQueryBytes = kColumns * kQueryColumnBytes;

  // Where the 16 elements of a step begin, as an offset of RowsFrom; and a tile.
  __device__ static constexpr int KeyStep(int step) {
    return (step / 4 * kKeyColumnBytes + step % 4 * 32) / kRowsUnit;
  }
  __device__ static constexpr int QueryStep(int step) {
    return (step / 4 * kQueryColumnBytes + step % 4 * 32) / kRowsUnit;
  }
  static constexpr int kTileOffset = kTileBytes / kRowsUnit;
};

template <int kStages>
struct KeyRing {
  Barrier full[kStages];
  Barrier empty[kStages];

  __device__ void Init(int num_consumer_warps) {
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(&full[i], 1);
      InitBarrier(&empty[i], num_consumer_warps);
    }
    PublishBarriers();
  }
};

// Tiles are numbered from the start of the thread block.
template <int kStages>
struct TilePlace {
  __device__ explicit TilePlace(int number)
      : stage(number % kStages), parity(static_cast<uint32_t>(number / kStages) & 1U) {}
  int stage;
  uint32_t parity;
};

// The thread block's stretch; pair p is key block p % num_blocks for group p / num_blocks.
struct Stretch {
  __device__ explicit Stretch(const LastQueryArgs& args) {
    const int64_t pairs = int64_t{args.num_groups} * args.num_blocks;
    first = pairs * blockIdx.x / gridDim.x;
    end = pairs * (blockIdx.x + 1) / gridDim.x;
  }
  int64_t first, end;
};

// The part of a stretch that is in one group.
struct GroupPart {
  __device__ GroupPart(const LastQueryArgs& args, const Stretch& stretch, int64_t from) {
    group = static_cast<int>(from / args.num_blocks);
    first_block = static_cast<int>(from - int64_t{group} * args.num_blocks);
    num_tiles = static_cast<int>(min(int64_t{args.num_blocks} - first_block, stretch.end - from));
  }
  int group;
  int first_block;
  int num_tiles;
};

// One thread.
template <int kHeadDim, int kStages>
__device__ void BringKeys(const CUtensorMap& keys, const LastQueryArgs& args, const Stretch& stretch,
                          uint32_t tiles, KeyRing<kStages>* ring) {
  using Shape = KeyTileShape<kHeadDim>;
  int group = static_cast<int>(stretch.first / args.num_blocks);
  int block = static_cast<int>(stretch.first - int64_t{group} * args.num_blocks);
  const int num_tiles = static_cast<int>(stretch.end - stretch.first);
  for (int number = 0; number < num_tiles; ++number) {
    const TilePlace<kStages> place(number);
    Wait(&ring->empty[place.stage], place.parity ^ 1U);
    ArriveExpecting(&ring->full[place.stage], Shape::kTileBytes);
    const uint32_t to = tiles + place.stage * Shape::kTileBytes;
    for (int column = 0; column < Shape::kColumns; ++column) {
      CopyBox(to + column * Shape::kKeyColumnBytes, &keys, 64 * column, block * kKeyTile,
              args.groups[group].kv_head, &ring->full[place.stage]);
    }
    if (++block == args.num_blocks) {
      block = 0;
      ++group;
    }
  }
}

// All of kThreads threads; zeros where there is no query or no head.
template <int kHeadDim, int kThreads>
__device__ void LoadGroupQueries(const LastQueryArgs& args, const LastQueryGroup& group, char* to) {
  using Shape = KeyTileShape<kHeadDim>;
  constexpr int kChunks = kHeadDim / 8;  // of 16 bytes in a row
  for (int i = static_cast<int>(threadIdx.x); i < kGroupRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const int query = args.num_queries - 1 - row % kHeadRows;
    uint4 elements = make_uint4(0, 0, 0, 0);
    if (row / kHeadRows < group.num_heads && query >= 0) {
      const int64_t head = group.head[row / kHeadRows];
      const char* from =
          static_cast<const char*>(args.q) + 2 * (head * args.q_head_stride + query * args.q_row_stride);
      elements = *reinterpret_cast<const uint4*>(from + 16 * chunk);
    }
    const int place =
        chunk / 8 * Shape::kQueryColumnBytes + row * kSwizzledRowBytes + (chunk % 8 ^ row % 8) * 16;
    *reinterpret_cast<uint4*>(to + place) = elements;
  }
  FenceSharedForAsync();
}

// Barrier 0 is of the whole thread block.
__device__ __forceinline__ void SyncThreads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// The first multiple of 1024 bytes in the dynamic shared memory of a kernel, which gets kAlignmentBytes more.
inline constexpr int kAlignmentBytes = 1024;
__device__ __forceinline__ char* Aligned(char* shared) {
  return shared + (kAlignmentBytes - SharedAddress(shared) % kAlignmentBytes) % kAlignmentBytes;
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_KEY_WALK_CUH_
