#include "kernels/cuda/cuda_memory.h"

#include <algorithm>
#include <limits>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/poll.h"

namespace longfill {

absl::StatusOr<std::unique_ptr<CudaMemoryResource>> CudaMemoryResource::Create(int device,
                                                                               cudaStream_t stream) {
  LF_RETURN_IF_ERROR(UseDevice(device));
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool = nullptr;
  LF_RETURN_IF_CUDA_ERROR(cudaMemPoolCreate(&pool, &properties));
  std::unique_ptr<CudaMemoryResource> memory(new CudaMemoryResource(device, stream, pool));
  uint64_t keep_all = std::numeric_limits<uint64_t>::max();
  LF_RETURN_IF_CUDA_ERROR(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_all));
  return memory;
}

CudaMemoryResource::~CudaMemoryResource() {
  if (UseDevice(device_).ok()) CudaStatus(cudaMemPoolDestroy(pool_), "cudaMemPoolDestroy").IgnoreError();
}

absl::StatusOr<int64_t> CudaMemoryResource::PoolBytes(cudaMemPoolAttr attribute) const {
  LF_RETURN_IF_ERROR(UseDevice(device_));
  uint64_t bytes = 0;
  LF_RETURN_IF_CUDA_ERROR(cudaMemPoolGetAttribute(pool_, attribute, &bytes));
  return static_cast<int64_t>(bytes);
}

absl::StatusOr<int64_t> CudaMemoryResource::IdleBytes() const {
  LF_ASSIGN_OR_RETURN(const int64_t held, PoolBytes(cudaMemPoolAttrReservedMemCurrent));
  LF_ASSIGN_OR_RETURN(const int64_t used, PoolBytes(cudaMemPoolAttrUsedMemCurrent));
  return held - std::min(used, held);
}

absl::StatusOr<int64_t> CudaMemoryResource::PeakHeldBytes() const {
  return PoolBytes(cudaMemPoolAttrReservedMemHigh);
}

void CudaMemoryResource::ResetPeak() {
  MemoryResource::ResetPeak();
  if (!UseDevice(device_).ok()) return;
  uint64_t restart = 0;  // from what is held now
  CudaStatus(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReservedMemHigh, &restart),
             "cudaMemPoolSetAttribute")
      .IgnoreError();
}

void* CudaMemoryResource::TryAllocate(int64_t size_bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMallocFromPoolAsync(&data, static_cast<size_t>(size_bytes), pool_, stream_);
  return CudaStatus(error, "cudaMallocFromPoolAsync").ok() ? data : nullptr;
}

void* CudaMemoryResource::DoAllocate(int64_t size_bytes) {
  if (!UseDevice(device_).ok()) return nullptr;
  if (void* data = TryAllocate(size_bytes); data != nullptr) return data;
  // The pool's free pieces may be too small each; given back once the work that used them has run, they can
  // come again as one.
  if (!Poll("cudaStreamQuery", [this] { return cudaStreamQuery(stream_); }).ok() || !Trim().ok()) {
    return nullptr;
  }
  return TryAllocate(size_bytes);
}

absl::Status CudaMemoryResource::Trim() {
  LF_RETURN_IF_ERROR(UseDevice(device_));
  // The pool learns from a synchronisation that frees have run. The stream is at rest, it does not wait.
  LF_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_));
  return CudaStatus(cudaMemPoolTrimTo(pool_, 0), "cudaMemPoolTrimTo");
}

void CudaMemoryResource::DoDeallocate(void* data, int64_t /*size_bytes*/) {
  // A failure means a lost device, which CudaStatus remembers.
  if (UseDevice(device_).ok()) CudaStatus(cudaFreeAsync(data, stream_), "cudaFreeAsync").IgnoreError();
}

absl::Status CudaMemoryResource::DeviceHealth() const { return LostDeviceStatus(device_); }

absl::Status PinnedMemoryResource::DeviceHealth() const { return LostDeviceStatus(device_); }

void* PinnedMemoryResource::DoAllocate(int64_t size_bytes) {
  if (!UseDevice(device_).ok()) return nullptr;
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, static_cast<size_t>(size_bytes), cudaHostAllocPortable);
  return CudaStatus(error, "cudaHostAlloc").ok() ? data : nullptr;
}

void PinnedMemoryResource::DoDeallocate(void* data, int64_t /*size_bytes*/) {
  if (UseDevice(device_).ok()) CudaStatus(cudaFreeHost(data), "cudaFreeHost").IgnoreError();
}

}  // namespace longfill
