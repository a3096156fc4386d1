#ifndef LONGFILL_RUNTIME_KV_KV_TIER_PLAN_H_
#define LONGFILL_RUNTIME_KV_KV_TIER_PLAN_H_

// Sizes that tiers take and plans count: one formula for both.

#include <cstdint>

#include "runtime/kv/kv_sink.h"
#include "runtime/kv/kv_tier.h"

namespace longfill {

// Host memory that a device tier copies to for its readers.
inline constexpr int kNumReadBuffers = 4;
inline constexpr int64_t kReadBufferBytes = int64_t{2} << 20;

KvPromptShape ShapeOf(const KvTransferSpec& spec);  // compute_dtype is the spec's dtype

// Rows of the ring: what `ring_bytes` hold, at most all rows of the transfer and at least one.
int64_t ReaderRingRows(int64_t ring_bytes, const KvPromptShape& prompt);

// What keys, or values, of one layer take of a device tier's budget.
int64_t DeviceTierHalfBytes(const KvPromptShape& prompt);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_TIER_PLAN_H_
