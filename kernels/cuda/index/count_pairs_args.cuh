#ifndef LONGFILL_KERNELS_CUDA_INDEX_COUNT_PAIRS_ARGS_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_COUNT_PAIRS_ARGS_CUH_

// What the kernels that count pairs share.

#include <cstdint>

#include <vector_types.h>

#include "kernels/api/kernel_set.h"

namespace longfill::cuda::count_pairs {

// The rows that count.
struct Prompt {
  int64_t num_tokens = 0;
  int64_t num_row_blocks = 0;

  __device__ int64_t RowEnd(int64_t row_block) const { return min((row_block + 1) * kRowBlock, num_tokens); }
  __device__ int64_t Rows(int64_t row_block) const { return RowEnd(row_block) - row_block * kRowBlock; }
};

struct Indices {
  static constexpr int kMost = 48;  // of a launch: kernel parameters are limited
  IndexView of_head[kMost];
};

// Heads with distances have the published walk; without them (dense, A-shape) what is covered is published.
__device__ inline bool HasWalk(const IndexView& index) {
  return index.form == IndexView::Form::kDiagonalColumn && index.counts->distances > 0;
}

// Number of leading entries below `value`, given that at most `count` are. Doubling steps: the cost is the
// log of the way down from `count`.
__device__ inline int64_t CountBelow(const int32_t* values, int64_t count, int64_t value) {
  int64_t step = 1;
  int64_t high = count;
  while (high >= step && values[high - step] >= value) {
    high -= step;
    step *= 2;
  }
  int64_t low = high >= step ? high - step : 0;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Causal pairs of the rows of a row block with the keys [begin, end), of which those before 0 and beyond the
// block's last row do not count.
__device__ inline int64_t CausalPairsOf(const Prompt& prompt, int64_t row_block, int64_t begin, int64_t end) {
  const int64_t first_row = row_block * kRowBlock;
  const int64_t row_end = prompt.RowEnd(row_block);
  begin = max(begin, int64_t{0});
  end = min(end, row_end);
  if (begin >= end) return 0;
  const int64_t whole_end = min(max(first_row, begin), end);  // keys before it are seen by all rows
  const int64_t part = end - whole_end;  // key whole_end + i by row_end - whole_end - i rows
  return (whole_end - begin) * (row_end - first_row) + part * (row_end - whole_end) - part * (part - 1) / 2;
}

// Adds the values of a warp's lanes. Integers: the order does not matter.
__device__ inline void AddPairs(int64_t pairs, int64_t* total) {
  for (int step = 16; step > 0; step /= 2) pairs += __shfl_xor_sync(0xFFFFFFFFU, pairs, step);
  if (threadIdx.x % 32 == 0 && pairs != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(pairs));
  }
}

// The published walk (kernels/sparse/coverage.h, AppendPublishedRuns) of row block m, as pieces of 64 keys:
// the piece at D is the keys [64 m - D, 64 m - D + 64). It starts at D = min(largest distance below 64 m +
// 64, 64 m) and goes on from a piece at D to
//     next(D) = min(largest distance below D, D - 64),
// a new run where that is the distance, a longer run otherwise, until no distance is below D. Only the start
// depends on m. A run begins at m's start or at the lower end of a gap of 65 or more between neighbouring
// distances: these places are the states, at most one for every 65 tokens, and the end of each one's run and
// the state after it are the same for all row blocks. Exactly the last piece of a walk is at 0 or below; with
// one at z < 0 there is one at z + 64, and all others, the far ones, are at 64 or beyond: whole tiles of
// causal pairs.
//
// The main walk is the one from the largest distance, as of a row block that all distances reach. It is also
// what tiles cover (sparse_index.h, CoarseRuns), and the walks of most row blocks join it within a few runs.

// The pieces high, high - 64 .. low of a run of the main walk.
struct PieceRun {
  int32_t high;
  int32_t low;
  int32_t before;  // pieces in the runs below
  int32_t unused;
};

struct WalkSize {
  int32_t num_states;
  int32_t num_main;  // runs of the main walk
};

// Of a head; states and runs ascend.
struct WalkStates {
  WalkSize* size;
  int32_t* bottom;  // the state
  int32_t* top;     // the distance above, INT32_MAX for the largest
  int32_t* low;     // the last piece of the run from here
  int32_t* next;    // the state that follows, -1 after the last run
  int32_t* place;   // of the run in the main walk, or -1
  int2* jump;       // the last state of the walk and the far pieces before that one's run
  int2* scratch;    // like jump
  PieceRun* main;

  // The last piece of the run from place x, and the state that follows, given that no state above `state`
  // does.
  struct Run {
    int32_t low;
    int32_t next;
  };
  __device__ Run RunFrom(int32_t x, int32_t state) const {
    constexpr auto kPiece = static_cast<int32_t>(kRowBlock);
    for (; state >= 0; --state) {
      const int32_t beyond = max(x - top[state], 0);
      const int32_t low = x - (beyond + kPiece - 1) / kPiece * kPiece;
      if (low > bottom[state] + kPiece) return {low, state};
    }
    return {x - (x + kPiece - 1) / kPiece * kPiece, -1};
  }
};

// In the workspace of a call. `num_row_blocks` are those of the prompt that the indices are of: distances
// beyond the rows that count have states too.
struct WalkMemory {
  WalkMemory(void* workspace, int64_t num_heads, int64_t num_row_blocks)
      : capacity(num_row_blocks + 1),
        all_states(num_heads * capacity),
        memory(static_cast<char*>(workspace)) {
    sizes_at = all_states * (kBytesOfState);
    bytes = sizes_at + num_heads * static_cast<int64_t>(sizeof(WalkSize));
  }

  __device__ WalkStates Of(int64_t head) const {
    WalkStates states;
    auto* main = reinterpret_cast<PieceRun*>(memory);
    auto* jumps = reinterpret_cast<int2*>(main + all_states);
    auto* integers = reinterpret_cast<int32_t*>(jumps + 2 * all_states);
    const int64_t first = head * capacity;
    states.main = main + first;
    states.jump = jumps + first;
    states.scratch = states.jump + all_states;
    states.bottom = integers + first;
    states.top = states.bottom + all_states;
    states.low = states.top + all_states;
    states.next = states.low + all_states;
    states.place = states.next + all_states;
    states.size = reinterpret_cast<WalkSize*>(memory + sizes_at) + head;
    return states;
  }

  static constexpr int64_t kBytesOfState = sizeof(PieceRun) + 2 * sizeof(int2) + 5 * sizeof(int32_t);
  int64_t capacity;  // states of a head
  int64_t all_states;
  char* memory;
  int64_t sizes_at = 0;
  int64_t bytes = 0;
};

// Zeroes the counts, and finds the states of the heads that walk.
absl::Status FindWalkStates(const Indices& indices, int64_t num_heads, const WalkMemory& memory,
                            PairCounts* counts, cudaStream_t stream);

}  // namespace longfill::cuda::count_pairs

#endif  // LONGFILL_KERNELS_CUDA_INDEX_COUNT_PAIRS_ARGS_CUH_
