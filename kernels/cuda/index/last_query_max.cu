// The first pass over K: for each block of 128 keys the maximum of each query's scores and the sum of their
// exponentials relative to it.

#include <cmath>

#include "kernels/cuda/index/last_query_tile.cuh"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace cuda::last_query {
namespace {

// A sum of exponentials is relative to a reference that may lag behind the maximum by so much (log2) before
// the sum is scaled: a power of two that fp32 holds with room for 128 terms. Nothing is lost while it lags.
constexpr float kSlack = 64.0F;
constexpr float kLowestReference = -1e30F;

// A warp's rows over one block of keys. Until Join, each thread has the keys of its own columns.
template <int kTiles>
struct RowStatistics {
  float max[kTiles][2];  // of the products, not scaled
  float reference[kTiles][2];
  float sum[kTiles][2];  // of 2^(scaled product - reference)

  __device__ void Reset() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      max[i / 2][i % 2] = -INFINITY;
      reference[i / 2][i % 2] = kLowestReference;
      sum[i / 2][i % 2] = 0.0F;
    }
  }

  __device__ void Add(const float (&scores)[kTiles][2][4], float scale_log2) {
    bool behind = false;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float(&left)[4] = scores[i / 2][0];
      const float(&right)[4] = scores[i / 2][1];
      const int first = 2 * (i % 2);
      float& m = max[i / 2][i % 2];
      m = fmaxf(m, fmaxf(fmaxf(left[first], left[first + 1]), fmaxf(right[first], right[first + 1])));
      behind |= fmaf(m, scale_log2, -kSlack) > reference[i / 2][i % 2];
    }
    if (behind) RaiseReferences(scale_log2);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float r = reference[i / 2][i % 2];
      const auto exponential = [&](int keys, int place) {
        return FastExp2(fmaf(scores[i / 2][keys][2 * (i % 2) + place], scale_log2, -r));
      };
      sum[i / 2][i % 2] += (exponential(0, 0) + exponential(0, 1)) + (exponential(1, 0) + exponential(1, 1));
    }
  }

  __device__ void RaiseReferences(float scale_log2) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      float& r = reference[i / 2][i % 2];
      const float raised = fmaxf(r, max[i / 2][i % 2] * scale_log2);
      sum[i / 2][i % 2] *= FastExp2(r - raised);
      r = raised;
    }
  }

  // Over the four threads that share a row: sum becomes relative to max.
  __device__ void Join(float scale_log2) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      float& m = max[i / 2][i % 2];
      float& s = sum[i / 2][i % 2];
      m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
      m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
      s = m == -INFINITY ? 0.0F : s * FastExp2(reference[i / 2][i % 2] - m * scale_log2);
      s += __shfl_xor_sync(kAllLanes, s, 1);
      s += __shfl_xor_sync(kAllLanes, s, 2);
    }
  }
};

template <typename Element, int kHeadDim>
__global__ __launch_bounds__(kLastQueryThreads,
                             2) void LastQueryMaxKernel(const __grid_constant__ LastQueryArgs args,
                                                        BlockStatistics* statistics, float* row_max) {
  extern __shared__ __align__(16) char shared[];
  using Warp = LastQueryWarp<kHeadDim>;
  const Warp warp(args);
  const LastQueryStretch stretch(args);
  KeyStages<kHeadDim> stages(args, stretch, shared);
  QueryFragments<kHeadDim> queries;
  LoadQueries(args, warp, queries);

  const int column = warp.lane % 4;  // of the threads that share rows, each stores those of one tile
  float best[2] = {-INFINITY, -INFINITY};
  RowStatistics<Warp::kTiles> rows;
  for (int turn = 0; turn < stretch.num_turns; ++turn) {
    const int block = stretch.first + turn * args.blocks_at_once + warp.block_slot;
    const bool active = warp.active && block < stretch.end;
    const BlockVisibility visible(args, block);
    rows.Reset();
#pragma unroll 1
    for (int quarter = 0; quarter < kStagesPerBlock; ++quarter) {
      stages.Enter(turn * kStagesPerBlock + quarter);
      if (!active) continue;
#pragma unroll
      for (int step = 0; step < kStepsPerStage; ++step) {
        StepScores<kHeadDim> scores;
        ScoreStep<Element, kHeadDim>(queries, stages.StepAddress(step, warp), scores);
        if (!visible.All()) HideKeys(visible, quarter * kStageKeys + step * kStepKeys, warp, scores);
        rows.Add(scores, args.scale_log2);
      }
    }
    if (!active) continue;
    rows.Join(args.scale_log2);
    BlockStatistics* out = statistics + (int64_t{warp.list} * args.num_blocks + block) * kMaxSelectingQueries;
#pragma unroll
    for (int tile = 0; tile < Warp::kTiles; ++tile) {
      if (tile != column) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        best[half] = fmaxf(best[half], rows.max[tile][half]);
        out[warp.Row(tile, half)] = {rows.max[tile][half] * args.scale, rows.sum[tile][half]};
      }
    }
  }

  if (!warp.active || column >= Warp::kTiles) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    RaiseRowMax(args, warp.list, warp.Row(column, half), best[half], row_max);
  }
}

}  // namespace
}  // namespace cuda::last_query

absl::Status LaunchLastQueryMax(const LastQueryArgs& args, int64_t head_dim, DType dtype, int64_t grid,
                                int64_t ring_bytes, BlockStatistics* statistics, float* row_max,
                                cudaStream_t stream) {
  return ForLastQueryVariant<__nv_bfloat16, __half>(head_dim, dtype, [&]<typename Element, int kHeadDim>() {
    return Launch("LastQueryMaxKernel", cuda::last_query::LastQueryMaxKernel<Element, kHeadDim>,
                  {.grid_x = grid, .block = kLastQueryThreads, .shared_bytes = ring_bytes}, stream, args,
                  statistics, row_max);
  });
}

}  // namespace longfill
