#ifndef LONGFILL_KERNELS_CPU_E4M3_H_
#define LONGFILL_KERNELS_CPU_E4M3_H_

// Rounding to E4M3 as scores of blocks do it (kernels/sparse/head_pattern.h, BlockShare::fp8).

#include <cstdint>

namespace longfill {

// Rows of `width` elements, which may stay where they are.
struct RowsToRound {
  const float* from = nullptr;
  int64_t from_stride = 0;  // elements, as is to_stride
  float* to = nullptr;
  int64_t to_stride = 0;
  int64_t num_rows = 0;
  int64_t width = 0;
};

// Rounds rows together: multiplies by the power of two, at most 2^kMostFp8Power, that brings the largest
// magnitude of all into [128, 256), rounds each element to E4M3, to nearest even, and divides by the power
// again. Only a magnitude that is rounded to 2^128 becomes infinite. Copies rows that hold zeros alone, an
// infinity or a NaN. The same bits on every machine.
void RoundToE4m3(const RowsToRound& rows);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_E4M3_H_
