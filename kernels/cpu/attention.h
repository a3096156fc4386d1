#ifndef LONGFILL_KERNELS_CPU_ATTENTION_H_
#define LONGFILL_KERNELS_CPU_ATTENTION_H_

#include <vector>

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"
#include "kernels/sparse/coverage.h"

namespace longfill {

// Keys of the tile in hand, one for each worker, kept between calls for its capacity.
using TileKeysOfWorkers = std::vector<TileKeys>;

int64_t CpuAttentionWorkspaceBytes(int64_t head_dim, int num_threads);

// KernelSet::Attention. Tasks are (sequence, query head, row block), later row blocks, which have more keys,
// first. The bits of a row depend on its index, its keys and the key range only: not on threads, nor on which
// other rows are given.
absl::Status CpuAttention(const AttentionParams& params, Workspace workspace, ThreadPool& pool,
                          TileKeysOfWorkers& keys);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_ATTENTION_H_
