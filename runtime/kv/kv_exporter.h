#ifndef LONGFILL_RUNTIME_KV_KV_EXPORTER_H_
#define LONGFILL_RUNTIME_KV_KV_EXPORTER_H_

// K and V of one rank and one prompt on their way from the device to a KvSink, while later layers compute.
//
//   engine thread    OnKv: records an event in the main stream, puts the rows into a queue
//   worker thread    the copy stream waits for that event, then copies pieces into page-locked buffers, as
//                    many as are free; whatever has arrived goes to the sink, in order, and frees its buffer
//   engine thread    BeforeOverwrite, once a layer: the main stream waits for the copies of the layer before
//
// So neither a slow sink nor a slow bus stalls the device until the ring is full and the next layer wants to
// write where the last one has not left. For a sink that keeps rows on the device OnKv has it enqueue its
// copies in the main stream, and the worker publishes them once they have run; the ring is not used. On a CPU
// backend OnKv calls the sink itself, and waits for its room: no thread, no copy.

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/api/kernel_set.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "runtime/kv/kv_sink.h"

namespace longfill {

struct KvExportOptions {
  int num_buffers = 4;
  int64_t buffer_bytes = int64_t{32} << 20;  // keys and values of one piece
  // Of every wait: for an event of the device, and for a sink that must take a piece first. Less than the
  // timeout of a communicator, so that a stuck sink is an error that ranks agree on.
  std::chrono::milliseconds timeout{60000};
};

// The page-locked buffers, kept from one prompt to the next: locking pages takes longer than a short prompt.
class KvRing {
 public:
  // From backend.host_memory(), which outlives the ring; nothing on a CPU.
  static absl::StatusOr<KvRing> Allocate(Backend& backend, const KvExportOptions& options);
  static int64_t PlanBytes(DeviceKind device, const KvExportOptions& options);

 private:
  friend class KvExporter;
  std::vector<Buffer> buffers_;
  int64_t buffer_bytes_ = 0;
};

class KvExporter {
 public:
  // What is exported: views of [num_kv_heads, rows, head_dim] in the backend's compute dtype.
  struct Shape {
    int64_t num_kv_heads = 0;
    int64_t head_dim = 0;
  };
  // What ends a wait of the engine thread: no progress for so long, or an error of should_stop (may be
  // empty).
  struct Patience {
    std::chrono::milliseconds timeout{60000};
    std::function<absl::Status()> should_stop;
  };

  // `backend`, `ring`, which no other exporter uses, and `sink` outlive the exporter. InvalidArgument where
  // one row of all heads is larger than a buffer.
  static absl::StatusOr<std::unique_ptr<KvExporter>> Create(Backend& backend, KvRing& ring, KvSink& sink,
                                                            const Shape& shape, Patience patience);
  // Drops what has not been copied, as Finish does after an error.
  ~KvExporter();
  KvExporter(const KvExporter&) = delete;
  KvExporter& operator=(const KvExporter&) = delete;

  // Keys and values of local rows [row_begin, row_end) of a layer, in order; final once the work that was
  // given to backend.stream() before this call has run. They stay as they are until BeforeOverwrite has
  // returned. Does not wait for the device. The first error of the sink or of the device comes back from here
  // and from every later call.
  absl::Status OnKv(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                    HeadsView<const void> value);

  // What backend.stream() runs from here on may write over all that was given to OnKv. Blocks until every
  // copy has been enqueued, so for a sink that holds the whole ring; DeadlineExceeded if that sink takes
  // nothing for the timeout, or what should_stop says.
  absl::Status BeforeOverwrite();

  // OK: waits until the sink has everything. An error: drops what is not on its way yet, and waits for what
  // is. Afterwards the device memory given to OnKv is no longer read, and the sink no longer called; it is
  // for the caller to finish. Returns the first error, `outcome` itself if there was none before. Idempotent.
  absl::Status Finish(const absl::Status& outcome);

  // Time for which the main stream stood still: in BeforeOverwrite, and in a Finish that had to wait.
  // Complete after Finish.
  double exposed_seconds() const;

 private:
  struct Impl;
  explicit KvExporter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_EXPORTER_H_
