#ifndef LONGFILL_KERNELS_CPU_ELEMENTWISE_SIMD_H_
#define LONGFILL_KERNELS_CPU_ELEMENTWISE_SIMD_H_

#include <cstdint>

#include "kernels/api/kernel_set.h"

namespace longfill {

// One row; out may equal x.
void RmsNormRow(const float* x, const float* weight, float epsilon, int64_t width, float* out);
// One row; out may equal gate or up.
void GatedActivationRow(const float* gate, const float* up, Activation activation, int64_t width, float* out);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_ELEMENTWISE_SIMD_H_
