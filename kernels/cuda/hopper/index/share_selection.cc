#include "kernels/cuda/hopper/index/share_selection.h"

#include <cuda.h>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/hopper/head_dims.h"
#include "kernels/cuda/hopper/index/launch_share_selection.h"
#include "kernels/cuda/hopper/tensor_map.h"

namespace longfill {
namespace {

// Rows in boxes of 64, the rows of a stage.
cuda::hopper::HeadsBox BoxOf(int64_t head_dim) {
  const int block_dims = head_dim % 64 == 0 ? 64 : 32;
  return {.head_dim = head_dim,
          .num_heads = 1,
          .row_stride = head_dim,
          .box_dims = block_dims,
          .box_rows = 64,
          .swizzle_bytes = 2 * block_dims};
}

template <int kHeadDim>
absl::Status LaunchHeadDim(const ShareSelectionArgs& args, int64_t num_tiles,
                           const cuda::hopper::ShareMaps& maps, DType dtype, cudaStream_t stream) {
  return dtype == DType::kBFloat16
             ? cuda::hopper::LaunchShareSelection<DType::kBFloat16, kHeadDim>(args, num_tiles, maps, stream)
             : cuda::hopper::LaunchShareSelection<DType::kFloat16, kHeadDim>(args, num_tiles, maps, stream);
}

}  // namespace

bool HasHopperShareSelection(int64_t head_dim, const DeviceLimits& limits) {
  return cuda::hopper::ServesHeadDim(head_dim, limits);
}

absl::Status LaunchHopperShareSelection(const ShareSelectionArgs& args, int64_t num_tiles,
                                        int64_t num_key_blocks, int64_t head_dim, DType dtype,
                                        cudaStream_t stream) {
  cuda::hopper::ShareMaps maps = {};
  if (num_key_blocks > 0) {  // without any, no tile reads any
    cuda::hopper::HeadsBox box = BoxOf(head_dim);
    box.num_rows = num_key_blocks;
    box.num_heads = args.num_representatives;
    box.head_stride = args.plane_stride;
    LF_RETURN_IF_ERROR(cuda::hopper::EncodeTensorMap("share selection: representatives", args.representatives,
                                                     dtype, box, &maps.chunks));
    box.box_rows = static_cast<int>(kCoarseBlocks);
    LF_RETURN_IF_ERROR(cuda::hopper::EncodeTensorMap("share selection: representatives", args.representatives,
                                                     dtype, box, &maps.eights));
  }
  if (args.num_samples > 0) {
    cuda::hopper::HeadsBox box = BoxOf(head_dim);
    box.num_rows = args.num_rows;
    box.row_stride = args.own_k_row_stride;
    LF_RETURN_IF_ERROR(
        cuda::hopper::EncodeTensorMap("share selection: own keys", args.own_k, dtype, box, &maps.own_keys));
  }
  switch (head_dim) {
    case 64:
      return LaunchHeadDim<64>(args, num_tiles, maps, dtype, stream);
    case 96:
      return LaunchHeadDim<96>(args, num_tiles, maps, dtype, stream);
    case 128:
      return LaunchHeadDim<128>(args, num_tiles, maps, dtype, stream);
    default:
      return absl::UnimplementedError(absl::StrCat("share selection: no Hopper variant for head_dim ",
                                                   head_dim, ", only for 64, 96 and 128"));
  }
}

}  // namespace longfill
