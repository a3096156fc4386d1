#ifndef LONGFILL_KERNELS_CPU_WIDEN_H_
#define LONGFILL_KERNELS_CPU_WIDEN_H_

#include <cstdint>

#include "kernels/base/dtype.h"

namespace longfill {

// 16-bit floats (bf16 or fp16) to fp32; exact.
void Widen(const uint16_t* source, DType source_dtype, int64_t count, float* destination);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_WIDEN_H_
