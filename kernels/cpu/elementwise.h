#ifndef LONGFILL_KERNELS_CPU_ELEMENTWISE_H_
#define LONGFILL_KERNELS_CPU_ELEMENTWISE_H_

// Operations that treat each row by itself: KernelSet::Embed, RmsNorm, GatedActivation, Rotary.

#include "kernels/api/kernel_set.h"
#include "kernels/base/thread_pool.h"

namespace longfill {

absl::Status CpuEmbed(const EmbedParams& params, ThreadPool& pool);
absl::Status CpuRmsNorm(const RmsNormParams& params, ThreadPool& pool);
absl::Status CpuGatedActivation(const GatedActivationParams& params, ThreadPool& pool);
absl::Status CpuRotary(const RotaryParams& params, ThreadPool& pool);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CPU_ELEMENTWISE_H_
