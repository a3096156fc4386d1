#ifndef LONGFILL_KERNELS_CUDA_HOPPER_ORDER_HEADS_H_
#define LONGFILL_KERNELS_CUDA_HOPPER_ORDER_HEADS_H_

#include <cuda_runtime_api.h>

#include "kernels/base/status.h"
#include "kernels/cuda/attention/attention_args.h"

namespace longfill::cuda::hopper {

inline constexpr int kMaxOrderedHeads = 256;

// Puts args.heads, `num_heads` entries in device memory, into the order of the work that their indices hold,
// the most first, so that what is left for the end of a call of few tiles is small (list scheduling by
// longest processing time, Graham 1969). For kernels that go head by head: group_begin and group_size are not
// kept up. More than kMaxOrderedHeads stay as they are.
absl::Status OrderHeads(const attention::Args& args, attention::HeadEntry* heads, int num_heads,
                        cudaStream_t stream);

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_ORDER_HEADS_H_
