#include "kernels/cuda/hopper/head_dims.h"
#include "kernels/cuda/hopper/index/last_query.h"
#include "kernels/cuda/hopper/tensor_map.h"

namespace longfill {

bool HasHopperLastQuery(const LastQueryParams& params, const DeviceLimits& limits) {
  return cuda::hopper::ServesHeadDim(params.head_dim, limits);
}

absl::Status MapLastQueryKeys(const LastQueryParams& params, DType dtype, CUtensorMap* keys) {
  return cuda::hopper::EncodeTensorMap("last-query scores", params.k.data, dtype,
                                       {.head_dim = params.head_dim,
                                        .num_rows = params.num_keys,
                                        .num_heads = params.num_kv_heads,
                                        .row_stride = params.k.row_stride,
                                        .head_stride = params.k.head_stride,
                                        .box_dims = 64,
                                        .box_rows = static_cast<int>(kSelectionBlock),
                                        .swizzle_bytes = 128},
                                       keys);
}

}  // namespace longfill
