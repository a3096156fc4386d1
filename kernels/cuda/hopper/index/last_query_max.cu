// The first pass over K: for each block of 128 keys the maximum of each query's scores and the sum of their
// exponentials relative to it. A warpgroup has the 64 queries of one head as rows and all keys of a block as
// columns, so that a row's scores are in four lanes of one warp.

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

constexpr int kConsumerWarps = kWarpgroupWarps * kLastQueryWarps;  // a warpgroup for each head of a group
constexpr int kConsumerThreads = 32 * kConsumerWarps;
constexpr int kThreads = kConsumerThreads + 32 * kWarpgroupWarps;  // the last warpgroup brings keys
constexpr int kConsumerRegisters = 112;                            // of 96 at the start
constexpr int kProducerRegisters = 24;
constexpr int kQueryBarrier = 1;

template <int kHeadDim>
struct Memory {
  using Shape = KeyTileShape<kHeadDim>;
  static constexpr int kStages = kHeadDim == 64 ? 8 : 5;
  char queries[Shape::kQueryBytes];
  char tiles[kStages][Shape::kTileBytes];
  KeyRing<kStages> ring;
};

// Scores of a thread: element 4 c + 2 h + b is row lane / 4 + 8 h of the warp's 16, key 8 c + 2 (lane % 4) +
// b.
using Scores = float[64];

struct RowStatistics {
  float max[2];  // of the products, not scaled
  float sum[2];  // of 2^(scaled product - scaled maximum)

  // Of a row's four lanes, which get the same.
  __device__ __forceinline__ RowStatistics(const Scores& scores, float scale_log2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) m[i] = fmaxf(scores[4 * i + 2 * h], scores[4 * i + 2 * h + 1]);
#pragma unroll
      for (int c = 4; c < 16; ++c) {
        m[c % 4] = fmaxf(m[c % 4], fmaxf(scores[4 * c + 2 * h], scores[4 * c + 2 * h + 1]));
      }
      float& most = max[h];
      most = fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float reference = most == -INFINITY ? 0.0F : most * scale_log2;
      float s[4] = {};
#pragma unroll
      for (int c = 0; c < 16; ++c) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          s[c % 2 * 2 + b] += FastExp2(fmaf(scores[4 * c + 2 * h + b], scale_log2, -reference));
        }
      }
      float& all = sum[h];
      all = (s[0] + s[1]) + (s[2] + s[3]);
      all += __shfl_xor_sync(kAllLanes, all, 1);
      all += __shfl_xor_sync(kAllLanes, all, 2);
    }
  }
};

template <typename Element, int kHeadDim>
__device__ __forceinline__ void ScoreTile(Scores& scores, uint32_t queries, uint32_t keys) {
  using Shape = KeyTileShape<kHeadDim>;
  StartProducts();
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
    MultiplyRows<Element, kEightRowsBytes, kEightRowsBytes>(scores, queries + Shape::QueryStep(step),
                                                            keys + Shape::KeyStep(step), step > 0);
  }
  EndProducts();
  WaitForProducts<0>();
  Pin(scores);
}

__device__ __forceinline__ void HideKeys(const last_query::BlockVisibility& visible, int first_row, int lane,
                                         Scores& scores) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int row = first_row + lane / 4 + i / 2 % 2 * 8;
    const int key = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (!visible.Sees(row, key)) scores[i] = -INFINITY;
  }
}

template <typename Element, int kHeadDim>
__device__ void Consume(const LastQueryArgs& args, Memory<kHeadDim>* memory, BlockStatistics* statistics,
                        float* row_max) {
  using Shape = KeyTileShape<kHeadDim>;
  constexpr int kStages = Memory<kHeadDim>::kStages;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int slot = warp / kWarpgroupWarps;  // of the head in its group
  const int first_row = warp % kWarpgroupWarps * 16;
  // Of a row's four lanes, lane h stores the row of half h.
  const int half = lane % 4;
  const int row = first_row + lane / 4 + 8 * half;
  const uint32_t queries =
      RowsFrom(SharedAddress(memory->queries)) + slot * kHeadRows * kSwizzledRowBytes / kRowsUnit;
  const uint32_t tiles = RowsFrom(SharedAddress(memory->tiles));
  const Stretch stretch(args);
  int number = 0;
  for (int64_t from = stretch.first; from < stretch.end;) {
    const GroupPart part(args, stretch, from);
    const LastQueryGroup& group = args.groups[part.group];
    SyncThreads(kQueryBarrier, kConsumerThreads);  // nobody needs the queries before
    LoadGroupQueries<kHeadDim, kConsumerThreads>(args, group, memory->queries);
    SyncThreads(kQueryBarrier, kConsumerThreads);
    const bool active = slot < group.num_heads;
    const int list = active ? group.list[slot] : 0;
    float best = -INFINITY;
    for (int i = 0; i < part.num_tiles; ++i, ++number) {
      const int block = part.first_block + i;
      const TilePlace<kStages> place(number);
      Wait(&memory->ring.full[place.stage], place.parity);
      Scores scores;
      __syncwarp();
      if (active) ScoreTile<Element, kHeadDim>(scores, queries, tiles + place.stage * Shape::kTileOffset);
      if (lane == 0) Arrive(&memory->ring.empty[place.stage]);
      if (!active) continue;
      const last_query::BlockVisibility visible(args, block);
      if (!visible.All()) HideKeys(visible, first_row, lane, scores);
      const RowStatistics rows(scores, args.scale_log2);
      if (half < 2) {
        const float max = half == 0 ? rows.max[0] : rows.max[1];
        best = fmaxf(best, max);
        statistics[(int64_t{list} * args.num_blocks + block) * kMaxSelectingQueries + row] = {
            max * args.scale, half == 0 ? rows.sum[0] : rows.sum[1]};
      }
    }
    if (active && half < 2) last_query::RaiseRowMax(args, list, row, best, row_max);
    from += part.num_tiles;
  }
}

template <typename Element, int kHeadDim>
__global__ __launch_bounds__(kThreads,
                             1) void HopperLastQueryMaxKernel(const __grid_constant__ CUtensorMap keys,
                                                              const __grid_constant__ LastQueryArgs args,
                                                              BlockStatistics* statistics, float* row_max) {
  extern __shared__ __align__(16) char shared[];
  auto* memory = reinterpret_cast<Memory<kHeadDim>*>(Aligned(shared));
  if (threadIdx.x == 0) memory->ring.Init(kConsumerWarps);
  __syncthreads();
  if (threadIdx.x < kConsumerThreads) {
    TakeRegisters<kConsumerRegisters>();
    Consume<Element, kHeadDim>(args, memory, statistics, row_max);
  } else {
    GiveRegisters<kProducerRegisters>();
    if (threadIdx.x != kConsumerThreads) return;
    BringKeys<kHeadDim>(keys, args, Stretch(args), SharedAddress(memory->tiles), &memory->ring);
  }
}

}  // namespace
}  // namespace cuda::hopper

absl::Status LaunchHopperLastQueryMax(const CUtensorMap& keys, const LastQueryArgs& args, int64_t head_dim,
                                      DType dtype, int64_t grid, BlockStatistics* statistics, float* row_max,
                                      cudaStream_t stream) {
  return ForHopperLastQueryVariant<__nv_bfloat16, __half>(
      head_dim, dtype, [&]<typename Element, int kHeadDim>() {
        return Launch(
            "HopperLastQueryMaxKernel", cuda::hopper::HopperLastQueryMaxKernel<Element, kHeadDim>,
            {.grid_x = grid,
             .block = cuda::hopper::kThreads,
             .shared_bytes = sizeof(cuda::hopper::Memory<kHeadDim>) + cuda::hopper::kAlignmentBytes},
            stream, keys, args, statistics, row_max);
      });
}

}  // namespace longfill
