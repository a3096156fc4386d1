#ifndef LONGFILL_KERNELS_CPU_BLOCK_SELECTION_SIMD_H_
#define LONGFILL_KERNELS_CPU_BLOCK_SELECTION_SIMD_H_

#include <cstdint>

#include "kernels/cpu/tile_constants.h"

namespace longfill {

// out[r][lane] = sum over i of packed[i][lane] * rows[r][i], one chain of multiply-adds in ascending i.
// packed [head_dim, kTileLanes] and out [num_rows, kTileLanes] are aligned to 64 bytes.
void ScorePackedRows(const float* packed, int64_t head_dim, const float* const* rows, int64_t num_rows,
                     float* out);

// The instruction set that vectorised code runs with, such as "AVX3".
const char* InstructionSet();

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_BLOCK_SELECTION_SIMD_H_
