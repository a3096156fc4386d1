// The states and the main walk of each head (count_pairs_args.cuh), by one thread block for a head.

#include <climits>

#include "kernels/cuda/index/count_pairs_args.cuh"
#include "kernels/cuda/launch.h"

namespace longfill::cuda::count_pairs {
namespace {

constexpr int kThreads = 1024;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

struct Place {
  int64_t before;  // sum of the values of all threads before this one
  int64_t total;
};

// Called by all threads. `sums` has a place for each warp.
__device__ Place PlaceOf(int64_t value, int64_t* sums) {
  static_assert(kThreads == 32 * 32, "one lane for each warp");
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto sum_up = [lane](int64_t sum) {
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    return sum;
  };
  const int64_t inclusive = sum_up(value);
  __syncthreads();  // nobody reads older sums
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) sums[lane] = sum_up(sums[lane]);
  __syncthreads();
  return {(warp == 0 ? 0 : sums[warp - 1]) + inclusive - value, sums[31]};
}

// The thread's part of `count` elements in a row.
struct Part {
  __device__ explicit Part(int32_t count) {
    const int32_t each = (count + kThreads - 1) / kThreads;
    begin = min(static_cast<int32_t>(threadIdx.x) * each, count);
    end = min(begin + each, count);
  }
  int32_t begin, end;
};

__device__ int32_t StoreStates(const IndexView& index, const WalkStates& states, int64_t* sums) {
  const int32_t* distances = index.distances;
  const int32_t count = index.counts->distances;
  const auto gap_above = [&](int32_t i) {
    return i == count - 1 || distances[i + 1] - distances[i] > kRowBlock;
  };
  const Part part(count);
  int32_t found = 0;
  for (int32_t i = part.begin; i < part.end; ++i) found += gap_above(i) ? 1 : 0;
  const Place place = PlaceOf(found, sums);
  auto to = static_cast<int32_t>(place.before);
  for (int32_t i = part.begin; i < part.end; ++i) {
    if (!gap_above(i)) continue;
    states.bottom[to] = distances[i];
    states.top[to] = i == count - 1 ? INT_MAX : distances[i + 1];
    ++to;
  }
  __syncthreads();
  return static_cast<int32_t>(place.total);
}

__device__ void LinkStates(const WalkStates& states, int32_t num_states) {
  for (auto g = static_cast<int32_t>(threadIdx.x); g < num_states; g += kThreads) {
    const int32_t from = states.bottom[g];
    const WalkStates::Run run = states.RunFrom(from, g - 1);
    states.low[g] = run.low;
    states.next[g] = run.next;
    const int32_t pieces = (from - run.low) / static_cast<int32_t>(kRowBlock) + 1;
    states.jump[g] = run.next < 0 ? make_int2(g, 0) : make_int2(run.next, pieces);
    states.place[g] = g == num_states - 1 ? 1 : 0;
  }
  __syncthreads();
}

// Jumps of 1, 2, 4 .. states, until all lead to a walk's last. Meanwhile `place` of those that the main walk
// comes by becomes 1: after jumps of 2^k its first 2^(k + 1) states are known.
__device__ void FollowJumps(const WalkStates& states, int32_t num_states) {
  __shared__ int again;
  int2* from = states.jump;
  int2* to = states.scratch;
  bool more = true;
  while (more) {
    if (threadIdx.x == 0) again = 0;
    __syncthreads();
    for (auto g = static_cast<int32_t>(threadIdx.x); g < num_states; g += kThreads) {
      const int2 first = from[g];
      const int2 second = from[first.x];
      if (states.place[g] == 1) states.place[first.x] = 1;
      to[g] = make_int2(second.x, first.y + second.y);
      if (second.x != first.x) again = 1;
    }
    int2* const done = to;
    to = from;
    from = done;
    __syncthreads();
    more = again != 0;
    __syncthreads();
  }
  if (from == states.jump) return;
  for (auto g = static_cast<int32_t>(threadIdx.x); g < num_states; g += kThreads) states.jump[g] = from[g];
}

__device__ int32_t StoreMainWalk(const WalkStates& states, int32_t num_states, int64_t* sums) {
  constexpr int kCountShift = 32;  // runs above, pieces below
  const auto pieces_of = [&](int32_t g) {
    return (states.bottom[g] - states.low[g]) / static_cast<int32_t>(kRowBlock) + 1;
  };
  const Part part(num_states);
  int64_t found = 0;
  for (int32_t g = part.begin; g < part.end; ++g) {
    if (states.place[g] == 1) found += (int64_t{1} << kCountShift) + pieces_of(g);
  }
  const Place place = PlaceOf(found, sums);
  auto to = static_cast<int32_t>(place.before >> kCountShift);
  auto before = static_cast<int32_t>(place.before);
  for (int32_t g = part.begin; g < part.end; ++g) {
    if (states.place[g] != 1) {
      states.place[g] = -1;
      continue;
    }
    states.main[to] = {states.bottom[g], states.low[g], before, 0};
    states.place[g] = to;
    before += pieces_of(g);
    ++to;
  }
  return static_cast<int32_t>(place.total >> kCountShift);
}

__global__ __launch_bounds__(kThreads) void WalkStatesKernel(const __grid_constant__ Indices indices,
                                                             WalkMemory memory, PairCounts* counts) {
  __shared__ int64_t sums[32];
  const IndexView& index = indices.of_head[blockIdx.x];
  if (threadIdx.x == 0) counts[blockIdx.x] = {};
  if (!HasWalk(index)) return;
  const WalkStates states = memory.Of(blockIdx.x);
  const int32_t num_states = StoreStates(index, states, sums);
  LinkStates(states, num_states);
  FollowJumps(states, num_states);
  const int32_t num_main = StoreMainWalk(states, num_states, sums);
  if (threadIdx.x == 0) *states.size = {num_states, num_main};
}

}  // namespace

absl::Status FindWalkStates(const Indices& indices, int64_t num_heads, const WalkMemory& memory,
                            PairCounts* counts, cudaStream_t stream) {
  return Launch("WalkStatesKernel", WalkStatesKernel, {.grid_x = num_heads, .block = kThreads}, stream,
                indices, memory, counts);
}

}  // namespace longfill::cuda::count_pairs
