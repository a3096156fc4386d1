#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_LAST_QUERY_H_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_LAST_QUERY_H_

// The passes of the last queries over K on compute capability 9.0, for head dims 64, 96 and 128. They write
// what those of kernels/cuda/index/last_query_args.h write; bits may differ from theirs.

#include <cuda.h>

#include "kernels/cuda/device_limits.h"
#include "kernels/cuda/index/last_query_args.h"

namespace longfill {

// Whether they take a call that the general ones take.
bool HasHopperLastQuery(const LastQueryParams& params, const DeviceLimits& limits);

// The keys of a call, as boxes of 64 elements of 128 rows.
absl::Status MapLastQueryKeys(const LastQueryParams& params, DType dtype, CUtensorMap* keys);

// One launch each, of at most one thread block for each SM. Of `args` they do not read how the general
// kernels cut up their work (blocks_per_stretch, blocks_at_once, ring_stages).
absl::Status LaunchHopperLastQueryMax(const CUtensorMap& keys, const LastQueryArgs& args, int64_t head_dim,
                                      DType dtype, int64_t grid, BlockStatistics* statistics, float* row_max,
                                      cudaStream_t stream);
absl::Status LaunchHopperLastQueryScore(const CUtensorMap& keys, const LastQueryArgs& args, int64_t head_dim,
                                        DType dtype, int64_t grid, const float* row_max,
                                        const uint64_t* row_sum, const LastQueryScores& scores,
                                        cudaStream_t stream);

// Calls launch.template operator()<Element, kHeadDim>() for one of the head dims that there are.
template <typename Bf16, typename Fp16, typename Launch>
absl::Status ForHopperLastQueryVariant(int64_t head_dim, DType dtype, const Launch& launch) {
  const auto for_dtype = [&]<int kHeadDim>() {
    return dtype == DType::kBFloat16 ? launch.template operator()<Bf16, kHeadDim>()
                                     : launch.template operator()<Fp16, kHeadDim>();
  };
  switch (head_dim) {
    case 64:
      return for_dtype.template operator()<64>();
    case 96:
      return for_dtype.template operator()<96>();
    default:
      return for_dtype.template operator()<128>();
  }
}

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_LAST_QUERY_H_
