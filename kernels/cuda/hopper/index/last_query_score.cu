// The second pass over K: probabilities, their sums over the queries for each key, and over the pairs of
// equal distance for each window of a key block (kernel_set.h, LastQueryScores).
//
// Here keys are the rows of the products and the queries of two heads the columns, so that a key's sum is
// mostly within a thread. A block of 128 keys is multiplied in two halves: half t has, of the block's groups
// of eight keys, every second from t on (a stride of the descriptor). So warp w of the four gets keys 32 w to
// 32 w + 31 in the end, and most of a window's sums are within a thread too: parts of 8 x 8 that have the
// same entries are added up in registers, as in DiagonalTiles. While a half is worked on, the next is
// multiplied.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "kernels/cuda/hopper/index/key_walk.cuh"
#include "kernels/cuda/hopper/index/last_query.h"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace cuda::hopper {
namespace {

using attention::FastExp2;
using last_query::BlockVisibility;

constexpr int kWarpgroups = 2;
constexpr int kHeads = kLastQueryWarps / kWarpgroups;  // of a warpgroup
constexpr int kConsumerWarps = kWarpgroupWarps * kWarpgroups;
constexpr int kConsumerThreads = 32 * kConsumerWarps;
constexpr int kWarpgroupThreads = 32 * kWarpgroupWarps;
constexpr int kThreads = kConsumerThreads + kWarpgroupThreads;  // the last warpgroup brings keys
constexpr int kConsumerRegisters = 240;                         // of 168 at the start
constexpr int kProducerRegisters = 24;
constexpr int kQueryBarrier = 1;
constexpr int kWindowBarrier = 2;  // and the next, for each warpgroup
constexpr int kWarpKeys = 32;
constexpr int kWindow = static_cast<int>(kDiagonalWindow);
static_assert(kWarpKeys * kWarpgroupWarps == kKeyTile);

using WarpTiles = last_query::DiagonalTiles<kWarpKeys, kHeadRows>;
constexpr int kWarpWindow = WarpTiles::kEntries;

// Of a warpgroup, for one block of keys: each warp's part of the windows of its heads.
struct WindowParts {
  float entries[kHeads][kWarpgroupWarps][kWarpWindow + 1];
};

template <int kHeadDim>
struct Memory {
  using Shape = KeyTileShape<kHeadDim>;
  static constexpr int kStages = kHeadDim == 64 ? 6 : 3;
  char queries[Shape::kQueryBytes];
  char tiles[kStages][Shape::kTileBytes];
  WarpTiles diagonals[kConsumerWarps];
  WindowParts windows[kWarpgroups][2];  // of a block of keys and the one before
  float offsets[kGroupRows];            // RowOffset
  KeyRing<kStages> ring;
};

// Products of a thread: element 32 s + 4 c + 2 h + b is, of half t, key lane / 4 of group 2 h + t of the
// warp's four groups, row 8 c + 2 (lane % 4) + b of head s of the warpgroup.
using Products = float[64];

template <typename Element, int kHeadDim>
__device__ __forceinline__ void StartHalf(Products& products, uint32_t keys, uint32_t queries, int t) {
  using Shape = KeyTileShape<kHeadDim>;
  StartProducts();
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
    MultiplyRows<Element, 2 * kEightRowsBytes, kEightRowsBytes>(
        products, keys + t * kEightRowsBytes / kRowsUnit + Shape::KeyStep(step),
        queries + Shape::QueryStep(step), step > 0);
  }
  EndProducts();
}

// A warp's sums over a block of keys. All loops unroll: registers are indexed by constants only.
class BlockSums {
 public:
  // Half t, 0 and then 1. `offsets`: what is to be added to a row's scaled scores (log2) so that 2^score is
  // the probability.
  template <int t>
  __device__ __forceinline__ void Add(const Products& products, float scale_log2,
                                      const float (&offsets)[kHeads][16]) {
#pragma unroll
    for (int s = 0; s < kHeads; ++s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float key = 0.0F;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const float p =
                FastExp2(fmaf(products[32 * s + 4 * c + 2 * h + b], scale_log2, offsets[s][2 * c + b]));
            key += p;
            const int tile = 2 * h + t + c;
            // The tiles 0 to 9 get their first part in half 0, tile 10 in half 1.
            const bool first = t == 0 ? h == 0 || tile > 7 : tile == 10;
            diagonals_[s][tile][b] = first ? p : diagonals_[s][tile][b] + p;
          }
        }
        keys_[s][2 * h + t] = key;
      }
    }
  }

  // Sum over all rows of head s for key 8 * (lane % 4) + lane / 4 of the warp's keys.
  __device__ __forceinline__ float KeySum(int s, int lane) const {
    const bool upper = (lane & 2) != 0;
    const bool odd = (lane & 1) != 0;
    float kept[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sent = upper ? keys_[s][i] : keys_[s][2 + i];
      kept[i] = (upper ? keys_[s][2 + i] : keys_[s][i]) + __shfl_xor_sync(kAllLanes, sent, 2);
    }
    return (odd ? kept[1] : kept[0]) + __shfl_xor_sync(kAllLanes, odd ? kept[0] : kept[1], 1);
  }

  __device__ __forceinline__ void StoreDiagonals(int s, int lane, WarpTiles* tiles) const {
#pragma unroll
    for (int i = 0; i < WarpTiles::kCount; ++i) {
      tiles->Store(i, 2 * lane, diagonals_[s][i][0], diagonals_[s][i][1]);
    }
  }

 private:
  float diagonals_[kHeads][WarpTiles::kCount][2] = {};
  float keys_[kHeads][4] = {};
};

__device__ __forceinline__ void HideKeys(const BlockVisibility& visible, int first_key, int lane,
                                         Products& products) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int key = first_key + i / 2 % 2 * 16 + lane / 4;
    const int row = i / 4 % 8 * 8 + lane % 4 * 2 + i % 2;
    if (!visible.Sees(row, key)) products[i] = -INFINITY;
  }
}

// A consumer warp: its place and what it writes.
struct Warp {
  __device__ Warp()
      : lane(static_cast<int>(threadIdx.x) % 32),
        warpgroup(static_cast<int>(threadIdx.x) / kWarpgroupThreads),
        warp(static_cast<int>(threadIdx.x) / 32 % kWarpgroupWarps) {}

  // The sums of a block of keys to its scores.
  __device__ __forceinline__ void Store(const LastQueryArgs& args, const LastQueryScores& scores,
                                        const LastQueryGroup& group, int block, const BlockSums& sums,
                                        WarpTiles* tiles, WindowParts* windows) const {
    const int64_t key = block * kSelectionBlock + kWarpKeys * warp + lane % 4 * 8 + lane / 4;
#pragma unroll
    for (int s = 0; s < kHeads; ++s) {
      const int slot = kHeads * warpgroup + s;
      const float sum = sums.KeySum(s, lane);
      if (slot < group.num_heads && key < args.num_keys) {
        scores.vertical[group.list[slot] * scores.vertical_stride + key] = sum;
      }
      sums.StoreDiagonals(s, lane, tiles);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const int e = 32 * i + lane;
        if (e < kWarpWindow) windows->entries[s][warp][e] = tiles->Entry(e);
      }
      __syncwarp();
    }
    SyncThreads(kWindowBarrier + warpgroup, kWarpgroupThreads);
#pragma unroll
    for (int s = 0; s < kHeads; ++s) {
      const int slot = kHeads * warpgroup + s;
      if (slot >= group.num_heads) continue;
      float* slash = scores.slash + (int64_t{group.list[slot]} * args.num_blocks + block) * kDiagonalWindow;
      for (int e = 32 * warp + lane; e < kWindow; e += kWarpgroupThreads) {
        float sum = 0.0F;
#pragma unroll
        for (int w = 0; w < kWarpgroupWarps; ++w) {
          const int of_warp = e - kWarpKeys * w;
          if (of_warp >= 0 && of_warp < kWarpWindow) sum += windows->entries[s][w][of_warp];
        }
        slash[e] = sum;
      }
    }
  }

  int lane;
  int warpgroup;
  int warp;  // of the warpgroup
};

template <typename Element, int kHeadDim>
__device__ void Consume(const LastQueryArgs& args, Memory<kHeadDim>* memory, const float* row_max,
                        const uint64_t* row_sum, const LastQueryScores& scores) {
  using Shape = KeyTileShape<kHeadDim>;
  constexpr int kStages = Memory<kHeadDim>::kStages;
  const Warp warp;
  const int lane = warp.lane;
  WarpTiles* diagonals = &memory->diagonals[kWarpgroupWarps * warp.warpgroup + warp.warp];
  diagonals->Clear(lane);
  const uint32_t queries = RowsFrom(SharedAddress(memory->queries)) +
                           warp.warpgroup * kHeads * kHeadRows * kSwizzledRowBytes / kRowsUnit;
  const uint32_t tiles = RowsFrom(SharedAddress(memory->tiles));
  const int first_key = kWarpKeys * warp.warp;
  const Stretch stretch(args);
  int number = 0;
  for (int64_t from = stretch.first; from < stretch.end;) {
    const GroupPart part(args, stretch, from);
    const LastQueryGroup& group = args.groups[part.group];
    SyncThreads(kQueryBarrier, kConsumerThreads);  // nobody needs the queries before
    LoadGroupQueries<kHeadDim, kConsumerThreads>(args, group, memory->queries);
    static_assert(kConsumerThreads == kGroupRows);
    const int slot = static_cast<int>(threadIdx.x) / kHeadRows;
    memory->offsets[threadIdx.x] = slot < group.num_heads
                                       ? last_query::RowOffset(args, row_max, row_sum, group.list[slot],
                                                               static_cast<int>(threadIdx.x) % kHeadRows)
                                       : -INFINITY;
    SyncThreads(kQueryBarrier, kConsumerThreads);
    float offsets[kHeads][16];
#pragma unroll
    for (int i = 0; i < kHeads * 16; ++i) {
      offsets[i / 16][i % 16] = memory->offsets[(kHeads * warp.warpgroup + i / 16) * kHeadRows +
                                                i % 16 / 2 * 8 + lane % 4 * 2 + i % 2];
    }

    // Of each block half 0, then half 1; while one is summed, the other, or the next block's, is multiplied.
    Products even, odd;
    BlockSums sums;
    const auto wait_for_keys = [&](int tile) {
      const TilePlace<kStages> place(tile);
      Wait(&memory->ring.full[place.stage], place.parity);
      __syncwarp();
    };
    const auto start_even = [&](int tile) {
      const TilePlace<kStages> place(tile);
      StartHalf<Element, kHeadDim>(even, tiles + place.stage * Shape::kTileOffset, queries, 0);
    };
    const auto start_odd = [&](int tile) {
      const TilePlace<kStages> place(tile);
      StartHalf<Element, kHeadDim>(odd, tiles + place.stage * Shape::kTileOffset, queries, 1);
    };
    const auto wait = [&](Products& products) {
      WaitForProducts<0>();
      Pin(products);
    };
    const auto add_even = [&](int block) {
      const BlockVisibility visible(args, block);
      if (!visible.All()) HideKeys(visible, first_key, lane, even);
      sums.Add<0>(even, args.scale_log2, offsets);
    };
    const auto finish = [&](int block, int tile) {
      const BlockVisibility visible(args, block);
      if (!visible.All()) HideKeys(visible, first_key + 8, lane, odd);
      sums.Add<1>(odd, args.scale_log2, offsets);
      warp.Store(args, scores, group, block, sums, diagonals, &memory->windows[warp.warpgroup][tile % 2]);
    };
    const auto release = [&](int tile) {
      if (lane == 0) Arrive(&memory->ring.empty[TilePlace<kStages>(tile).stage]);
    };

    const int last_block = part.first_block + part.num_tiles - 1;
    wait_for_keys(number);
    start_even(number);
    wait(even);
    for (int block = part.first_block; block < last_block; ++block, ++number) {
      start_odd(number);
      add_even(block);
      // Before the wait for products: ptxas would let the sums wait for them too, were there no branch
      // between.
      wait_for_keys(number + 1);
      wait(odd);
      release(number);
      start_even(number + 1);
      finish(block, number);
      wait(even);
    }
    start_odd(number);
    add_even(last_block);
    wait(odd);
    release(number);
    finish(last_block, number);
    ++number;
    from += part.num_tiles;
  }
}

template <typename Element, int kHeadDim>
__global__ __launch_bounds__(kThreads,
                             1) void HopperLastQueryScoreKernel(const __grid_constant__ CUtensorMap keys,
                                                                const __grid_constant__ LastQueryArgs args,
                                                                const float* row_max, const uint64_t* row_sum,
                                                                LastQueryScores scores) {
  extern __shared__ __align__(16) char shared[];
  auto* memory = reinterpret_cast<Memory<kHeadDim>*>(Aligned(shared));
  if (threadIdx.x == 0) memory->ring.Init(kConsumerWarps);
  __syncthreads();
  if (threadIdx.x < kConsumerThreads) {
    TakeRegisters<kConsumerRegisters>();
    Consume<Element, kHeadDim>(args, memory, row_max, row_sum, scores);
  } else {
    GiveRegisters<kProducerRegisters>();
    if (threadIdx.x != kConsumerThreads) return;
    BringKeys<kHeadDim>(keys, args, Stretch(args), SharedAddress(memory->tiles), &memory->ring);
  }
}

}  // namespace
}  // namespace cuda::hopper

absl::Status LaunchHopperLastQueryScore(const CUtensorMap& keys, const LastQueryArgs& args, int64_t head_dim,
                                        DType dtype, int64_t grid, const float* row_max,
                                        const uint64_t* row_sum, const LastQueryScores& scores,
                                        cudaStream_t stream) {
  return ForHopperLastQueryVariant<__nv_bfloat16, __half>(
      head_dim, dtype, [&]<typename Element, int kHeadDim>() {
        return Launch(
            "HopperLastQueryScoreKernel", cuda::hopper::HopperLastQueryScoreKernel<Element, kHeadDim>,
            {.grid_x = grid,
             .block = cuda::hopper::kThreads,
             .shared_bytes = sizeof(cuda::hopper::Memory<kHeadDim>) + cuda::hopper::kAlignmentBytes},
            stream, keys, args, row_max, row_sum, scores);
      });
}

}  // namespace longfill
