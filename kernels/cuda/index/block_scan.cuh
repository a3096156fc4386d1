#ifndef LONGFILL_KERNELS_CUDA_INDEX_BLOCK_SCAN_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_BLOCK_SCAN_CUH_

#include <cstdint>

namespace longfill::cuda {

inline constexpr int kScanThreads = 1024;

struct ScanPlace {
  int64_t before = 0;  // sum of the values of all threads before this one
  int64_t total = 0;
};

// Called by all kScanThreads threads of a thread block. `sums` has a place for each of its warps, in shared
// memory, and may be used again at once.
template <typename Value>
__device__ ScanPlace PlaceOf(Value value, Value* sums) {
  constexpr unsigned kAllLanes = 0xFFFFFFFFU;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  Value inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const Value other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    static_assert(kScanThreads == 32 * 32, "one lane for each warp");
    Value of_warps = sums[lane];
    for (int step = 1; step < 32; step *= 2) {
      const Value other = __shfl_up_sync(kAllLanes, of_warps, step);
      if (lane >= step) of_warps += other;
    }
    sums[lane] = of_warps;
  }
  __syncthreads();
  const ScanPlace place = {(warp == 0 ? Value{0} : sums[warp - 1]) + inclusive - value, sums[31]};
  __syncthreads();  // before `sums` is written again
  return place;
}

}  // namespace longfill::cuda

#endif  // LONGFILL_KERNELS_CUDA_INDEX_BLOCK_SCAN_CUH_
