#ifndef LONGFILL_PARALLEL_DISTRIBUTED_SELECTION_H_
#define LONGFILL_PARALLEL_DISTRIBUTED_SELECTION_H_

// The exact k largest of scores that are spread over ranks, ties to the lower index, by all-reduced radix
// histograms.

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/api/kernel_set.h"
#include "parallel/communicator.h"

namespace longfill {

// Orders by score, then by falling index, and is unique where the index is. `score` is not negative
// (+infinity is legal: a forced entry), `index` lies in [0, 2^31).
inline uint64_t SelectionKey(float score, int64_t index) {
  return uint64_t{std::bit_cast<uint32_t>(score)} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(index));
}
inline int32_t SelectionKeyIndex(uint64_t key) {
  return static_cast<int32_t>(0xFFFFFFFFu - static_cast<uint32_t>(key & 0xFFFFFFFFu));
}

// Bytes from kernels.memory() for so many lists at once.
int64_t DistributedSelectionBytes(int64_t num_lists);

// For each of budgets.size() lists the indices of its budgets[l] largest keys over all ranks, in no
// particular order, equal on all ranks. keys [lists, list_stride], the first num_keys of each valid: this
// rank's part. `workspace` has DistributedSelectionBytes. Internal when a list holds fewer keys than its
// budget over all ranks.
absl::StatusOr<std::vector<std::vector<int32_t>>> SelectLargest(KernelSet& kernels, Communicator& world,
                                                                const uint64_t* keys, int64_t list_stride,
                                                                int64_t num_keys,
                                                                std::span<const int64_t> budgets,
                                                                Workspace workspace, Stream& stream);

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_DISTRIBUTED_SELECTION_H_
