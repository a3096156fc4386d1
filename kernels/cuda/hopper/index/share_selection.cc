#include "kernels/cuda/hopper/index/share_selection.h"

#include <cuda.h>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/hopper/head_dims.h"
#include "kernels/cuda/hopper/index/launch_share_selection.h"
#include "kernels/cuda/hopper/tensor_map.h"

namespace longfill {
namespace {

// Rows in boxes of 64, the rows of a stage. Two E4M3 travel as one 16-bit element.
cuda::hopper::HeadsBox BoxOf(int64_t head_dim, bool fp8) {
  const int64_t elements = fp8 ? head_dim / 2 : head_dim;
  const int block_elements = elements % 64 == 0 ? 64 : elements % 32 == 0 ? 32 : 16;
  return {.head_dim = elements,
          .num_heads = 1,
          .row_stride = elements,
          .box_dims = block_elements,
          .box_rows = 64,
          .swizzle_bytes = 2 * block_elements};
}

template <int kHeadDim, bool kFp8>
absl::Status LaunchVariant(const ShareSelectionArgs& args, int64_t num_tiles,
                           const cuda::hopper::ShareMaps& maps, DType dtype, cudaStream_t stream) {
  using cuda::hopper::LaunchShareSelection;
  return dtype == DType::kBFloat16
             ? LaunchShareSelection<DType::kBFloat16, kHeadDim, kFp8>(args, num_tiles, maps, stream)
             : LaunchShareSelection<DType::kFloat16, kHeadDim, kFp8>(args, num_tiles, maps, stream);
}
template <int kHeadDim>
absl::Status LaunchHeadDim(const ShareSelectionArgs& args, int64_t num_tiles,
                           const cuda::hopper::ShareMaps& maps, DType dtype, cudaStream_t stream) {
  return args.fp8 ? LaunchVariant<kHeadDim, true>(args, num_tiles, maps, dtype, stream)
                  : LaunchVariant<kHeadDim, false>(args, num_tiles, maps, dtype, stream);
}

}  // namespace

bool HasHopperShareSelection(int64_t head_dim, const DeviceLimits& limits) {
  return cuda::hopper::ServesHeadDim(head_dim, limits);
}

absl::Status LaunchHopperShareSelection(const ShareSelectionArgs& args, int64_t num_tiles,
                                        int64_t num_key_blocks, int64_t head_dim, DType dtype,
                                        cudaStream_t stream) {
  cuda::hopper::ShareMaps maps = {};
  const int elements_of_word = args.fp8 ? 2 : 1;
  if (num_key_blocks > 0) {  // without any, no tile reads any
    cuda::hopper::HeadsBox box = BoxOf(head_dim, args.fp8);
    box.num_rows = num_key_blocks;
    box.num_heads = args.num_representatives;
    box.head_stride = args.plane_stride / elements_of_word;
    LF_RETURN_IF_ERROR(cuda::hopper::EncodeTensorMap("share selection: representatives", args.representatives,
                                                     dtype, box, &maps.chunks));
    box.box_rows = static_cast<int>(kCoarseBlocks);
    LF_RETURN_IF_ERROR(cuda::hopper::EncodeTensorMap("share selection: representatives", args.representatives,
                                                     dtype, box, &maps.eights));
  }
  if (args.num_samples > 0) {
    cuda::hopper::HeadsBox box = BoxOf(head_dim, args.fp8);
    box.num_rows = args.num_rows;
    box.row_stride = args.own_k_row_stride / elements_of_word;
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
