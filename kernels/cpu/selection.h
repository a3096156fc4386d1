#ifndef LONGFILL_KERNELS_CPU_SELECTION_H_
#define LONGFILL_KERNELS_CPU_SELECTION_H_

// KernelSet::JoinScores and the selection of the k largest: SelectionStart, -Histogram, -Advance, -Mark.

#include <span>

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

absl::Status CpuJoinScores(const JoinScoresParams& params, ThreadPool& pool);
absl::Status CpuSelectionStart(std::span<const int64_t> budgets, SelectionCut* cuts);
absl::Status CpuSelectionHistogram(const SelectionLists& lists, int pass, const SelectionCut* cuts,
                                   uint64_t* histogram, ThreadPool& pool);
absl::Status CpuSelectionAdvance(int64_t num_lists, int pass, const uint64_t* histogram, SelectionCut* cuts);
absl::Status CpuSelectionMark(const SelectionLists& lists, const SelectionCut* cuts, uint64_t* bits,
                              int64_t words_per_list, ThreadPool& pool);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_SELECTION_H_
