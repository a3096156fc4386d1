// The second pass over K: probabilities, their sums over the queries for each key, and over the pairs of
// equal distance for each window of a key block (kernel_set.h, LastQueryScores).

#include "kernels/cuda/index/last_query_tile.cuh"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace cuda::last_query {
namespace {

template <int kHeadDim>
struct WarpTiles : DiagonalTiles<static_cast<int>(kSelectionBlock), LastQueryShape<kHeadDim>::kWarpQueries> {
  float vertical[kSelectionBlock];  // sums over the warp's rows
};

// A warp's sums on their way along the keys of a block, one step of 16 keys after the other.
template <int kHeadDim>
class ProbabilitySums {
 public:
  using Tiles = WarpTiles<kHeadDim>;
  static constexpr int kTiles = LastQueryWarp<kHeadDim>::kTiles;

  __device__ explicit ProbabilitySums(Tiles& out) : out_(out) {}

  // offsets: what is to be added to a row's scaled scores (log2) so that 2^score is the probability.
  __device__ void Add(const StepScores<kHeadDim>& scores, float scale_log2, const float (&offsets)[kTiles][2],
                      int step, int lane) {
    float columns[4] = {};  // of the step's 8 x 8 parts: left, right; two keys each
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float p =
              FastExp2(fmaf(scores[tile][i / 2][2 * half + i % 2], scale_log2, offsets[tile][half]));
          diagonals_[i / 2 + 2 * tile + half][i % 2] += p;
          columns[i] += p;
        }
      }
    }
    StoreColumns(columns, step, lane);
    StoreDiagonals<2>(2 * step, lane);
#pragma unroll
    for (int i = 0; i < kOpen; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) diagonals_[i][j] = i + 2 < kOpen ? diagonals_[i + 2][j] : 0.0F;
    }
  }

  // After the block's last step.
  __device__ void Finish(int lane) {
    StoreDiagonals<kOpen - 2>(static_cast<int>(kSelectionBlock) / 8, lane);
#pragma unroll
    for (int i = 0; i < 2 * kOpen; ++i) diagonals_[i / 2][i % 2] = 0.0F;
  }

 private:
  static constexpr int kOpen =
      2 * kTiles + 1;  // diagonal tiles that a step adds to; the first two it completes

  // Sums over the eight lanes that share keys; each exchange halves what a lane still cares for.
  __device__ void StoreColumns(const float (&columns)[4], int step, int lane) {
    const bool right = (lane & 16) != 0;
    const bool odd = (lane & 8) != 0;
    float kept[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sent = right ? columns[i] : columns[2 + i];
      kept[i] = (right ? columns[2 + i] : columns[i]) + __shfl_xor_sync(kAllLanes, sent, 16);
    }
    float sum = (odd ? kept[1] : kept[0]) + __shfl_xor_sync(kAllLanes, odd ? kept[0] : kept[1], 8);
    sum += __shfl_xor_sync(kAllLanes, sum, 4);
    if ((lane & 4) == 0) {
      out_.vertical[kStepKeys * step + (right ? 8 : 0) + lane % 4 * 2 + (odd ? 1 : 0)] = sum;
    }
  }

  // The first kStored open tiles, which are tiles first_tile on of the block.
  template <int kStored>
  __device__ void StoreDiagonals(int first_tile, int lane) {
#pragma unroll
    for (int i = 0; i < kStored; ++i) {
      out_.Store(first_tile + i, 2 * lane, diagonals_[i][0], diagonals_[i][1]);
    }
  }

  Tiles& out_;
  float diagonals_[kOpen][2] = {};
};

// From shared memory to the scores of one block, by the threads of the warps that share its queries.
template <int kHeadDim>
__device__ void StoreScores(const LastQueryArgs& args, const LastQueryScores& scores,
                            const WarpTiles<kHeadDim>* parts, int64_t list, int64_t block, int thread) {
  constexpr int kParts = LastQueryShape<kHeadDim>::kParts;
  const int64_t first_key = block * kSelectionBlock;
  const int num_keys = static_cast<int>(min(args.num_keys - first_key, kSelectionBlock));
  float* vertical = scores.vertical + list * scores.vertical_stride + first_key;
  for (int key = thread; key < num_keys; key += 32 * kParts) {
    float sum = parts[0].vertical[key];
    for (int part = 1; part < kParts; ++part) sum += parts[part].vertical[key];
    vertical[key] = sum;
  }
  float* slash = scores.slash + (list * args.num_blocks + block) * kDiagonalWindow;
  for (int e = thread; e < kDiagonalWindow; e += 32 * kParts) {
    float sum = parts[0].Entry(e);
    for (int part = 1; part < kParts; ++part) {
      sum += parts[part].Entry(e - part * LastQueryShape<kHeadDim>::kWarpQueries);
    }
    slash[e] = sum;
  }
}

template <typename Element, int kHeadDim>
__global__ __launch_bounds__(kLastQueryThreads,
                             2) void LastQueryScoreKernel(const __grid_constant__ LastQueryArgs args,
                                                          int ring_bytes, const float* row_max,
                                                          const uint64_t* row_sum, LastQueryScores scores) {
  extern __shared__ __align__(16) char shared[];
  using Warp = LastQueryWarp<kHeadDim>;
  constexpr int kParts = LastQueryShape<kHeadDim>::kParts;
  const Warp warp(args);
  const LastQueryStretch stretch(args);
  KeyStages<kHeadDim> stages(args, stretch, shared);
  QueryFragments<kHeadDim> queries;
  LoadQueries(args, warp, queries);

  float offsets[Warp::kTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * Warp::kTiles; ++i) {
    offsets[i / 2][i % 2] =
        warp.active ? RowOffset(args, row_max, row_sum, warp.list, warp.Row(i / 2, i % 2)) : 0.0F;
  }
  const int warp_number = static_cast<int>(threadIdx.x) / 32;
  const int part = warp_number % kParts;
  WarpTiles<kHeadDim>* all_tiles = reinterpret_cast<WarpTiles<kHeadDim>*>(shared + ring_bytes);
  WarpTiles<kHeadDim>* parts = all_tiles + warp_number - part;
  parts[part].Clear(warp.lane);
  ProbabilitySums<kHeadDim> sums(parts[part]);

  for (int turn = 0; turn < stretch.num_turns; ++turn) {
    const int block = stretch.first + turn * args.blocks_at_once + warp.block_slot;
    const bool active = warp.active && block < stretch.end;
    const BlockVisibility visible(args, block);
#pragma unroll 1
    for (int quarter = 0; quarter < kStagesPerBlock; ++quarter) {
      stages.Enter(turn * kStagesPerBlock + quarter);
      if (!active) continue;
#pragma unroll
      for (int i = 0; i < kStepsPerStage; ++i) {
        const int step = quarter * kStepsPerStage + i;
        StepScores<kHeadDim> products;
        ScoreStep<Element, kHeadDim>(queries, stages.StepAddress(i, warp), products);
        if (!visible.All()) HideKeys(visible, step * kStepKeys, warp, products);
        sums.Add(products, args.scale_log2, offsets, step, warp.lane);
      }
    }
    if (active) sums.Finish(warp.lane);
    if constexpr (kParts > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    // All threads enter the next stage before the tiles are written again.
    if (active) StoreScores(args, scores, parts, warp.list, block, 32 * part + warp.lane);
  }
}

}  // namespace
}  // namespace cuda::last_query

absl::Status LaunchLastQueryScore(const LastQueryArgs& args, int64_t head_dim, DType dtype, int64_t grid,
                                  int64_t ring_bytes, const float* row_max, const uint64_t* row_sum,
                                  const LastQueryScores& scores, cudaStream_t stream) {
  return ForLastQueryVariant<__nv_bfloat16, __half>(head_dim, dtype, [&]<typename Element, int kHeadDim>() {
    constexpr int64_t kTileBytes = kLastQueryWarps * sizeof(cuda::last_query::WarpTiles<kHeadDim>);
    static_assert(kTileBytes <= kMaxLastQueryTileBytes);
    return Launch("LastQueryScoreKernel", cuda::last_query::LastQueryScoreKernel<Element, kHeadDim>,
                  {.grid_x = grid, .block = kLastQueryThreads, .shared_bytes = ring_bytes + kTileBytes},
                  stream, args, static_cast<int>(ring_bytes), row_max, row_sum, scores);
  });
}

}  // namespace longfill
