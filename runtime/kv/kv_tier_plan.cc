#include "runtime/kv/kv_tier_plan.h"

#include <algorithm>

#include "runtime/kv/region_memory.h"

namespace longfill {
namespace {

// Keys and values of one row, all heads of one layer, in the wire dtype.
int64_t RowBytes(const KvPromptShape& prompt) {
  return 2 * prompt.num_kv_heads * prompt.head_dim * DTypeBytes(prompt.kv_dtype);
}

}  // namespace

KvPromptShape ShapeOf(const KvTransferSpec& spec) {
  return {.num_layers = spec.num_layers,
          .num_kv_heads = spec.num_kv_heads,
          .num_rows = spec.plan.NumTokens(spec.rank),
          .head_dim = spec.head_dim,
          .kv_dtype = spec.dtype,
          .compute_dtype = spec.dtype};
}

int64_t ReaderRingRows(int64_t ring_bytes, const KvPromptShape& prompt) {
  const int64_t all_rows = std::max<int64_t>(1, prompt.num_layers * prompt.num_rows);
  return std::clamp<int64_t>(ring_bytes / RowBytes(prompt), 1, all_rows);
}

int64_t DeviceTierHalfBytes(const KvPromptShape& prompt) {
  return RegionMemoryResource::PartBytes(prompt.num_kv_heads * prompt.num_rows * prompt.head_dim *
                                         DTypeBytes(prompt.compute_dtype));
}

KvTierPlan PlanKvTier(const KvTierOptions& options, const KvPromptShape& prompt) {
  switch (options.kind) {
    case KvTierKind::kNone:
      break;
    case KvTierKind::kHost:
      return {.host_bytes = prompt.num_layers * prompt.num_rows * RowBytes(prompt)};
    case KvTierKind::kDevice:
      return {.device_bytes = options.bytes,
              .device_needed_bytes = 2 * prompt.num_layers * DeviceTierHalfBytes(prompt),
              .host_bytes = prompt.device == DeviceKind::kCpu ? 0 : kNumReadBuffers * kReadBufferBytes};
    case KvTierKind::kReader:
      return {.host_bytes = ReaderRingRows(options.bytes, prompt) * RowBytes(prompt)};
  }
  return {};
}

}  // namespace longfill
