#ifndef LONGFILL_KERNELS_CUDA_CUDA_MEMORY_H_
#define LONGFILL_KERNELS_CUDA_CUDA_MEMORY_H_

#include <cuda_runtime_api.h>

#include <memory>

#include "kernels/base/memory.h"
#include "kernels/base/status.h"

namespace longfill {

// Device memory from a pool of its own, in the order of one stream: an allocation is there for work of that
// stream, a freed one is handed out again to work that comes later in it. What was freed stays with the pool
// until an allocation would fail without it.
class CudaMemoryResource final : public MemoryResource {
 public:
  // `stream` outlives the result.
  static absl::StatusOr<std::unique_ptr<CudaMemoryResource>> Create(int device, cudaStream_t stream);
  ~CudaMemoryResource() override;
  CudaMemoryResource(const CudaMemoryResource&) = delete;
  CudaMemoryResource& operator=(const CudaMemoryResource&) = delete;

  absl::StatusOr<int64_t> IdleBytes() const override;
  absl::Status Trim() override;
  absl::StatusOr<int64_t> PeakHeldBytes() const override;
  void ResetPeak() override;

 private:
  CudaMemoryResource(int device, cudaStream_t stream, cudaMemPool_t pool)
      : device_(device), stream_(stream), pool_(pool) {}
  void* DoAllocate(int64_t size_bytes) override;
  void DoDeallocate(void* data, int64_t size_bytes) override;
  absl::Status DeviceHealth() const override;
  void* TryAllocate(int64_t size_bytes);
  absl::StatusOr<int64_t> PoolBytes(cudaMemPoolAttr attribute) const;

  const int device_;
  const cudaStream_t stream_;
  const cudaMemPool_t pool_;
};

// Page-locked host memory, which the device copies from and to at full speed. Taking and returning it costs
// milliseconds and may wait for the device: for buffers that last.
class PinnedMemoryResource final : public MemoryResource {
 public:
  explicit PinnedMemoryResource(int device) : device_(device) {}

 private:
  void* DoAllocate(int64_t size_bytes) override;
  void DoDeallocate(void* data, int64_t size_bytes) override;
  absl::Status DeviceHealth() const override;
  const int device_;
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_CUDA_MEMORY_H_
