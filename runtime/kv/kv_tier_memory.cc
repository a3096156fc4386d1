// All layers in memory that the host reads.

#include <utility>
#include <vector>

#include "runtime/kv/kv_convert.h"
#include "runtime/kv/kv_tier.h"

namespace longfill {
namespace {

class MemoryPages final : public KvPages {
 public:
  // Keys and values of a layer, [num_kv_heads, num_rows, head_dim] of the spec's dtype each.
  struct Layer {
    Buffer key, value;
  };

  MemoryPages(const KvTransferSpec& spec, std::vector<Layer> layers)
      : spec_(spec), num_rows_(spec.plan.NumTokens(spec.rank)), layers_(std::move(layers)) {}

  int64_t bytes() const override { return spec_.OwnedBytes(); }

  absl::Status Write(int64_t layer, int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                     HeadsView<const void> value, DType dtype) override {
    const Layer& to = layers_[static_cast<size_t>(layer)];
    Put(key, dtype, row_begin, row_end, to.key);
    Put(value, dtype, row_begin, row_end, to.value);
    return absl::OkStatus();
  }

  absl::Status WriteOnDevice(int64_t, int64_t, int64_t, HeadsView<const void>,
                             HeadsView<const void>) override {
    return absl::InternalError("KV store: rows came in memory of the device");
  }

  absl::Status Read(int64_t layer, int64_t row_begin, const KvPageShape& page, std::byte* key,
                    std::byte* value) const override {
    const Layer& from = layers_[static_cast<size_t>(layer)];
    PackRows(From(from.key, row_begin), spec_.dtype, page.num_rows, page, 0, key);
    PackRows(From(from.value, row_begin), spec_.dtype, page.num_rows, page, 0, value);
    return absl::OkStatus();
  }

 private:
  void Put(HeadsView<const void> from, DType dtype, int64_t row_begin, int64_t row_end,
           const Buffer& to) const {
    const int64_t row_bytes = spec_.head_dim * DTypeBytes(spec_.dtype);
    for (int64_t head = 0; head < spec_.num_kv_heads; ++head) {
      ConvertHeadRows(from, dtype, head, row_end - row_begin, spec_.head_dim, spec_.dtype,
                      to.as<std::byte>() + (head * num_rows_ + row_begin) * row_bytes);
    }
  }
  HeadsView<const void> From(const Buffer& buffer, int64_t row) const {
    return {buffer.as<std::byte>() + row * spec_.head_dim * DTypeBytes(spec_.dtype),
            num_rows_ * spec_.head_dim, spec_.head_dim};
  }

  const KvTransferSpec spec_;
  const int64_t num_rows_;
  const std::vector<Layer> layers_;
};

class MemoryTier final : public KvTier {
 public:
  explicit MemoryTier(MemoryResource* memory) : memory_(memory) {}

  absl::StatusOr<std::unique_ptr<KvPages>> Open(const KvTransferSpec& spec) override {
    const int64_t half = spec.OwnedBytes() / spec.num_layers / 2;
    std::vector<MemoryPages::Layer> layers(static_cast<size_t>(spec.num_layers));
    for (MemoryPages::Layer& layer : layers) {
      LF_ASSIGN_OR_RETURN(layer.key, memory_->Allocate(half, "KV store: keys of a layer"));
      LF_ASSIGN_OR_RETURN(layer.value, memory_->Allocate(half, "KV store: values of a layer"));
    }
    return std::make_unique<MemoryPages>(spec, std::move(layers));
  }

 private:
  MemoryResource* const memory_;
};

}  // namespace

std::unique_ptr<KvTier> MakeMemoryTier(MemoryResource* memory) {
  return std::make_unique<MemoryTier>(memory);
}

}  // namespace longfill
