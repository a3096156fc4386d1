#include "runtime/kv/kv_exporter.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

constexpr std::chrono::milliseconds kPollInterval{20};  // of should_stop

// Rows of one layer in device memory.
struct Rows {
  int64_t layer = 0;
  int64_t begin = 0, end = 0;
  HeadsView<const void> key, value;  // of row `begin` on
};

}  // namespace

struct KvExporter::Impl {
  Impl(Backend& backend_in, KvSink& sink_in, const Shape& shape_in, Patience patience_in)
      : backend(backend_in),
        sink(sink_in),
        shape(shape_in),
        patience(std::move(patience_in)),
        dtype(backend_in.kernels().compute_dtype()),
        direct(backend_in.kernels().device() == DeviceKind::kCpu),
        on_device(sink_in.on_device()) {}

  int64_t RowBytes() const { return shape.head_dim * DTypeBytes(dtype); }
  // One buffer of the ring: keys [num_kv_heads, rows, head_dim], then values.
  struct Slot {
    void* data = nullptr;
    std::unique_ptr<Event> arrived;
    Rows rows;  // views of `data` while it is in flight
  };
  struct Job {
    Rows rows;                  // what is still to be copied
    size_t ready = 0;           // index of the event in ready_events
    bool stream_waits = false;  // the copy stream has been told to wait for it
  };

  absl::Status Prepare(const std::vector<void*>& buffers);
  absl::StatusOr<size_t> RecordReady();
  absl::Status WaitUntil(std::unique_lock<std::mutex>& lock, const char* what, auto&& done);
  void Fail(const absl::Status& status);
  void Work();
  void IssueOne(std::unique_lock<std::mutex>& lock);
  void DropQueue();
  void HandOnOldest(std::unique_lock<std::mutex>& lock);
  void PublishFirst(std::unique_lock<std::mutex>& lock);
  absl::Status Append(Rows rows, const std::function<absl::Status()>& stop);
  absl::Status TakeDirectly(const Rows& rows);
  absl::Status Copy(const Rows& from, Slot& slot);
  absl::Status CollectExposed();
  absl::Status MainStreamWaits();
  absl::Status Finish(const absl::Status& outcome);

  Backend& backend;
  KvSink& sink;
  const Shape shape;
  const Patience patience;
  const DType dtype;
  const bool direct;                    // no thread, no copy to the host
  const bool on_device;                 // the sink keeps rows on the device
  int64_t piece_rows = 0;               // that fit a buffer
  std::unique_ptr<Stream> copy_stream;  // the worker's
  std::vector<Slot> slots;              // contents belong to the worker
  bool device_hangs = false;            // the worker's: a wait failed, copies may come at any time

  // Of the engine thread.
  std::unique_ptr<Event> before_wait, after_wait;
  bool wait_pending = false;  // they are recorded, the time between them is not added yet
  bool rows_given = false;    // since the last BeforeOverwrite
  double exposed_seconds = 0;
  absl::Status direct_error;
  bool finished = false;

  std::mutex mutex;  // a leaf
  std::condition_variable changed;
  std::deque<Job> queue;
  std::vector<std::unique_ptr<Event>> ready_events;
  std::vector<size_t> free_events;
  std::deque<size_t> in_flight;  // slots, oldest first
  std::vector<size_t> free_slots;
  const Event* last_copy = nullptr;  // recorded behind the last copy that was enqueued
  int64_t progress = 0;              // grows with every copy enqueued and every piece handed on
  bool closing = false;              // nothing more will be given
  bool ended = false;                // the worker has left
  absl::Status error;                // the first
  std::thread worker;                // last: uses all of the above
};

absl::Status KvExporter::Impl::Prepare(const std::vector<void*>& buffers) {
  LF_ASSIGN_OR_RETURN(copy_stream, backend.NewStream());
  LF_ASSIGN_OR_RETURN(before_wait, backend.NewEvent());
  LF_ASSIGN_OR_RETURN(after_wait, backend.NewEvent());
  slots.resize(buffers.size());
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i].data = buffers[i];
    LF_ASSIGN_OR_RETURN(slots[i].arrived, backend.NewEvent());
    free_slots.push_back(i);
  }
  return absl::OkStatus();
}

// Engine thread. An event that marks the present end of the main stream.
absl::StatusOr<size_t> KvExporter::Impl::RecordReady() {
  size_t index = 0;
  Event* event = nullptr;
  {
    std::lock_guard lock(mutex);
    LF_RETURN_IF_ERROR(error);
    if (free_events.empty()) {
      LF_ASSIGN_OR_RETURN(std::unique_ptr<Event> fresh, backend.NewEvent());
      free_events.push_back(ready_events.size());
      ready_events.push_back(std::move(fresh));
    }
    index = free_events.back();
    free_events.pop_back();
    event = ready_events[index].get();
  }
  if (absl::Status status = event->Record(backend.stream()); !status.ok()) {
    std::lock_guard lock(mutex);
    free_events.push_back(index);
    return status;
  }
  return index;
}

// Waits until done(); the deadline starts anew with every piece that moves on.
absl::Status KvExporter::Impl::WaitUntil(std::unique_lock<std::mutex>& lock, const char* what, auto&& done) {
  using Clock = std::chrono::steady_clock;
  int64_t seen = progress;
  Clock::time_point deadline = Clock::now() + patience.timeout;
  while (!changed.wait_for(lock, kPollInterval, done)) {
    if (progress != seen) {
      seen = progress;
      deadline = Clock::now() + patience.timeout;
    }
    if (Clock::now() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat(what, ": the KV sink has taken nothing for ", patience.timeout.count(), " ms"));
    }
    if (!patience.should_stop) continue;
    lock.unlock();
    const absl::Status stop = patience.should_stop();
    lock.lock();
    LF_RETURN_IF_ERROR(stop);
  }
  return absl::OkStatus();
}

// With the lock.
void KvExporter::Impl::Fail(const absl::Status& status) {
  if (error.ok()) error = status;
  changed.notify_all();
}

void KvExporter::Impl::Work() {
  std::unique_lock lock(mutex);
  while (true) {
    if (!error.ok()) DropQueue();
    if (!queue.empty() && on_device) {
      PublishFirst(lock);
    } else if (!queue.empty() && !free_slots.empty()) {
      IssueOne(lock);
    } else if (!in_flight.empty()) {
      HandOnOldest(lock);
    } else if (closing) {
      break;
    } else {
      changed.wait(lock, [this] { return closing || !queue.empty(); });
    }
  }
  ended = true;
  changed.notify_all();
}

void KvExporter::Impl::DropQueue() {
  for (const Job& job : queue) free_events.push_back(job.ready);
  queue.clear();
}

// The next piece of the first job to a free slot.
void KvExporter::Impl::IssueOne(std::unique_lock<std::mutex>& lock) {
  Job& job = queue.front();
  const Event* ready = job.stream_waits ? nullptr : ready_events[job.ready].get();
  job.stream_waits = true;
  Rows piece = job.rows;
  piece.end = std::min(piece.end, piece.begin + piece_rows);
  const int64_t offset = (piece.end - piece.begin) * shape.head_dim;
  job.rows.begin = piece.end;
  job.rows.key.data = Advance(job.rows.key.data, offset, dtype);
  job.rows.value.data = Advance(job.rows.value.data, offset, dtype);
  const size_t index = free_slots.back();
  free_slots.pop_back();
  Slot& slot = slots[index];
  lock.unlock();  // the engine only appends to the queue, whose front is the worker's
  absl::Status status = ready == nullptr ? absl::OkStatus() : copy_stream->WaitFor(*ready);
  if (status.ok()) status = Copy(piece, slot);
  lock.lock();
  ++progress;
  // Also after an error: some of the copies may be on their way.
  in_flight.push_back(index);
  last_copy = slot.arrived.get();
  if (!status.ok()) Fail(status);
  if (queue.front().rows.begin == queue.front().rows.end) {
    free_events.push_back(queue.front().ready);
    queue.pop_front();
  }
  changed.notify_all();
}

// Each head of a piece is one contiguous copy.
absl::Status KvExporter::Impl::Copy(const Rows& from, Slot& slot) {
  const int64_t rows = from.end - from.begin;
  const int64_t head_elements = rows * shape.head_dim;
  void* const keys = slot.data;
  void* const values = Advance(keys, shape.num_kv_heads * head_elements, dtype);
  slot.rows = {.layer = from.layer,
               .begin = from.begin,
               .end = from.end,
               .key = {keys, head_elements, shape.head_dim},
               .value = {values, head_elements, shape.head_dim}};
  const auto copy = [&](HeadsView<const void> view, void* to) -> absl::Status {
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      LF_RETURN_IF_ERROR(backend.kernels().CopyOut(Advance(to, head * head_elements, dtype),
                                                   Advance(view.data, head * view.head_stride, dtype),
                                                   rows * RowBytes(), *copy_stream));
    }
    return absl::OkStatus();
  };
  absl::Status status = copy(from.key, keys);
  if (status.ok()) status = copy(from.value, values);
  if (status.ok()) status = slot.arrived->Record(*copy_stream);
  // Without a mark behind them, copies that are under way are waited for here.
  if (!status.ok() && !copy_stream->Sync().ok()) device_hangs = true;
  return status;
}

// Waits for the copies of the oldest slot in any case, so that its buffer and the device memory are at rest.
// Of a device that hangs once is enough, and the slot is used no more.
void KvExporter::Impl::HandOnOldest(std::unique_lock<std::mutex>& lock) {
  const size_t index = in_flight.front();
  Slot& slot = slots[index];
  const bool drop = !error.ok();
  lock.unlock();
  absl::Status status;
  if (!device_hangs) {
    status = slot.arrived->Wait();
    device_hangs = !status.ok();
  }
  if (status.ok() && !drop) {
    status = Append(slot.rows, [this] {
      const std::lock_guard guard(mutex);
      return error;
    });
  }
  lock.lock();
  ++progress;
  in_flight.pop_front();
  if (!device_hangs) free_slots.push_back(index);
  if (!status.ok()) Fail(status);
  changed.notify_all();
}

// Rows that the sink has copied on the device, once the device has come to it.
void KvExporter::Impl::PublishFirst(std::unique_lock<std::mutex>& lock) {
  const Rows rows = queue.front().rows;
  const size_t ready = queue.front().ready;
  const Event* const copied = ready_events[ready].get();
  lock.unlock();  // the engine only appends to the queue, whose front is the worker's
  absl::Status status = copied->Wait();
  if (status.ok()) status = sink.Publish(rows.layer, rows.begin, rows.end);
  lock.lock();
  ++progress;
  queue.pop_front();
  free_events.push_back(ready);
  if (!status.ok()) Fail(status);
  changed.notify_all();
}

// Rows in host memory, as many at a time as the sink has room for; an error of `stop` ends the wait for more.
absl::Status KvExporter::Impl::Append(Rows rows, const std::function<absl::Status()>& stop) {
  while (rows.begin < rows.end) {
    LF_ASSIGN_OR_RETURN(const int64_t room,
                        sink.WaitForRoom(std::chrono::steady_clock::now() + kPollInterval));
    if (stop) LF_RETURN_IF_ERROR(stop());
    const int64_t taken = std::min(room, rows.end - rows.begin);
    if (taken == 0) continue;
    LF_RETURN_IF_ERROR(sink.Append(rows.layer, rows.begin, rows.begin + taken, rows.key, rows.value, dtype));
    rows.begin += taken;
    rows.key.data = Advance(rows.key.data, taken * rows.key.row_stride, dtype);
    rows.value.data = Advance(rows.value.data, taken * rows.value.row_stride, dtype);
    const std::lock_guard lock(mutex);
    ++progress;
  }
  return absl::OkStatus();
}

// Engine thread, on a CPU.
absl::Status KvExporter::Impl::TakeDirectly(const Rows& rows) {
  if (!on_device) return Append(rows, patience.should_stop);
  LF_RETURN_IF_ERROR(sink.CopyOnDevice(rows.layer, rows.begin, rows.end, rows.key, rows.value));
  return sink.Publish(rows.layer, rows.begin, rows.end);
}

absl::Status KvExporter::Impl::CollectExposed() {
  if (!wait_pending) return absl::OkStatus();
  wait_pending = false;
  LF_RETURN_IF_ERROR(after_wait->Wait());
  LF_ASSIGN_OR_RETURN(const double seconds, after_wait->SecondsSince(*before_wait));
  exposed_seconds += seconds;
  return absl::OkStatus();
}

// The time between the two events is that for which the stream had nothing to do but wait: for this thread
// while not every copy was enqueued, then for the last copy.
absl::Status KvExporter::Impl::MainStreamWaits() {
  LF_RETURN_IF_ERROR(CollectExposed());
  LF_RETURN_IF_ERROR(before_wait->Record(backend.stream()));
  const Event* last = nullptr;
  {
    std::unique_lock lock(mutex);
    LF_RETURN_IF_ERROR(
        WaitUntil(lock, "before K and V are written over", [this] { return queue.empty() || !error.ok(); }));
    LF_RETURN_IF_ERROR(error);
    last = last_copy;
  }
  // Not recorded anew before the next OnKv.
  LF_RETURN_IF_ERROR(backend.stream().WaitFor(*last));
  LF_RETURN_IF_ERROR(after_wait->Record(backend.stream()));
  wait_pending = true;
  return absl::OkStatus();
}

absl::Status KvExporter::Impl::Finish(const absl::Status& outcome) {
  if (direct) {
    if (direct_error.ok()) direct_error = outcome;
    return direct_error;
  }
  if (!finished) {
    finished = true;
    // Only what comes after the last compute is time that copies cost.
    const absl::Status computed = outcome.ok() ? backend.stream().Sync() : outcome;
    const auto start = std::chrono::steady_clock::now();
    std::unique_lock lock(mutex);
    if (!computed.ok()) Fail(computed);
    closing = true;
    changed.notify_all();
    const absl::Status waited = WaitUntil(lock, "at the end of the prompt", [this] { return ended; });
    if (!waited.ok()) Fail(waited);
    exposed_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  // A sink returns within a deadline of its own; until then its buffer and this object are in use.
  if (worker.joinable()) worker.join();
  const absl::Status exposed = CollectExposed();
  std::lock_guard lock(mutex);
  if (error.ok()) error = exposed;
  return error;
}

KvExporter::KvExporter(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

KvExporter::~KvExporter() { Finish(absl::CancelledError("the KV export was dropped")).IgnoreError(); }

absl::StatusOr<KvRing> KvRing::Allocate(Backend& backend, const KvExportOptions& options) {
  KvRing ring;
  if (backend.kernels().device() == DeviceKind::kCpu) return ring;
  if (options.num_buffers < 1 || options.buffer_bytes < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("KV export: ", options.num_buffers, " buffers of ", options.buffer_bytes, " bytes"));
  }
  ring.buffer_bytes_ = options.buffer_bytes;
  for (int i = 0; i < options.num_buffers; ++i) {
    LF_ASSIGN_OR_RETURN(Buffer buffer, backend.host_memory().Allocate(options.buffer_bytes,
                                                                      "a page-locked buffer of KV copies"));
    ring.buffers_.push_back(std::move(buffer));
  }
  return ring;
}

int64_t KvRing::PlanBytes(DeviceKind device, const KvExportOptions& options) {
  return device == DeviceKind::kCpu ? 0 : options.num_buffers * options.buffer_bytes;
}

absl::StatusOr<std::unique_ptr<KvExporter>> KvExporter::Create(Backend& backend, KvRing& ring, KvSink& sink,
                                                               const Shape& shape, Patience patience) {
  auto impl = std::make_unique<Impl>(backend, sink, shape, std::move(patience));
  if (!impl->direct) {
    const int64_t row_bytes = 2 * shape.num_kv_heads * impl->RowBytes();
    impl->piece_rows = ring.buffer_bytes_ / row_bytes;
    if (ring.buffers_.empty() || impl->piece_rows < 1) {
      return absl::InvalidArgumentError(absl::StrCat(
          "KV export: ", ring.buffers_.size(), " buffers of ", ring.buffer_bytes_,
          " bytes; one row of keys and values of ", shape.num_kv_heads, " heads takes ", row_bytes));
    }
    std::vector<void*> buffers;
    for (const Buffer& buffer : ring.buffers_) buffers.push_back(buffer.data());
    LF_RETURN_IF_ERROR(impl->Prepare(buffers));
    impl->worker = std::thread([raw = impl.get()] { raw->Work(); });
  }
  return std::unique_ptr<KvExporter>(new KvExporter(std::move(impl)));
}

absl::Status KvExporter::OnKv(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                              HeadsView<const void> value) {
  Impl& impl = *impl_;
  if (impl.direct) {
    if (!impl.direct_error.ok()) return impl.direct_error;
    impl.direct_error =
        impl.TakeDirectly({.layer = layer, .begin = row_begin, .end = row_end, .key = key, .value = value});
    return impl.direct_error;
  }
  if (key.row_stride != impl.shape.head_dim || value.row_stride != impl.shape.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat("KV export: rows lie ", key.row_stride, " and ",
                                                   value.row_stride, " elements apart, head_dim is ",
                                                   impl.shape.head_dim));
  }
  if (row_begin == row_end) return absl::OkStatus();
  if (impl.on_device) {
    if (const absl::Status status = impl.sink.CopyOnDevice(layer, row_begin, row_end, key, value);
        !status.ok()) {
      const std::lock_guard lock(impl.mutex);
      impl.Fail(status);
    }
  }
  LF_ASSIGN_OR_RETURN(const size_t ready, impl.RecordReady());
  impl.rows_given = !impl.on_device;  // copies on the device are in the order of the main stream
  {
    std::lock_guard lock(impl.mutex);
    impl.queue.push_back(
        {.rows = {.layer = layer, .begin = row_begin, .end = row_end, .key = key, .value = value},
         .ready = ready});
  }
  impl.changed.notify_all();
  return absl::OkStatus();
}

absl::Status KvExporter::BeforeOverwrite() {
  if (impl_->direct) return impl_->direct_error;
  if (!std::exchange(impl_->rows_given, false)) return absl::OkStatus();
  return impl_->MainStreamWaits();
}

absl::Status KvExporter::Finish(const absl::Status& outcome) { return impl_->Finish(outcome); }

double KvExporter::exposed_seconds() const { return impl_->exposed_seconds; }

}  // namespace longfill
