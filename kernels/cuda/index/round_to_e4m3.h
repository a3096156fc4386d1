#ifndef LONGFILL_KERNELS_CUDA_INDEX_ROUND_TO_E4M3_H_
#define LONGFILL_KERNELS_CUDA_INDEX_ROUND_TO_E4M3_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

namespace longfill {

// Groups of rows, of which each is rounded to E4M3 with one power of two (head_pattern.h, BlockShare::fp8).
// Row i of group g begins at g * group_stride + i * row_stride, in elements, aligned to 16 bytes.
struct RoundedRows {
  const void* rows = nullptr;  // of a 16-bit dtype
  int64_t num_groups = 0;
  int64_t rows_of_group = 0;
  int64_t num_rows = 0;  // of all groups; the last one may have fewer
  int64_t head_dim = 0;  // a multiple of 8
  int64_t group_stride = 0, row_stride = 0;
  // The same in what is written: with `scales` E4M3 of scaled elements and the factor of each group,
  // without them elements of the dtype again, unscaled (e4m3.cuh, NarrowE4m3).
  void* out = nullptr;
  int64_t out_group_stride = 0, out_row_stride = 0;
  float* scales = nullptr;  // [num_groups], to multiply products with
};

absl::Status LaunchRoundToE4m3(const RoundedRows& rows, DType dtype, cudaStream_t stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_ROUND_TO_E4M3_H_
