#ifndef LONGFILL_KERNELS_CUDA_PEER_ACCESS_H_
#define LONGFILL_KERNELS_CUDA_PEER_ACCESS_H_

#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "kernels/api/peer_access.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "kernels/base/stream.h"

namespace longfill {

// Device memory with allocations of its own, which other processes can map; memory from pools is not of that
// kind. Takes what `pool` holds back before it gives up.
class SharedCudaMemoryResource final : public MemoryResource {
 public:
  // `stream`: the order of `pool`. Both outlive this.
  SharedCudaMemoryResource(int device, MemoryResource& pool, Stream& stream)
      : device_(device), pool_(pool), stream_(stream) {}

 private:
  void* DoAllocate(int64_t size_bytes) override;
  void DoDeallocate(void* data, int64_t size_bytes) override;
  absl::Status DeviceHealth() const override;
  void* TryAllocate(int64_t size_bytes);
  const int device_;
  MemoryResource& pool_;
  Stream& stream_;
};

// Handles of CUDA's interprocess communication; between ranks of one process, addresses.
class CudaPeerAccess final : public PeerAccess {
 public:
  // `pool` and `stream`: the device's other memory and its order. Both outlive this. `host`: of Host; empty:
  // the host's boot id.
  CudaPeerAccess(int device, MemoryResource& pool, Stream& stream, std::string host)
      : device_(device), host_(std::move(host)), memory_(device, pool, stream) {}

  MemoryResource& memory() override { return memory_; }
  absl::StatusOr<std::string> Host() override;
  absl::StatusOr<std::string> Handle(const Buffer& buffer) override;
  absl::StatusOr<const void*> Open(std::string_view handle) override;
  absl::Status Close(const void* opened) override;
  absl::Status Copy(const Copy2DParams& params, Stream& stream) override;

 private:
  const int device_;
  const std::string host_;
  SharedCudaMemoryResource memory_;
  std::mutex mutex_;
  std::set<const void*> mapped_;  // of other processes
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_PEER_ACCESS_H_
