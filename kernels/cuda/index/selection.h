#ifndef LONGFILL_KERNELS_CUDA_INDEX_SELECTION_H_
#define LONGFILL_KERNELS_CUDA_INDEX_SELECTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/device_limits.h"

namespace longfill {

// KernelSet::SelectionStart, SelectionHistogram, SelectionAdvance, SelectionMark. Keys are formed from the
// scores where they are read; a settled list costs no memory traffic.
absl::Status CudaSelectionStart(std::span<const int64_t> budgets, SelectionCut* cuts, cudaStream_t stream);
absl::Status CudaSelectionHistogram(const SelectionLists& lists, int pass, const SelectionCut* cuts,
                                    uint64_t* histogram, const DeviceLimits& limits, cudaStream_t stream);
absl::Status CudaSelectionAdvance(int64_t num_lists, int pass, const uint64_t* histogram, SelectionCut* cuts,
                                  cudaStream_t stream);
absl::Status CudaSelectionMark(const SelectionLists& lists, const SelectionCut* cuts, uint64_t* bits,
                               int64_t words_per_list, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_SELECTION_H_
