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
constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 1;

// This thread block's part of the work on a head, by warps or by threads.
struct Share {
  int lane = static_cast<int>(threadIdx.x) % 32;
  int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  int64_t num_warps = static_cast<int64_t>(gridDim.x) * kThreads / 32;
  int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int64_t num_threads = static_cast<int64_t>(gridDim.x) * kThreads;
};

// Pairs that the pieces of a run of the main walk cover in all row blocks. Row block m sees the keys
// [64 m - high, 64 m + 64 - low): equally many in each from the one on where they begin at 0 or later, and 64
// more in each than in the one before up to there. The prompt's last row block may have fewer rows.
__device__ int64_t RunPairs(const Prompt& prompt, const PieceRun& run) {
  const auto pairs_of = [&](int64_t m) {
    return CausalPairsOf(prompt, m, m * kRowBlock - run.high, (m + 1) * kRowBlock - run.low);
  };
  const int64_t last = prompt.num_row_blocks - 1;
  const int64_t first = max(run.low, 0) / kRowBlock;  // the first whose last row is at `low` or later
  if (first > last) return 0;
  const int64_t even = max(first, (run.high + kRowBlock - 1) / kRowBlock);
  const int64_t growing = min(even, last) - first;
  int64_t pairs = pairs_of(last);
  if (growing > 0) {
    pairs += growing * pairs_of(first) + kRowBlock * kRowBlock * (growing * (growing - 1) / 2);
  }
  if (even < last) pairs += (last - even) * pairs_of(even);
  return pairs;
}

// Pieces of the main walk that are below a place.
__device__ int64_t PiecesBelow(const PieceRun* main, int32_t num_main, int64_t place) {
  int32_t low = 0, high = num_main;  // the first run whose highest piece is not below
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (main[middle].high < place) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low < num_main) {
    const PieceRun run = main[low];
    return run.before + (run.low < place ? (place - 1 - run.low) / kRowBlock + 1 : 0);
  }
  if (num_main == 0) return 0;
  const PieceRun run = main[num_main - 1];
  return run.before + (run.high - run.low) / kRowBlock + 1;
}

// Column c lies in the piece at D of exactly one row block, m = floor((c + D) / 64), if that is one of the
// prompt. What a column adds:
struct ColumnPairs {
  int64_t in_main;  // rows of the row blocks where it is in a piece of the main walk
  int64_t covered;  // rows at or after it where it is in none, where the main walk is what tiles cover
};
__device__ ColumnPairs PairsOfColumn(const Prompt& prompt, const PieceRun* main, int32_t num_main,
                                     int64_t column) {
  const int64_t last = prompt.num_row_blocks - 1;
  const int64_t in_block = column % kRowBlock;
  const auto below = [&](int64_t place) { return PiecesBelow(main, num_main, place); };
  const int64_t before_first = below(-column);  // in no row block
  const int64_t before_own = below(-in_block);  // in row blocks before the column's own
  const int64_t through_own = below(kRowBlock - in_block);
  const int64_t before_last = below(last * kRowBlock - column);
  const int64_t last_rows = (below((last + 1) * kRowBlock - column) - before_last) * prompt.Rows(last);
  ColumnPairs pairs;
  pairs.in_main = (before_last - before_first) * kRowBlock + last_rows;
  // Rows of the own row block before the column do not see it.
  const int64_t seen =
      (before_last - before_own) * kRowBlock + last_rows - (through_own - before_own) * in_block;
  pairs.covered = prompt.num_tokens - column - seen;
  return pairs;
}

// What row block m adds to the published pairs, but for columns in pieces of the main walk, all of which
// PairsOfColumn takes off. A column is kept, with all rows, if it lies before the end of the walk and in none
// of its pieces; so columns that only the main walk has in a piece are added again.
__device__ int64_t PublishedPairsOfRowBlock(const IndexView& index, int64_t num_columns, const Prompt& prompt,
                                            const WalkStates& states, int64_t m) {
  const auto start = static_cast<int32_t>(m * kRowBlock);
  constexpr auto kPiece = static_cast<int32_t>(kRowBlock);
  const WalkSize size = *states.size;
  const auto columns_in = [&](int64_t high, int64_t low) {  // the pieces from high to low
    const int64_t end = CountBelow(index.columns, num_columns, start + kRowBlock - low);
    return end - CountBelow(index.columns, end, start - high);
  };
  int64_t kept = 0, far = 0;
  int32_t below_zero = 0;  // the last piece
  auto state = static_cast<int32_t>(CountBelow(states.bottom, size.num_states, int64_t{start} + kPiece)) - 1;
  if (state < 0 || states.bottom[state] > start || states.top[state] < int64_t{start} + kPiece) {
    // The largest distance is within the row block, and the walk starts at its first row.
    const bool above = state >= 0 && states.bottom[state] >= start;
    const WalkStates::Run run = states.RunFrom(start, above ? state - 1 : state);
    kept -= columns_in(start, run.low);
    far = run.next < 0 ? m : (start - run.low) / kPiece + 1;
    state = run.next;
  }
  if (state >= 0) {
    const int2 jump = states.jump[state];
    far += jump.y + states.bottom[jump.x] / kPiece;
    below_zero = states.low[jump.x];
  }
  while (state >= 0 && states.place[state] < 0) {
    kept -= columns_in(states.bottom[state], states.low[state]);
    state = states.next[state];
  }
  for (int32_t r = state < 0 ? 0 : states.place[state] + 1; r < size.num_main; ++r) {
    const PieceRun run = states.main[r];
    if (run.low >= int64_t{start} + kPiece) break;
    kept += columns_in(run.high, run.low);
  }
  kept += CountBelow(index.columns, num_columns, start + kRowBlock - below_zero);
  int64_t pairs = CausalPairsOf(prompt, m, start - below_zero, start - below_zero + kRowBlock);
  if (below_zero < 0) pairs += CausalPairsOf(prompt, m, start - below_zero - kRowBlock, start - below_zero);
  return pairs + prompt.Rows(m) * (far * kRowBlock + kept);
}

// Vertical-slash heads.
__device__ PairCounts WalkPairs(const IndexView& index, const Prompt& prompt, const WalkStates& states,
                                const Share& share) {
  const int32_t num_main = states.size->num_main;
  const int64_t num_columns = CountBelow(index.columns, index.counts->columns, prompt.num_tokens);
  PairCounts pairs;
  for (int64_t m = share.thread; m < prompt.num_row_blocks; m += share.num_threads) {
    pairs.published += PublishedPairsOfRowBlock(index, num_columns, prompt, states, m);
  }
  for (int64_t i = share.thread; i < num_columns; i += share.num_threads) {
    const ColumnPairs column = PairsOfColumn(prompt, states.main, num_main, index.columns[i]);
    pairs.published -= column.in_main;
    pairs.covered += column.covered;
  }
  for (int64_t r = share.thread; r < num_main; r += share.num_threads) {
    pairs.covered += RunPairs(prompt, states.main[r]);
  }
  if (index.coverage == Coverage::kParity) pairs.covered = pairs.published;
  return pairs;
}

// Pairs at distances [d_lo, d_hi): num_tokens - d of distance d.
__device__ int64_t ExactPairs(const Prompt& prompt, int64_t d_lo, int64_t d_hi) {
  const int64_t count = min(d_hi, prompt.num_tokens) - d_lo;
  return count <= 0 ? 0 : count * (prompt.num_tokens - d_lo) - count * (count - 1) / 2;
}

// Dense and A-shape heads, whose runs are exact: the union of what columns cover and what runs cover, each by
// itself, less the rows of columns that lie in runs. Runs are disjoint.
__device__ int64_t ExactHeadPairs(const IndexView& index, const Prompt& prompt, const Share& share) {
  const int64_t num_columns = CountBelow(index.columns, index.counts->columns, prompt.num_tokens);
  int64_t pairs = 0;
  for (int64_t i = share.thread; i < num_columns; i += share.num_threads) {
    pairs += prompt.num_tokens - index.columns[i];
  }
  for (int64_t i = share.warp; i < index.counts->runs; i += share.num_warps) {
    const int64_t d_lo = index.runs[i].d_lo;
    const int64_t d_hi = min(index.runs[i].d_hi, prompt.num_tokens);
    if (share.lane == 0) pairs += ExactPairs(prompt, d_lo, d_hi);
    for (int64_t c = share.lane; c < num_columns; c += 32) {
      const int64_t column = index.columns[c];
      pairs -= max(int64_t{0}, min(column + d_hi, prompt.num_tokens) - (column + d_lo));
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

__global__ __launch_bounds__(kThreads) void CountPairsKernel(const __grid_constant__ Indices indices,
                                                             Prompt prompt, WalkMemory memory,
                                                             PairCounts* counts) {
  const IndexView& index = indices.of_head[blockIdx.y];
  const Share share;
  PairCounts pairs;
  if (HasWalk(index)) {
    pairs = WalkPairs(index, prompt, memory.Of(blockIdx.y), share);
  } else {
    pairs.covered = index.form == IndexView::Form::kBlockList ? BlockListPairs(index, prompt, share)
                                                              : ExactHeadPairs(index, prompt, share);
    pairs.published = pairs.covered;
  }
  AddPairs(pairs.published, &counts[blockIdx.y].published);
  AddPairs(pairs.covered, &counts[blockIdx.y].covered);
}

}  // namespace
}  // namespace cuda::count_pairs

int64_t CudaCountPairsWorkspaceBytes(int64_t num_heads, int64_t num_tokens) {
  using namespace cuda::count_pairs;
  return WalkMemory(nullptr, std::min<int64_t>(num_heads, Indices::kMost), CeilDiv(num_tokens, kRowBlock))
      .bytes;
}

absl::Status CudaCountPairs(const CountPairsParams& params, Workspace workspace, const DeviceLimits&,
                            cudaStream_t stream) {
  using cuda::count_pairs::Indices;
  constexpr int64_t kMinThreadBlocks = 8;  // of a head
  constexpr int64_t kMaxThreadBlocks = 64;
  const auto num_heads = static_cast<int64_t>(params.indices.size());
  if (num_heads == 0) return absl::OkStatus();
  if (params.num_tokens < 0 || params.num_tokens > cuda::count_pairs::kMaxTokens) {
    return absl::InvalidArgumentError(absl::StrCat("count pairs: num_tokens ", params.num_tokens,
                                                   " is not in [0, ", cuda::count_pairs::kMaxTokens, "]"));
  }
  LF_RETURN_IF_ERROR(CheckCountedRows(params));
  LF_RETURN_IF_ERROR(cuda::CheckWorkspace("count pairs", workspace,
                                          CudaCountPairsWorkspaceBytes(num_heads, params.num_tokens)));
  const int64_t num_rows = params.CountedRows();
  if (num_rows == 0) {
    LF_RETURN_IF_CUDA_ERROR(
        cudaMemsetAsync(params.counts, 0, static_cast<size_t>(num_heads) * sizeof(PairCounts), stream));
    return absl::OkStatus();
  }
  const cuda::count_pairs::Prompt prompt = {num_rows, CeilDiv(num_rows, kRowBlock)};
  const int64_t row_blocks_of_index = CeilDiv(params.num_tokens, kRowBlock);
  for (int64_t begin = 0; begin < num_heads; begin += Indices::kMost) {
    const int64_t count = std::min<int64_t>(Indices::kMost, num_heads - begin);
    Indices indices;
    std::copy_n(params.indices.begin() + begin, count, indices.of_head);
    const cuda::count_pairs::WalkMemory memory(workspace.data, count, row_blocks_of_index);
    LF_RETURN_IF_ERROR(
        cuda::count_pairs::FindWalkStates(indices, count, memory, params.counts + begin, stream));
    const int64_t thread_blocks = std::clamp<int64_t>(
        CeilDiv(prompt.num_row_blocks, cuda::count_pairs::kThreads), kMinThreadBlocks, kMaxThreadBlocks);
    LF_RETURN_IF_ERROR(
        Launch("CountPairsKernel", cuda::count_pairs::CountPairsKernel,
               {.grid_x = thread_blocks, .grid_y = count, .block = cuda::count_pairs::kThreads}, stream,
               indices, prompt, memory, params.counts + begin));
  }
  return absl::OkStatus();
}

}  // namespace longfill
