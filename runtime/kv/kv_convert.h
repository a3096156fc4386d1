#ifndef LONGFILL_RUNTIME_KV_KV_CONVERT_H_
#define LONGFILL_RUNTIME_KV_KV_CONVERT_H_

#include <cstdint>

#include "kernels/api/kernel_set.h"
#include "kernels/base/dtype.h"

namespace longfill {

// Rows [0, num_rows) of one head of `from`, which has elements of from_dtype in host memory, to dense rows of
// to_dtype at `to`. Copies where the types are equal, rounds through fp32 where they are not.
void ConvertHeadRows(HeadsView<const void> from, DType from_dtype, int64_t head, int64_t num_rows,
                     int64_t head_dim, DType to_dtype, void* to);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_CONVERT_H_
