#include "runtime/kv/kv_discard_sink.h"

#include <array>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/kv/crc32c.h"

namespace longfill {
namespace {

class KvDiscardSink final : public KvSink {
 public:
  explicit KvDiscardSink(KvTransferSpec spec)
      : spec_(std::move(spec)),
        num_rows_(spec_.plan.NumTokens(spec_.rank)),
        head_checksums_(static_cast<size_t>(2 * spec_.num_kv_heads)) {}

  absl::Status Append(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                      HeadsView<const void> value, DType dtype) override {
    if (row_begin == row_end) return absl::OkStatus();
    if (layer != layer_ || row_begin != rows_ || row_end > num_rows_) {
      return absl::InternalError(absl::StrCat("KV discard: rows [", row_begin, ", ", row_end, ") of layer ",
                                              layer, " came, row ", rows_, " of layer ", layer_, " is next"));
    }
    for (int64_t head = 0; head < spec_.num_kv_heads; ++head) {
      Add(key, head, row_end - row_begin, dtype, &head_checksums_[static_cast<size_t>(head)]);
      Add(value, head, row_end - row_begin, dtype,
          &head_checksums_[static_cast<size_t>(spec_.num_kv_heads + head)]);
    }
    rows_ = row_end;
    if (rows_ == num_rows_) EndLayer();
    return absl::OkStatus();
  }

  absl::Status Finish(const absl::Status& outcome) override {
    if (!outcome.ok() || num_rows_ == 0 || layer_ == spec_.num_layers) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("KV discard: the prefill finished with ", layer_, " of ",
                                            spec_.num_layers, " layers appended"));
  }

  std::optional<uint32_t> checksum() const override { return checksum_; }

 private:
  void Add(HeadsView<const void> view, int64_t head, int64_t rows, DType dtype, uint32_t* crc) const {
    const void* from = Advance(view.data, head * view.head_stride, dtype);
    const int64_t row_bytes = spec_.head_dim * DTypeBytes(dtype);
    if (view.row_stride == spec_.head_dim) {
      *crc = Crc32c(from, rows * row_bytes, *crc);
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      *crc = Crc32c(Advance(from, row * view.row_stride, dtype), row_bytes, *crc);
    }
  }

  void EndLayer() {
    for (uint32_t& crc : head_checksums_) {
      const std::array<uint8_t, 4> bytes = {static_cast<uint8_t>(crc), static_cast<uint8_t>(crc >> 8),
                                            static_cast<uint8_t>(crc >> 16), static_cast<uint8_t>(crc >> 24)};
      checksum_ = Crc32c(bytes.data(), bytes.size(), checksum_);
      crc = 0;
    }
    ++layer_;
    rows_ = 0;
  }

  const KvTransferSpec spec_;
  const int64_t num_rows_;
  int64_t layer_ = 0;
  int64_t rows_ = 0;                      // of layer_
  std::vector<uint32_t> head_checksums_;  // of layer_: keys of all heads, then values
  uint32_t checksum_ = 0;
};

}  // namespace

KvSinkFactory MakeKvDiscardSinkFactory() {
  return [](const KvTransferSpec& spec) -> absl::StatusOr<std::unique_ptr<KvSink>> {
    return std::make_unique<KvDiscardSink>(spec);
  };
}

}  // namespace longfill
