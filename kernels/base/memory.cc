#include "kernels/base/memory.h"

#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {
constexpr int64_t kAlignment = 64;
int64_t RoundUp(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
}  // namespace

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_bytes_(std::exchange(other.size_bytes_, 0)),
      resource_(std::exchange(other.resource_, nullptr)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    Buffer dying(std::move(*this));
    data_ = std::exchange(other.data_, nullptr);
    size_bytes_ = std::exchange(other.size_bytes_, 0);
    resource_ = std::exchange(other.resource_, nullptr);
  }
  return *this;
}

Buffer::~Buffer() {
  if (resource_ != nullptr) resource_->Deallocate(data_, size_bytes_);
}

absl::StatusOr<Buffer> MemoryResource::Allocate(int64_t size_bytes, std::string_view what) {
  const absl::string_view name(what.data(), what.size());
  if (size_bytes < 0) {
    return absl::InvalidArgumentError(absl::StrCat("allocation of ", size_bytes, " bytes for ", name));
  }
  if (size_bytes == 0) return Buffer();
  void* data = DoAllocate(size_bytes);
  if (data == nullptr) {
    LF_RETURN_IF_ERROR(Annotate(DeviceHealth(), absl::StrCat("no memory for ", name)));
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for ", name, ": ", size_bytes, " bytes asked, ", bytes_in_use(), " in use"));
  }
  const int64_t in_use = bytes_in_use_.fetch_add(size_bytes) + size_bytes;
  int64_t peak = peak_bytes_.load();
  while (in_use > peak && !peak_bytes_.compare_exchange_weak(peak, in_use)) {
  }
  return Buffer(data, size_bytes, this);
}

void MemoryResource::Deallocate(void* data, int64_t size_bytes) {
  DoDeallocate(data, size_bytes);
  bytes_in_use_.fetch_sub(size_bytes);
}

void* CpuMemoryResource::DoAllocate(int64_t size_bytes) {
  // Concurrent allocations may pass the test together; the limit guards against mistakes by orders, not
  // bytes.
  if (limit_bytes_ > 0 && bytes_in_use() + size_bytes > limit_bytes_) return nullptr;
  return std::aligned_alloc(kAlignment, static_cast<size_t>(RoundUp(size_bytes)));
}

void CpuMemoryResource::DoDeallocate(void* data, int64_t /*size_bytes*/) { std::free(data); }

}  // namespace longfill
