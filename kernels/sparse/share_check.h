#ifndef LONGFILL_KERNELS_SPARSE_SHARE_CHECK_H_
#define LONGFILL_KERNELS_SPARSE_SHARE_CHECK_H_

// What backends check alike of the representatives of key blocks (head_pattern.h, BlockShare).

#include <cstdint>

#include "kernels/base/status.h"

namespace longfill {

// InvalidArgument naming operation and value: counts below 0, above kMaxOutliers together, or samples that
// are no power of two.
absl::Status CheckRepresentatives(const char* operation, int64_t num_samples, int64_t num_outliers);

// The same where they are read; and samples need the keys of the rows.
absl::Status CheckReadsRepresentatives(const char* operation, int64_t num_representatives,
                                       int64_t num_samples, const void* own_k);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_SHARE_CHECK_H_
