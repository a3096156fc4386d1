#include "kernels/cuda/index/build_index.h"

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/index/block_scan.cuh"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace {

constexpr int kThreads = cuda::kScanThreads;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

struct Heads {
  static constexpr int kMost = 64;  // of a launch: kernel parameters are limited
  IndexBuffers of_head[kMost];
};

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
    const cuda::ScanPlace place = cuda::PlaceOf(__popcll(word), sums);
    for (int64_t i = stored + place.before; word != 0 && i < capacity; ++i, word &= word - 1) {
      out[i] = static_cast<int32_t>(w * 64 + __ffsll(static_cast<long long>(word)) - 1);
    }
    stored += place.total;
  }
  return stored;
}

// The walk that makes runs (sparse_index.h, CoarseRuns) begins anew where neighbouring distances are this far
// apart, wherever it stands: a piece is at most 63 below the distance that it is for.
constexpr uint32_t kAlwaysNewRun = 2 * kRowBlock;
// Set meanwhile in the distances that are the largest of a run.
constexpr uint32_t kTopMark = 1U << 31;

__device__ bool IsMarked(const int32_t* distances, int64_t i) {
  return (static_cast<uint32_t>(distances[i]) & kTopMark) != 0;
}
__device__ uint32_t Distance(const int32_t* distances, int64_t i) {
  return static_cast<uint32_t>(distances[i]) & ~kTopMark;
}

// Whether the distance at i is the first of a stretch of the walk that depends on nothing above it.
__device__ bool StartsStretch(const int32_t* distances, int64_t count, int64_t i) {
  return i < count &&
         (i == count - 1 || Distance(distances, i + 1) - Distance(distances, i) >= kAlwaysNewRun);
}

// One warp: marks the tops of the runs of the stretch that starts at place `start`, downwards.
__device__ void MarkTops(int32_t* distances, int64_t start) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto piece_of = [](uint32_t top,
                           uint32_t distance) {  // pieces from the top's to that of the distance
    return (top - distance + static_cast<uint32_t>(kRowBlock) - 1) / static_cast<uint32_t>(kRowBlock);
  };
  int64_t place = start - lane;
  uint32_t distance = place >= 0 ? Distance(distances, place) : 0;
  uint32_t top = __shfl_sync(kAllLanes, distance, 0);
  uint32_t last = top;    // the distance above lane 0's
  uint32_t unseen = ~1U;  // lanes below the last top
  if (lane == 0) distances[start] |= static_cast<int32_t>(kTopMark);
  while (true) {
    const uint32_t in_next = place >= 32 ? Distance(distances, place - 32) : 0;
    uint32_t above = __shfl_up_sync(kAllLanes, distance, 1);
    if (lane == 0) above = last;
    const uint32_t ends = __ballot_sync(kAllLanes, place < 0 || above - distance >= kAlwaysNewRun);
    const uint32_t inside = ends == 0 ? kAllLanes : (ends & -ends) - 1;  // lanes of this stretch
    while (true) {
      const bool starts = piece_of(top, distance) > piece_of(top, above) + 1;
      const uint32_t tops = __ballot_sync(kAllLanes, starts) & unseen & inside;
      if (tops == 0) break;
      const int next = __ffs(static_cast<int>(tops)) - 1;
      top = __shfl_sync(kAllLanes, distance, next);
      unseen = ~1U << next;
      if (lane == next) distances[place] |= static_cast<int32_t>(kTopMark);
    }
    if (ends != 0) return;
    last = __shfl_sync(kAllLanes, distance, 31);
    unseen = kAllLanes;
    place -= 32;
    distance = in_next;
  }
}

// Returns how many runs there are.
__device__ int64_t StoreRuns(int32_t* distances, int64_t num_distances, DistanceRun* runs, int64_t capacity,
                             int* sums) {
  const int64_t warp = threadIdx.x / 32;
  for (int64_t begin = warp * 32; begin < num_distances; begin += kThreads) {
    const bool starts = StartsStretch(distances, num_distances, begin + threadIdx.x % 32);
    for (uint32_t lanes = __ballot_sync(kAllLanes, starts); lanes != 0; lanes &= lanes - 1) {
      MarkTops(distances, begin + __ffs(static_cast<int>(lanes)) - 1);
    }
  }
  __syncthreads();
  int64_t stored = 0;
  for (int64_t begin = 0; begin < num_distances; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    const bool exists = i < num_distances;
    const bool is_top = exists && IsMarked(distances, i);
    const bool is_lowest = exists && (i == 0 || IsMarked(distances, i - 1));
    const cuda::ScanPlace place = cuda::PlaceOf(is_top ? 1 : 0, sums);
    const int64_t run = stored + place.before;
    if (run < capacity) {
      if (is_lowest) runs[run].d_lo = Distance(distances, i);
      if (is_top) runs[run].d_hi = int64_t{Distance(distances, i)} + 1;
    }
    stored += place.total;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < num_distances; i += kThreads) {
    distances[i] = static_cast<int32_t>(Distance(distances, i));
  }
  for (int64_t run = threadIdx.x; run < min(stored, capacity); run += kThreads) {
    const int64_t top = runs[run].d_hi - 1;
    const int64_t pieces = (top - runs[run].d_lo + kRowBlock - 1) / kRowBlock;
    runs[run].d_lo = max(int64_t{0}, top - pieces * kRowBlock);
    runs[run].exact = false;
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
