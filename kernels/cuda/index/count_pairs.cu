#include "kernels/cuda/index/count_pairs.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/index/count_pairs_args.cuh"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace cuda::count_pairs {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kThreadBlocksPerHead = 32;
constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 1;

// This thread block's part of the work on a head, by warps or by threads.
struct Share {
  int lane = static_cast<int>(threadIdx.x) % 32;
  int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  int64_t num_warps = kThreadBlocksPerHead * kThreads / 32;
  int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int64_t num_threads = kThreadBlocksPerHead * kThreads;
};

// A lane's share of the pairs that a coarse run covers. Row block m sees the keys [64 m - d_hi + 1, 64 m + 64
// - d_lo); from the row block on whose keys begin at 0 or later, whole row blocks have equally many.
__device__ int64_t CoarsePairs(const Prompt& prompt, int64_t d_lo, int64_t d_hi, int lane) {
  const auto pairs_of = [&](int64_t m) {
    return CausalPairsOf(prompt, m, m * kRowBlock - d_hi + 1, (m + 1) * kRowBlock - d_lo);
  };
  const int64_t last = prompt.num_row_blocks - 1;
  const int64_t first = d_lo / kRowBlock;  // the first whose last row is at d_lo or later
  const int64_t first_even = max(first, min((d_hi - 1 + kRowBlock - 1) / kRowBlock, last));
  int64_t pairs = 0;
  for (int64_t m = first + lane; m < min(first_even, last); m += 32) pairs += pairs_of(m);
  if (lane == 0 && first_even < last) pairs += pairs_of(first_even) * (last - first_even);
  if (lane == 0 && first <= last) pairs += pairs_of(last);
  return pairs;
}

// Pairs at distances [d_lo, d_hi): num_tokens - d of distance d.
__device__ int64_t ExactPairs(const Prompt& prompt, int64_t d_lo, int64_t d_hi) {
  const int64_t count = min(d_hi, prompt.num_tokens) - d_lo;
  return count <= 0 ? 0 : count * (prompt.num_tokens - d_lo) - count * (count - 1) / 2;
}

// Rows at or after a column that a coarse run covers it for: those of the row blocks m with
// 64 m - d_hi + 1 <= column < 64 m + 64 - d_lo.
__device__ int64_t CoarseRowsOfColumn(const Prompt& prompt, int64_t d_lo, int64_t d_hi, int64_t column) {
  const int64_t own = column / kRowBlock;
  const int64_t first = (column + d_lo) / kRowBlock;
  const int64_t last = min((column + d_hi - 1) / kRowBlock, prompt.num_row_blocks - 1);
  if (first > last) return 0;
  const int64_t begin = first == own ? column : first * kRowBlock;
  return prompt.RowEnd(last) - begin;
}
__device__ int64_t ExactRowsOfColumn(const Prompt& prompt, int64_t d_lo, int64_t d_hi, int64_t column) {
  return max(int64_t{0}, min(column + d_hi, prompt.num_tokens) - (column + d_lo));
}

// The union of what columns cover and what runs cover: each by itself, less the rows of columns that lie in
// runs. Runs are disjoint.
__device__ int64_t DiagonalColumnPairs(const IndexView& index, const Prompt& prompt, const Share& share) {
  const int64_t num_columns = CountBelow(index.columns, index.counts->columns, prompt.num_tokens);
  int64_t pairs = 0;
  for (int64_t i = share.thread; i < num_columns; i += share.num_threads) {
    pairs += prompt.num_tokens - index.columns[i];
  }
  for (int64_t i = share.warp; i < index.counts->runs; i += share.num_warps) {
    const bool exact = index.runs[i].exact;
    const int64_t d_lo = index.runs[i].d_lo;
    const int64_t d_hi = min(index.runs[i].d_hi, prompt.num_tokens);
    if (d_lo >= prompt.num_tokens + kRowBlock) continue;
    if (exact) {
      if (share.lane == 0) pairs += ExactPairs(prompt, d_lo, d_hi);
    } else {
      pairs += CoarsePairs(prompt, d_lo, d_hi, share.lane);
    }
    for (int64_t c = share.lane; c < num_columns; c += 32) {
      const int64_t column = index.columns[c];
      pairs -= exact ? ExactRowsOfColumn(prompt, d_lo, d_hi, column)
                     : CoarseRowsOfColumn(prompt, d_lo, d_hi, column);
    }
  }
  return pairs;
}

__device__ int64_t BlockListPairs(const IndexView& index, const Prompt& prompt, const Share& share) {
  int64_t pairs = 0;
  for (int64_t m = share.warp; m < prompt.num_row_blocks; m += share.num_warps) {
    const bool ragged = index.row_offsets != nullptr;
    const int64_t begin = ragged ? index.row_offsets[m] : m * index.row_length;
    const int64_t end = ragged ? index.row_offsets[m + 1] : begin + min(index.row_length, m + 1);
    for (int64_t i = begin + share.lane; i < end; i += 32) {
      const int64_t key = index.key_blocks[i] * kRowBlock;
      pairs += CausalPairsOf(prompt, m, key, key + kRowBlock);
    }
  }
  return pairs;
}

__global__ __launch_bounds__(kThreads) void CoveredPairsKernel(const __grid_constant__ Indices indices,
                                                               Prompt prompt, PairCounts* counts) {
  const IndexView& index = indices.of_head[blockIdx.y];
  const Share share;
  const bool walk = HasWalk(index);
  if (walk && index.coverage == Coverage::kParity) return;  // covers what is published
  const int64_t pairs = index.form == IndexView::Form::kBlockList ? BlockListPairs(index, prompt, share)
                                                                  : DiagonalColumnPairs(index, prompt, share);
  AddPairs(pairs, &counts[blockIdx.y].covered);
  if (!walk) AddPairs(pairs, &counts[blockIdx.y].published);
}

}  // namespace
}  // namespace cuda::count_pairs

int64_t CudaCountPairsWorkspaceBytes(int64_t num_heads, int64_t num_tokens) {
  return cuda::count_pairs::PublishedWorkspaceBytes(
      std::min<int64_t>(num_heads, cuda::count_pairs::Indices::kMost), num_tokens);
}

absl::Status CudaCountPairs(const CountPairsParams& params, Workspace workspace, const DeviceLimits&,
                            cudaStream_t stream) {
  using cuda::count_pairs::Indices;
  const auto num_heads = static_cast<int64_t>(params.indices.size());
  if (num_heads == 0) return absl::OkStatus();
  if (params.num_tokens < 0 || params.num_tokens > cuda::count_pairs::kMaxTokens) {
    return absl::InvalidArgumentError(absl::StrCat("count pairs: num_tokens ", params.num_tokens,
                                                   " is not in [0, ", cuda::count_pairs::kMaxTokens, "]"));
  }
  LF_RETURN_IF_ERROR(cuda::CheckWorkspace("count pairs", workspace,
                                          CudaCountPairsWorkspaceBytes(num_heads, params.num_tokens)));
  LF_RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(params.counts, 0, static_cast<size_t>(num_heads) * sizeof(PairCounts), stream));
  if (params.num_tokens == 0) return absl::OkStatus();
  const cuda::count_pairs::Prompt prompt = {params.num_tokens, CeilDiv(params.num_tokens, kRowBlock)};
  for (int64_t begin = 0; begin < num_heads; begin += Indices::kMost) {
    const int64_t count = std::min<int64_t>(Indices::kMost, num_heads - begin);
    Indices indices;
    std::copy_n(params.indices.begin() + begin, count, indices.of_head);
    LF_RETURN_IF_ERROR(Launch("CoveredPairsKernel", cuda::count_pairs::CoveredPairsKernel,
                              {.grid_x = cuda::count_pairs::kThreadBlocksPerHead,
                               .grid_y = count,
                               .block = cuda::count_pairs::kThreads},
                              stream, indices, prompt, params.counts + begin));
    LF_RETURN_IF_ERROR(cuda::count_pairs::CountPublished(indices, count, prompt, workspace.data,
                                                         params.counts + begin, stream));
  }
  return absl::OkStatus();
}

}  // namespace longfill
