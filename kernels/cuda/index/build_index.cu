#include "kernels/cuda/index/build_index.h"

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace {

constexpr int kThreads = 1024;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

struct Heads {
  static constexpr int kMost = 64;  // of a launch: kernel parameters are limited
  IndexBuffers of_head[kMost];
};

struct Place {
  int64_t before = 0;  // sum of the values of all threads before this one
  int64_t total = 0;
};

// Called by all threads. `sums` has a place for each warp.
__device__ Place PlaceOf(int value, int* sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    static_assert(kThreads == 32 * 32, "one lane for each warp");
    int of_warps = sums[lane];
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, of_warps, step);
      if (lane >= step) of_warps += other;
    }
    sums[lane] = of_warps;
  }
  __syncthreads();
  const Place place = {(warp == 0 ? 0 : sums[warp - 1]) + inclusive - value, sums[31]};
  __syncthreads();  // before `sums` is written again
  return place;
}

// The positions of the bits, ascending, as far as they fit; returns how many there are. Bit 0 counts as set
// with `add_first`.
__device__ int64_t StoreBits(const uint64_t* words, int64_t num_words, bool add_first, int32_t* out,
                             int64_t capacity, int* sums) {
  const auto load = [&](int64_t w) {
    uint64_t word = w < num_words ? words[w] : 0;
    if (w == 0 && add_first) word |= 1;
    return word;
  };
  int64_t stored = 0;
  uint64_t next = load(threadIdx.x);
  for (int64_t begin = 0; begin == 0 || begin < num_words; begin += kThreads) {
    const int64_t w = begin + threadIdx.x;
    uint64_t word = next;
    next = load(w + kThreads);
    const Place place = PlaceOf(__popcll(word), sums);
    for (int64_t i = stored + place.before; word != 0 && i < capacity; ++i, word &= word - 1) {
      out[i] = static_cast<int32_t>(w * 64 + __ffsll(static_cast<long long>(word)) - 1);
    }
    stored += place.total;
  }
  return stored;
}

// Windows of distances at most 64 apart touch or overlap in every row block, so they form one run. Returns
// how many runs there are.
__device__ int64_t StoreRuns(const int32_t* distances, int64_t num_distances, DistanceRun* runs,
                             int64_t capacity, int* sums) {
  int64_t stored = 0;
  for (int64_t begin = 0; begin < num_distances; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    const bool exists = i < num_distances;
    const int64_t distance = exists ? distances[i] : 0;
    const int64_t before = exists && i > 0 ? distances[i - 1] : 0;
    const bool starts = exists && (i == 0 || distance - before > kRowBlock);
    const Place place = PlaceOf(starts ? 1 : 0, sums);
    const int64_t run = stored + place.before;  // of a distance that starts one; else the one after its own
    if (starts && run < capacity) {
      runs[run].d_lo = distance;
      runs[run].exact = false;
    }
    if (starts && run > 0 && run <= capacity) runs[run - 1].d_hi = before + 1;
    if (i == num_distances - 1) {
      const int64_t last = starts ? run : run - 1;
      if (last < capacity) runs[last].d_hi = distance + 1;
    }
    stored += place.total;
  }
  return stored;
}

__global__ __launch_bounds__(kThreads) void BuildIndexKernel(const uint64_t* bits, int64_t words_per_list,
                                                             bool with_runs,
                                                             const __grid_constant__ Heads heads) {
  __shared__ int sums[32];
  const IndexBuffers& out = heads.of_head[blockIdx.x];
  const uint64_t* words = bits + 2 * static_cast<int64_t>(blockIdx.x) * words_per_list;
  const int64_t columns =
      StoreBits(words, words_per_list, /*add_first=*/false, out.columns, out.column_capacity, sums);
  const int64_t distances = StoreBits(words + words_per_list, words_per_list, /*add_first=*/true,
                                      out.distances, out.distance_capacity, sums);
  const int64_t stored_distances = min(distances, int64_t{out.distance_capacity});
  __syncthreads();  // other threads' distances are read
  int64_t runs = 0;
  if (with_runs) runs = StoreRuns(out.distances, stored_distances, out.runs, out.run_capacity, sums);
  if (threadIdx.x != 0) return;
  const bool fits = columns <= out.column_capacity && distances <= out.distance_capacity &&
                    (!with_runs || runs <= out.run_capacity);
  *out.counts = {.columns = static_cast<int32_t>(min(columns, int64_t{out.column_capacity})),
                 .distances = static_cast<int32_t>(stored_distances),
                 .runs = static_cast<int32_t>(min(runs, int64_t{out.run_capacity})),
                 .overflow = fits ? 0 : 1};
}

}  // namespace

int64_t CudaBuildIndexWorkspaceBytes(int64_t, int64_t) { return 0; }

absl::Status CudaBuildIndex(const BuildIndexParams& params, Workspace, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("build index", "words_per_list", params.words_per_list, 0));
  for (const IndexBuffers& out : params.out) {
    const int64_t least = std::min({out.column_capacity, out.distance_capacity, out.run_capacity});
    LF_RETURN_IF_ERROR(cuda::CheckAtLeast("build index", "capacity", least, 0));
  }
  for (size_t begin = 0; begin < params.out.size(); begin += Heads::kMost) {
    const size_t count = std::min<size_t>(Heads::kMost, params.out.size() - begin);
    Heads heads;
    std::copy_n(params.out.begin() + static_cast<int64_t>(begin), count, heads.of_head);
    LF_RETURN_IF_ERROR(Launch("BuildIndexKernel", BuildIndexKernel,
                              {.grid_x = static_cast<int64_t>(count), .block = kThreads}, stream,
                              params.bits + 2 * static_cast<int64_t>(begin) * params.words_per_list,
                              params.words_per_list, params.coverage == Coverage::kTiles, heads));
  }
  return absl::OkStatus();
}

}  // namespace longfill
