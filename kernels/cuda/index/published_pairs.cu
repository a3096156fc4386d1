// Pairs of the published conversion (kernels/sparse/coverage.h, AppendPublishedRuns; kernels/cpu/oracle,
// ConvertPublished), without walking all distances for every row block.
//
// Let `end` be 64 m + 64 for row block m, and say of a 64-key piece [end - D - 64, end - D) of its runs that
// it is at D. The walk starts at D = min(largest distance < end, 64 m) and goes on from a piece at D to
//     next(D) = min(largest distance < D, D - 64),
// a new run where that is the distance, a longer run otherwise, until no distance is below D. So the pieces
// do not depend on m, but for the start. Where neighbouring distances y < x are at least 127 apart, every
// walk from x or beyond has a piece at y: a piece at D in (x - 64, x] has next(D) = y. Such a y is a top, and
// the pieces from a top down to the next top are the same for all row blocks whose walk starts above it;
// together they are the main pieces. A row block's own pieces end where they meet a main piece, within a few
// steps.
//
// A column is kept, with all rows of the row block, if it lies before the end of the last run and in no
// piece. Column c lies in the piece at D of exactly one row block: m = floor((c + D) / 64).

#include "kernels/cuda/index/count_pairs_args.cuh"
#include "kernels/cuda/launch.h"

namespace longfill::cuda::count_pairs {
namespace {

constexpr int kThreads = 256;
constexpr int kScanThreads = 1024;
constexpr int64_t kThreadBlocksPerHead = 32;
constexpr int64_t kTopGap = 2 * kRowBlock - 1;
constexpr int kNone = -0x7F7F7F80;  // 0x80808080, no place of a piece

// Pieces are at least 64 apart, so each of the buckets (64 b - 64, 64 b] has at most one main piece.
__device__ int64_t BucketOf(int64_t place) { return (place + kRowBlock - 1) / kRowBlock; }  // place > -64

struct Walk {
  int64_t num_buckets = 0;    // row blocks + 1
  int32_t* main = nullptr;    // [heads, buckets]: where the bucket's main piece is, or kNone
  int32_t* before = nullptr;  // [heads, buckets]: main pieces up to this bucket that are at 64 or beyond
  int32_t* meet = nullptr;    // [heads, buckets]: the first main piece of row block m, or kNone

  __device__ const int32_t* Of(const int32_t* arrays, int64_t head) const {
    return arrays + head * num_buckets;
  }
};

// A thread for each distance; those at tops walk to the next top.
__global__ __launch_bounds__(kThreads) void MainPiecesKernel(const __grid_constant__ Indices indices,
                                                             Walk walk) {
  const IndexView& index = indices.of_head[blockIdx.y];
  if (!HasWalk(index)) return;
  int32_t* main = walk.main + blockIdx.y * walk.num_buckets;
  const int32_t* distances = index.distances;
  const int64_t count = index.counts->distances;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += kThreadBlocksPerHead * kThreads) {
    if (i + 1 < count && distances[i + 1] - distances[i] < kTopGap) continue;
    int64_t place = distances[i];
    int64_t below = i + 1;
    while (true) {
      main[BucketOf(place)] = static_cast<int32_t>(place);
      below = CountBelow(distances, below, place);
      if (below == 0) break;
      const int64_t next = distances[below - 1];
      if (distances[below] - next >= kTopGap) break;
      place = min(next, place - kRowBlock);
    }
  }
}

// One thread block for each head.
__global__ __launch_bounds__(kScanThreads) void CountMainPiecesKernel(const __grid_constant__ Indices indices,
                                                                      Walk walk) {
  __shared__ int sums[kScanThreads / 32];
  if (!HasWalk(indices.of_head[blockIdx.x])) return;
  const int32_t* main = walk.Of(walk.main, blockIdx.x);
  int32_t* before = walk.before + blockIdx.x * walk.num_buckets;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int counted = 0;
  for (int64_t begin = 0; begin < walk.num_buckets; begin += kScanThreads) {
    const int64_t bucket = begin + threadIdx.x;
    const bool far = bucket < walk.num_buckets && main[bucket] >= kRowBlock;
    const unsigned of_warp = __ballot_sync(0xFFFFFFFFU, far);
    if (lane == 0) sums[warp] = __popc(of_warp);
    __syncthreads();
    int of_warps_before = 0, total = 0;
    for (int i = 0; i < kScanThreads / 32; ++i) {
      if (i < warp) of_warps_before += sums[i];
      total += sums[i];
    }
    if (bucket < walk.num_buckets) {
      before[bucket] = counted + of_warps_before + __popc(of_warp & (2U << lane) - 1);
    }
    counted += total;
    __syncthreads();
  }
}

// All that a row block adds but for columns in main pieces, which MainPieceColumnsKernel takes off.
__device__ int64_t RowBlockPairs(const IndexView& index, const Prompt& prompt, const Walk& walk, int64_t head,
                                 int64_t m) {
  const int32_t* main = walk.Of(walk.main, head);
  const int64_t end = (m + 1) * kRowBlock;
  const int64_t rows = prompt.Rows(m);
  const auto piece_pairs = [&](int64_t place) {
    return CausalPairsOf(prompt, m, end - place - kRowBlock, end - place);
  };
  int64_t pairs = 0;
  int64_t columns = index.counts->columns;
  int64_t below = CountBelow(index.distances, index.counts->distances, end);
  int64_t place = min(int64_t{index.distances[below - 1]}, m * kRowBlock);
  int64_t kept = 0;
  bool met = true;
  while (main[BucketOf(place)] != place) {
    pairs += piece_pairs(place);
    kept -= CountBelow(index.columns, columns, end - place) -
            CountBelow(index.columns, columns, end - place - kRowBlock);
    below = CountBelow(index.distances, below, place);
    met = below > 0;
    if (!met) break;
    place = min(int64_t{index.distances[below - 1]}, place - kRowBlock);
  }
  walk.meet[head * walk.num_buckets + m] = met ? static_cast<int32_t>(place) : kNone;
  int64_t last = place;
  if (met) {
    pairs += rows * kRowBlock * walk.Of(walk.before, head)[BucketOf(place)];
    for (int64_t bucket = min(BucketOf(place), int64_t{1}); bucket >= 0; --bucket) {
      const int64_t near = main[bucket];
      if (near == kNone) continue;
      if (near < kRowBlock) pairs += piece_pairs(near);
      last = near;
    }
  }
  kept += CountBelow(index.columns, columns, end - last);
  return pairs + rows * kept;
}

__global__ __launch_bounds__(kThreads) void RowBlockPairsKernel(const __grid_constant__ Indices indices,
                                                                Prompt prompt, Walk walk,
                                                                PairCounts* counts) {
  const IndexView& index = indices.of_head[blockIdx.y];
  if (!HasWalk(index)) return;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pairs = m < prompt.num_row_blocks ? RowBlockPairs(index, prompt, walk, blockIdx.y, m) : 0;
  AddPairs(pairs, &counts[blockIdx.y].published);
  if (index.coverage == Coverage::kParity) AddPairs(pairs, &counts[blockIdx.y].covered);
}

// A warp for each main piece, lanes over columns.
__global__ __launch_bounds__(kThreads) void MainPieceColumnsKernel(const __grid_constant__ Indices indices,
                                                                   Prompt prompt, Walk walk,
                                                                   PairCounts* counts) {
  const IndexView& index = indices.of_head[blockIdx.y];
  if (!HasWalk(index)) return;
  const int32_t* main = walk.Of(walk.main, blockIdx.y);
  const int32_t* meet = walk.Of(walk.meet, blockIdx.y);
  const int64_t num_columns = index.counts->columns;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int64_t pairs = 0;
  for (int64_t bucket = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
       bucket < walk.num_buckets; bucket += kThreadBlocksPerHead * kThreads / 32) {
    const int64_t place = main[bucket];
    if (place == kNone) continue;
    for (int64_t i = lane; i < num_columns; i += 32) {
      const int64_t key = index.columns[i] + place;
      const int64_t m = key / kRowBlock;
      if (key >= 0 && m < prompt.num_row_blocks && meet[m] >= place) pairs -= prompt.Rows(m);
    }
  }
  AddPairs(pairs, &counts[blockIdx.y].published);
  if (index.coverage == Coverage::kParity) AddPairs(pairs, &counts[blockIdx.y].covered);
}

int64_t NumBuckets(int64_t num_row_blocks) { return num_row_blocks + 1; }

}  // namespace

int64_t PublishedWorkspaceBytes(int64_t num_heads, int64_t num_tokens) {
  return 3 * num_heads * NumBuckets(CeilDiv(num_tokens, kRowBlock)) * static_cast<int64_t>(sizeof(int32_t));
}

absl::Status CountPublished(const Indices& indices, int64_t num_heads, const Prompt& prompt, void* workspace,
                            PairCounts* counts, cudaStream_t stream) {
  Walk walk;
  walk.num_buckets = NumBuckets(prompt.num_row_blocks);
  const int64_t size = num_heads * walk.num_buckets;
  walk.main = static_cast<int32_t*>(workspace);
  walk.before = walk.main + size;
  walk.meet = walk.before + size;
  static_assert(kNone == static_cast<int>(0x80808080U));
  LF_RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(walk.main, 0x80, static_cast<size_t>(size) * sizeof(int32_t), stream));
  const LaunchShape shared_out = {.grid_x = kThreadBlocksPerHead, .grid_y = num_heads, .block = kThreads};
  LF_RETURN_IF_ERROR(Launch("MainPiecesKernel", MainPiecesKernel, shared_out, stream, indices, walk));
  LF_RETURN_IF_ERROR(Launch("CountMainPiecesKernel", CountMainPiecesKernel,
                            {.grid_x = num_heads, .block = kScanThreads}, stream, indices, walk));
  LF_RETURN_IF_ERROR(
      Launch("RowBlockPairsKernel", RowBlockPairsKernel,
             {.grid_x = CeilDiv(prompt.num_row_blocks, kThreads), .grid_y = num_heads, .block = kThreads},
             stream, indices, prompt, walk, counts));
  return Launch("MainPieceColumnsKernel", MainPieceColumnsKernel, shared_out, stream, indices, prompt, walk,
                counts);
}

}  // namespace longfill::cuda::count_pairs
