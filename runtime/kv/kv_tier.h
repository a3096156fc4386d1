#ifndef LONGFILL_RUNTIME_KV_KV_TIER_H_
#define LONGFILL_RUNTIME_KV_KV_TIER_H_

// What a KvStore holds K and V in between the engine and their readers. The README beside this file compares
// the tiers.

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/api/backend.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "runtime/kv/kv_page.h"
#include "runtime/kv/kv_sink.h"

namespace longfill {

// The pages of one transfer on one rank. One thread writes, rows in order and each once; others read what has
// been written, at the same time: the store's watermarks keep them apart.
class KvPages {
 public:
  virtual ~KvPages() = default;
  virtual int64_t bytes() const = 0;  // that they take of their tier's memory, until they are destroyed
  // 0: rows stay. Otherwise only so many rows are held, over all layers: a row is gone once this many later
  // ones have been written.
  virtual int64_t ring_rows() const { return 0; }

  // Whether rows come by WriteOnDevice, else by Write.
  virtual bool on_device() const { return false; }

  // Rows [num_kv_heads, row_end - row_begin, head_dim] of `dtype` in host memory.
  virtual absl::Status Write(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                             HeadsView<const void> value, DType dtype) = 0;
  // The same of the compute dtype in memory of the device: enqueues copies on the backend's main stream.
  virtual absl::Status WriteOnDevice(int64_t layer, int64_t row_begin, int64_t row_end,
                                     HeadsView<const void> key, HeadsView<const void> value) = 0;
  // Local rows [row_begin, row_begin + page.num_rows) as a page; page.Bytes() each.
  virtual absl::Status Read(int64_t layer, int64_t row_begin, const KvPageShape& page, std::byte* key,
                            std::byte* value) const = 0;
};

// Where the pages of a store are. Thread-safe; outlives its pages.
class KvTier {
 public:
  virtual ~KvTier() = default;
  // ResourceExhausted where the memory of the transfer is not there.
  virtual absl::StatusOr<std::unique_ptr<KvPages>> Open(const KvTransferSpec& spec) = 0;
};

// All layers in memory that the host reads: page-locked, pageable, or files. `memory` outlives the tier.
std::unique_ptr<KvTier> MakeMemoryTier(MemoryResource* memory);

// All layers in `budget_bytes` of backend.memory(), which are taken here. `backend` outlives the tier.
absl::StatusOr<std::unique_ptr<KvTier>> MakeDeviceTier(Backend& backend, int64_t budget_bytes);

// A ring of at most `ring_bytes` for each transfer. `memory` outlives the tier.
std::unique_ptr<KvTier> MakeReaderTier(MemoryResource* memory, int64_t ring_bytes);

// A piece that a reader copies must fit the ring whole, and a ring that holds few of them stops the engine
// often.
inline constexpr int64_t kMinReaderRingBytes = int64_t{8} << 20;

// For plans.
enum class KvTierKind : uint8_t { kNone, kHost, kDevice, kReader };  // kNone: nothing of ours, or files
struct KvTierOptions {
  KvTierKind kind = KvTierKind::kNone;
  int64_t bytes = 0;  // kDevice: the budget; kReader: the ring
};
// What one prompt appends on one rank.
struct KvPromptShape {
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t num_rows = 0;
  int64_t head_dim = 0;
  DType kv_dtype = DType::kFloat32;
  DType compute_dtype = DType::kFloat32;
  DeviceKind device = DeviceKind::kCpu;
};
struct KvTierPlan {
  int64_t device_bytes = 0;         // taken once, whatever the prompt
  int64_t device_needed_bytes = 0;  // of them, by this prompt
  int64_t host_bytes = 0;
};
KvTierPlan PlanKvTier(const KvTierOptions& options, const KvPromptShape& prompt);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_TIER_H_
