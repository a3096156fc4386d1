#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_SELECTION_H_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_SELECTION_H_

// Selection by share on compute capability 9.0, for head dims 64, 96 and 128. It writes what
// kernels/cuda/index/share_selection.cu writes; blocks whose share is tau but for rounding may differ.

#include "kernels/cuda/device_limits.h"
#include "kernels/cuda/index/share_selection_args.h"

namespace longfill {

inline constexpr int kHopperShareRows = 192;  // of a tile

bool HasHopperShareSelection(int64_t head_dim, const DeviceLimits& limits);

// One launch over `num_tiles` tiles of kHopperShareRows rows before args.end_tile of all heads.
// `num_key_blocks` rows of each plane of representatives are there.
absl::Status LaunchHopperShareSelection(const ShareSelectionArgs& args, int64_t num_tiles,
                                        int64_t num_key_blocks, int64_t head_dim, DType dtype,
                                        cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_SELECTION_H_
