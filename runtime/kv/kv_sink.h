#ifndef LONGFILL_RUNTIME_KV_KV_SINK_H_
#define LONGFILL_RUNTIME_KV_KV_SINK_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>

#include "kernels/api/kernel_set.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "parallel/mesh.h"

namespace longfill {

// What a rank needs to know to take the KV cache of one request: equal on all ranks but for `rank`.
struct KvTransferSpec {
  std::string request_id;
  std::string transfer_id;    // unguessable, unique per request; chosen by rank 0
  ShardPlan plan{Mesh{}, 0};  // which tokens this rank owns: plan.TokenRanges(rank)
  int rank = 0;
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;  // a rank owns all KV heads of its tokens
  int64_t head_dim = 0;
  DType dtype = DType::kFloat32;  // of storage and wire; the sink converts
  // Bytes of key and value that this rank will append, all layers.
  int64_t OwnedBytes() const {
    return 2 * num_layers * num_kv_heads * plan.NumTokens(rank) * head_dim * DTypeBytes(dtype);
  }
};

// Where one rank's K and V of one request go. The engine calls Append for every layer in order and, within a
// layer, for ascending row pieces until all local rows are there; then Finish exactly once, also after an
// error. One thread at a time, but not always the same: on a GPU the thread of a KvExporter appends. Append
// copies or converts before it returns: the views are reused. An error ends the request on all ranks at the
// next layer boundary and comes back through Finish.
class KvSink {
 public:
  virtual ~KvSink() = default;
  // key, value: [num_kv_heads, row_end - row_begin, head_dim] of `dtype` in host memory, post-RoPE; rows are
  // local rows of the rank's tokens. The sink stores them in the dtype of its spec.
  virtual absl::Status Append(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                              HeadsView<const void> value, DType dtype) = 0;
  // Back-pressure: how many rows Append takes now; at the deadline, which is near, 0: ask again. An error
  // where that has been the answer for too long.
  virtual absl::StatusOr<int64_t> WaitForRoom(std::chrono::steady_clock::time_point /*deadline*/) {
    return std::numeric_limits<int64_t>::max();
  }
  // Sinks that keep rows on the device take them there, and not by Append: CopyOnDevice enqueues copies on
  // the main stream of the backend, and Publish follows, in the order of rows, once they have run.
  virtual bool on_device() const { return false; }
  virtual absl::Status CopyOnDevice(int64_t /*layer*/, int64_t /*row_begin*/, int64_t /*row_end*/,
                                    HeadsView<const void> /*key*/, HeadsView<const void> /*value*/) {
    return absl::InternalError("this KV sink keeps nothing on the device");
  }
  virtual absl::Status Publish(int64_t /*layer*/, int64_t /*row_begin*/, int64_t /*row_end*/) {
    return absl::InternalError("this KV sink keeps nothing on the device");
  }
  // OK: every layer was appended. Otherwise the reason for which nothing more comes; what was taken is
  // discarded.
  virtual absl::Status Finish(const absl::Status& outcome) = 0;
  // After Finish: CRC-32C over what was taken, where the sink keeps one (kv_discard_sink.h says in which
  // order).
  virtual std::optional<uint32_t> checksum() const { return std::nullopt; }
};

// Called on every rank after the plan is agreed and before any work. An error here is an error of the
// request; nullptr: K and V are not taken, and do not leave the device.
using KvSinkFactory = std::function<absl::StatusOr<std::unique_ptr<KvSink>>(const KvTransferSpec& spec)>;

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_SINK_H_
