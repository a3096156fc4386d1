// All layers in memory of the device, in its compute dtype. Readers copy through a few buffers in host
// memory.

#include <algorithm>
#include <array>
#include <condition_variable>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/kv/kv_tier.h"
#include "runtime/kv/kv_tier_plan.h"
#include "runtime/kv/region_memory.h"

namespace longfill {
namespace {

// A buffer in host memory and a stream to copy to it; each is used by one reader at a time.
class ReadBuffers {
 public:
  struct Slot {
    Buffer host;
    std::unique_ptr<Stream> stream;
  };
  // Gives the slot back.
  class Lease {
   public:
    Lease(ReadBuffers* owner, Slot* slot) : owner_(owner), slot_(slot) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { owner_->Return(slot_); }
    Slot* operator->() const { return slot_; }

   private:
    ReadBuffers* const owner_;
    Slot* const slot_;
  };

  absl::Status Prepare(Backend& backend) {
    for (Slot& slot : slots_) {
      LF_ASSIGN_OR_RETURN(slot.host, backend.host_memory().Allocate(
                                         kReadBufferBytes, "KV on the device: a buffer of its readers"));
      LF_ASSIGN_OR_RETURN(slot.stream, backend.NewStream());
      free_.push_back(&slot);
    }
    return absl::OkStatus();
  }
  // Waits until one is free: as long as others take to copy one page.
  Lease Take() {
    std::unique_lock lock(mutex_);
    returned_.wait(lock, [this] { return !free_.empty(); });
    Slot* const slot = free_.back();
    free_.pop_back();
    return {this, slot};
  }

 private:
  void Return(Slot* slot) {
    {
      const std::lock_guard lock(mutex_);
      free_.push_back(slot);
    }
    returned_.notify_one();
  }

  std::array<Slot, kNumReadBuffers> slots_;
  std::mutex mutex_;  // a leaf
  std::condition_variable returned_;
  std::vector<Slot*> free_;
};

class DevicePages final : public KvPages {
 public:
  // Keys and values of a layer, [num_kv_heads, num_rows, head_dim] of the compute dtype each.
  struct Layer {
    Buffer key, value;
  };

  DevicePages(Backend& backend, ReadBuffers& buffers, const KvTransferSpec& spec, std::vector<Layer> layers)
      : backend_(backend),
        buffers_(buffers),
        spec_(spec),
        num_rows_(spec.plan.NumTokens(spec.rank)),
        dtype_(backend.kernels().compute_dtype()),
        layers_(std::move(layers)) {}

  int64_t bytes() const override {
    return 2 * spec_.num_layers * spec_.num_kv_heads * num_rows_ * RowBytes();
  }

  bool on_device() const override { return true; }
  absl::Status Write(int64_t, int64_t, int64_t, HeadsView<const void>, HeadsView<const void>,
                     DType) override {
    return absl::InternalError("KV on the device: rows came in host memory");
  }

  absl::Status WriteOnDevice(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                             HeadsView<const void> value) override {
    const Layer& to = layers_[static_cast<size_t>(layer)];
    LF_RETURN_IF_ERROR(Put(key, row_begin, row_end, to.key));
    return Put(value, row_begin, row_end, to.value);
  }

  absl::Status Read(int64_t layer, int64_t row_begin, const KvPageShape& page, std::byte* key,
                    std::byte* value) const override {
    const Layer& from = layers_[static_cast<size_t>(layer)];
    if (backend_.kernels().device() == DeviceKind::kCpu) {
      PackRows(Rows(from.key, row_begin), dtype_, page.num_rows, page, 0, key);
      PackRows(Rows(from.value, row_begin), dtype_, page.num_rows, page, 0, value);
      return absl::OkStatus();
    }
    const int64_t most = kReadBufferBytes / (2 * page.num_heads * RowBytes());
    const ReadBuffers::Lease slot = buffers_.Take();
    for (int64_t done = 0; done < page.num_rows;) {
      const int64_t rows = std::min(most, page.num_rows - done);
      auto* const host_key = slot->host.as<std::byte>();
      auto* const host_value = host_key + page.num_heads * rows * RowBytes();
      absl::Status status = CopyOut(from.key, page, row_begin + done, rows, host_key, *slot->stream);
      if (status.ok()) status = CopyOut(from.value, page, row_begin + done, rows, host_value, *slot->stream);
      // Also after an error: the buffer must be at rest before another reader takes it.
      const absl::Status arrived = slot->stream->Sync();
      LF_RETURN_IF_ERROR(status);
      LF_RETURN_IF_ERROR(arrived);
      KvPageShape copied = page;
      copied.head_begin = 0;  // the buffer has the page's heads only
      const int64_t head_stride = rows * spec_.head_dim;
      PackRows({host_key, head_stride, spec_.head_dim}, dtype_, rows, copied, done, key);
      PackRows({host_value, head_stride, spec_.head_dim}, dtype_, rows, copied, done, value);
      done += rows;
    }
    return absl::OkStatus();
  }

 private:
  int64_t RowBytes() const { return spec_.head_dim * DTypeBytes(dtype_); }
  HeadsView<const void> Rows(const Buffer& buffer, int64_t row) const {
    return {buffer.as<std::byte>() + row * RowBytes(), num_rows_ * spec_.head_dim, spec_.head_dim};
  }

  absl::Status Put(HeadsView<const void> from, int64_t row_begin, int64_t row_end, const Buffer& to) const {
    for (int64_t head = 0; head < spec_.num_kv_heads; ++head) {
      LF_RETURN_IF_ERROR(
          backend_.kernels().Copy2D({.to = to.as<std::byte>() + (head * num_rows_ + row_begin) * RowBytes(),
                                     .to_pitch = RowBytes(),
                                     .from = Advance(from.data, head * from.head_stride, dtype_),
                                     .from_pitch = from.row_stride * DTypeBytes(dtype_),
                                     .row_bytes = RowBytes(),
                                     .rows = row_end - row_begin},
                                    backend_.stream()));
    }
    return absl::OkStatus();
  }

  // The page's heads, one behind the other.
  absl::Status CopyOut(const Buffer& from, const KvPageShape& page, int64_t row_begin, int64_t rows,
                       std::byte* to, Stream& stream) const {
    for (int64_t head = 0; head < page.num_heads; ++head) {
      const int64_t first = (page.head_begin + head) * num_rows_ + row_begin;
      LF_RETURN_IF_ERROR(backend_.kernels().CopyOut(to + head * rows * RowBytes(),
                                                    from.as<std::byte>() + first * RowBytes(),
                                                    rows * RowBytes(), stream));
    }
    return absl::OkStatus();
  }

  Backend& backend_;
  ReadBuffers& buffers_;
  const KvTransferSpec spec_;
  const int64_t num_rows_;
  const DType dtype_;
  const std::vector<Layer> layers_;
};

class DeviceTier final : public KvTier {
 public:
  DeviceTier(Backend& backend, Buffer region) : backend_(backend), memory_(std::move(region)) {}
  absl::Status Prepare() { return buffers_.Prepare(backend_); }

  absl::StatusOr<std::unique_ptr<KvPages>> Open(const KvTransferSpec& spec) override {
    KvPromptShape shape = ShapeOf(spec);
    shape.compute_dtype = backend_.kernels().compute_dtype();
    const int64_t row_bytes = 2 * spec.num_kv_heads * spec.head_dim * DTypeBytes(shape.compute_dtype);
    if (row_bytes > kReadBufferBytes) {
      return absl::InvalidArgumentError(absl::StrCat("KV on the device: one row of keys and values takes ",
                                                     row_bytes, " bytes, a buffer of its readers has ",
                                                     kReadBufferBytes));
    }
    const int64_t half = spec.num_kv_heads * shape.num_rows * spec.head_dim * DTypeBytes(shape.compute_dtype);
    std::vector<DevicePages::Layer> layers(static_cast<size_t>(spec.num_layers));
    for (DevicePages::Layer& layer : layers) {
      LF_ASSIGN_OR_RETURN(layer.key, memory_.Allocate(half, "KV on the device: keys of a layer"));
      LF_ASSIGN_OR_RETURN(layer.value, memory_.Allocate(half, "KV on the device: values of a layer"));
    }
    return std::make_unique<DevicePages>(backend_, buffers_, spec, std::move(layers));
  }

 private:
  Backend& backend_;
  // Parts of it are written in the order of the main stream, so one that is given out again is not written by
  // a transfer that had it before.
  RegionMemoryResource memory_;
  ReadBuffers buffers_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<KvTier>> MakeDeviceTier(Backend& backend, int64_t budget_bytes) {
  LF_ASSIGN_OR_RETURN(Buffer region,
                      backend.memory().Allocate(budget_bytes, "the budget of KV on the device"));
  // So that a CPU, whose memory is taken when it is first written to, has it too.
  LF_RETURN_IF_ERROR(backend.kernels().Zero(region.data(), budget_bytes, backend.stream()));
  LF_RETURN_IF_ERROR(backend.stream().Sync());
  auto tier = std::make_unique<DeviceTier>(backend, std::move(region));
  if (backend.kernels().device() != DeviceKind::kCpu) LF_RETURN_IF_ERROR(tier->Prepare());
  return tier;
}

}  // namespace longfill
