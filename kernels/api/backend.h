#ifndef LONGFILL_KERNELS_API_BACKEND_H_
#define LONGFILL_KERNELS_API_BACKEND_H_

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/api/kernel_set.h"
#include "kernels/api/peer_access.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "kernels/base/stream.h"

namespace longfill {

struct DeviceFacts {
  std::string name;          // "NVIDIA H100 80GB HBM3 (sm_90)", "CPU (AVX3, 2 threads)"
  std::string id;            // equal in all processes that use one device, and there alone; empty for the CPU
  int64_t memory_bytes = 0;  // in all; 0 for the CPU, whose memory others share
  int num_multiprocessors = 0;    // of a GPU
  int64_t free_bytes_before = 0;  // of these, before this process came to the device; 0: not known
};

// One device of this process and what runs on it. Everything that it gives out must be gone before it is
// destroyed. Thread-safe but for the KernelSet.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual const DeviceFacts& facts() const = 0;
  virtual KernelSet& kernels() = 0;
  // Memory of the device. Stream-ordered on a GPU: an allocation belongs to work on `stream()` or work that
  // waits for it, and a freed one is used again in the order of that stream.
  virtual MemoryResource& memory() = 0;
  // Host memory that the device copies from and to at full speed (page-locked for a GPU).
  virtual MemoryResource& host_memory() = 0;
  virtual Stream& stream() = 0;                                     // the main one
  virtual absl::StatusOr<std::unique_ptr<Stream>> NewStream() = 0;  // runs beside the main one, and first
  virtual absl::StatusOr<std::unique_ptr<Event>> NewEvent() = 0;
  // Bytes of the device that nobody uses now, with what memory() holds back for later allocations; 0: not
  // known (CPU).
  virtual absl::StatusOr<int64_t> FreeMemoryBytes() = 0;
  // How peers read this device's memory, and it theirs; nullptr: they cannot.
  virtual PeerAccess* peers() { return nullptr; }
  // Not OK once the device is lost (an error that no later call survives); the process should then end.
  virtual absl::Status Health() = 0;
};

std::unique_ptr<Backend> CreateCpuBackend(int num_threads);

struct CudaBackendOptions {
  int device = 0;                          // ordinal among the visible devices
  DType compute_dtype = DType::kBFloat16;  // or float16
  // Nothing but the kernels that run on every supported device: they check those of one architecture.
  bool generic_kernels = false;
  std::string peer_host;  // PeerAccess::Host; empty: by what the system calls this host
};
// Unimplemented where longfill was built without CUDA, or for a device below sm_80 or a compute dtype that is
// not 16 bits wide; Unavailable where there is no driver or no such device. The message says what is missing.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaBackendOptions& options);
// Visible devices; the same errors.
absl::StatusOr<int> CudaDeviceCount();

}  // namespace longfill

#endif  // LONGFILL_KERNELS_API_BACKEND_H_
