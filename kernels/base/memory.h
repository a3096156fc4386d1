#ifndef LONGFILL_KERNELS_BASE_MEMORY_H_
#define LONGFILL_KERNELS_BASE_MEMORY_H_

#include <atomic>
#include <cstdint>
#include <string_view>

#include "kernels/base/status.h"

namespace longfill {

class MemoryResource;

// Owner of one allocation; move-only, returns the bytes to its resource. The resource outlives it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  void* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  friend class MemoryResource;
  Buffer(void* data, int64_t size_bytes, MemoryResource* resource)
      : data_(data), size_bytes_(size_bytes), resource_(resource) {}
  void* data_ = nullptr;
  int64_t size_bytes_ = 0;
  MemoryResource* resource_ = nullptr;
};

// Where the memory of one device comes from, and the account of it. Thread-safe.
class MemoryResource {
 public:
  virtual ~MemoryResource() = default;

  // Alignment 64 bytes, contents undefined. 0 bytes is legal and gives an empty buffer. ResourceExhausted
  // names `what`, the bytes asked and the bytes in use; InvalidArgument for a negative size; Internal where
  // the device is lost.
  absl::StatusOr<Buffer> Allocate(int64_t size_bytes, std::string_view what);

  // Bytes that the resource holds of the device beyond bytes_in_use(), for later allocations.
  virtual absl::StatusOr<int64_t> IdleBytes() const { return 0; }
  // Gives them back, so that others who share the device can have them. The work that used them has run.
  virtual absl::Status Trim() { return absl::OkStatus(); }

  int64_t bytes_in_use() const { return bytes_in_use_.load(std::memory_order_relaxed); }
  int64_t peak_bytes() const { return peak_bytes_.load(std::memory_order_relaxed); }
  // Most bytes that the resource held since ResetPeak, those for later allocations included, as the device's
  // own account says.
  virtual absl::StatusOr<int64_t> PeakHeldBytes() const { return peak_bytes(); }
  virtual void ResetPeak() { peak_bytes_.store(bytes_in_use()); }

 protected:
  // DoAllocate returns nullptr when the memory is not there, or for the reason that DeviceHealth then gives.
  virtual void* DoAllocate(int64_t size_bytes) = 0;
  virtual absl::Status DeviceHealth() const { return absl::OkStatus(); }
  virtual void DoDeallocate(void* data, int64_t size_bytes) = 0;

 private:
  friend class Buffer;
  void Deallocate(void* data, int64_t size_bytes);
  std::atomic<int64_t> bytes_in_use_{0};
  std::atomic<int64_t> peak_bytes_{0};
};

// Host memory. Allocations beyond `limit_bytes` in all (0: no limit) fail.
class CpuMemoryResource final : public MemoryResource {
 public:
  explicit CpuMemoryResource(int64_t limit_bytes = 0) : limit_bytes_(limit_bytes) {}

 private:
  void* DoAllocate(int64_t size_bytes) override;
  void DoDeallocate(void* data, int64_t size_bytes) override;
  const int64_t limit_bytes_;
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_BASE_MEMORY_H_
