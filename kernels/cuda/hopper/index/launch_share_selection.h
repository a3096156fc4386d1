#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_LAUNCH_SHARE_SELECTION_H_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_LAUNCH_SHARE_SELECTION_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "kernels/cuda/index/share_selection_args.h"

namespace longfill::cuda::hopper {

struct ShareMaps {
  CUtensorMap chunks;    // [num_representatives, num_key_blocks, head_dim], 64 blocks at a time
  CUtensorMap eights;    // the same, eight at a time
  CUtensorMap own_keys;  // [1, num_rows, head_dim], where there are samples
};

// Instantiated for queries in bfloat16 and float16, head dims 64, 96 and 128, and stages of the same or of
// E4M3.
template <DType kDType, int kHeadDim, bool kFp8>
absl::Status LaunchShareSelection(const ShareSelectionArgs& args, int64_t num_tiles, const ShareMaps& maps,
                                  cudaStream_t stream);

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_LAUNCH_SHARE_SELECTION_H_
