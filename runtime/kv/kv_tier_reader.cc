// Rows that wait for their reader, in a ring. Row r of layer l is number l * rows + r of the transfer and
// lies at that number modulo the rows of the ring.

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/kv/kv_convert.h"
#include "runtime/kv/kv_tier.h"
#include "runtime/kv/kv_tier_plan.h"

namespace longfill {
namespace {

class RingPages final : public KvPages {
 public:
  RingPages(const KvTransferSpec& spec, int64_t ring_rows, Buffer key, Buffer value)
      : spec_(spec),
        num_rows_(spec.plan.NumTokens(spec.rank)),
        ring_rows_(ring_rows),
        key_(std::move(key)),
        value_(std::move(value)) {}

  int64_t bytes() const override { return key_.size_bytes() + value_.size_bytes(); }
  int64_t ring_rows() const override { return ring_rows_; }

  absl::Status Write(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                     HeadsView<const void> value, DType dtype) override {
    ForSpans(layer, row_begin, row_end - row_begin, [&](int64_t done, int64_t place, int64_t rows) {
      Put(key, dtype, done, rows, place, key_);
      Put(value, dtype, done, rows, place, value_);
    });
    return absl::OkStatus();
  }

  absl::Status WriteOnDevice(int64_t, int64_t, int64_t, HeadsView<const void>,
                             HeadsView<const void>) override {
    return absl::InternalError("KV store: rows came in memory of the device");
  }

  absl::Status Read(int64_t layer, int64_t row_begin, const KvPageShape& page, std::byte* key,
                    std::byte* value) const override {
    ForSpans(layer, row_begin, page.num_rows, [&](int64_t done, int64_t place, int64_t rows) {
      PackRows(From(key_, place), spec_.dtype, rows, page, done, key);
      PackRows(From(value_, place), spec_.dtype, rows, page, done, value);
    });
    return absl::OkStatus();
  }

 private:
  // body(rows done before, place in the ring, rows) for the parts of the rows that lie together.
  template <typename Body>
  void ForSpans(int64_t layer, int64_t row_begin, int64_t num_rows, const Body& body) const {
    for (int64_t done = 0; done < num_rows;) {
      const int64_t place = (layer * num_rows_ + row_begin + done) % ring_rows_;
      const int64_t rows = std::min(num_rows - done, ring_rows_ - place);
      body(done, place, rows);
      done += rows;
    }
  }
  int64_t RowBytes() const { return spec_.head_dim * DTypeBytes(spec_.dtype); }
  void Put(HeadsView<const void> from, DType dtype, int64_t from_row, int64_t rows, int64_t place,
           const Buffer& to) const {
    from.data = Advance(from.data, from_row * from.row_stride, dtype);
    for (int64_t head = 0; head < spec_.num_kv_heads; ++head) {
      ConvertHeadRows(from, dtype, head, rows, spec_.head_dim, spec_.dtype,
                      to.as<std::byte>() + (head * ring_rows_ + place) * RowBytes());
    }
  }
  HeadsView<const void> From(const Buffer& buffer, int64_t place) const {
    return {buffer.as<std::byte>() + place * RowBytes(), ring_rows_ * spec_.head_dim, spec_.head_dim};
  }

  const KvTransferSpec spec_;
  const int64_t num_rows_;
  const int64_t ring_rows_;
  const Buffer key_, value_;  // [num_kv_heads, ring_rows, head_dim]
};

class ReaderTier final : public KvTier {
 public:
  ReaderTier(MemoryResource* memory, int64_t ring_bytes) : memory_(memory), ring_bytes_(ring_bytes) {}

  absl::StatusOr<std::unique_ptr<KvPages>> Open(const KvTransferSpec& spec) override {
    const int64_t rows = ReaderRingRows(ring_bytes_, ShapeOf(spec));
    const int64_t half = rows * spec.num_kv_heads * spec.head_dim * DTypeBytes(spec.dtype);
    LF_ASSIGN_OR_RETURN(Buffer key, memory_->Allocate(half, "KV ring: keys that wait for their reader"));
    LF_ASSIGN_OR_RETURN(Buffer value, memory_->Allocate(half, "KV ring: values that wait for their reader"));
    return std::make_unique<RingPages>(spec, rows, std::move(key), std::move(value));
  }

 private:
  MemoryResource* const memory_;
  const int64_t ring_bytes_;
};

}  // namespace

std::unique_ptr<KvTier> MakeReaderTier(MemoryResource* memory, int64_t ring_bytes) {
  return std::make_unique<ReaderTier>(memory, ring_bytes);
}

}  // namespace longfill
