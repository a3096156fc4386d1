#ifndef LONGFILL_KERNELS_SPARSE_SHARE_CHECK_H_
#define LONGFILL_KERNELS_SPARSE_SHARE_CHECK_H_

// What patterns and backends check alike of the representatives of key blocks (head_pattern.h, BlockShare).

#include <cstdint>
#include <span>
#include <string>

#include "kernels/base/status.h"

namespace longfill {

// InvalidArgument naming field and value: counts below 0, above kMaxOutliers together, or samples that are no
// power of two. `where` stands before "samples" and "outliers" in messages.
absl::Status CheckRepresentatives(const std::string& where, int64_t num_samples, int64_t num_outliers);

// InvalidArgument naming field and value: num_coarse below 0, or above kMaxOutliers with the samples, which
// have passed CheckRepresentatives.
absl::Status CheckCoarse(const std::string& where, int64_t num_coarse, int64_t num_samples);

// CheckRepresentatives where `operation` reads so many, of which the first are samples.
absl::Status CheckReadsRepresentatives(const char* operation, int64_t num_representatives,
                                       int64_t num_samples);

// InvalidArgument if there are samples without the keys of the rows.
absl::Status CheckReadsOwnKeys(const char* operation, int64_t num_samples, const void* own_k);

// InvalidArgument unless the rows of coarse blocks that a selection reads are there, where it has two levels
// and some whole coarse block.
absl::Status CheckReadsCoarse(const char* operation, int64_t num_coarse, int64_t num_samples,
                              int64_t num_key_blocks, const void* coarse);

// InvalidArgument naming the value unless the scale is above 0 and each head has a min_share in (0, 1].
absl::Status CheckShares(const char* operation, float scale, std::span<const float> min_share,
                         int64_t num_heads);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_SHARE_CHECK_H_
