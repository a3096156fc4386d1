#ifndef LONGFILL_KERNELS_API_PEER_ACCESS_H_
#define LONGFILL_KERNELS_API_PEER_ACCESS_H_

#include <string>
#include <string_view>

#include "kernels/api/kernel_set.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "kernels/base/stream.h"

namespace longfill {

// Memory that ranks of one host read from one another's devices, brought by copy engines, which take no
// multiprocessor from kernels. Thread-safe but for Copy, which is of one thread for each stream.
class PeerAccess {
 public:
  virtual ~PeerAccess() = default;
  // Of this device, that peers can open. Taking and returning it may wait for the device: for buffers that
  // last.
  virtual MemoryResource& memory() = 0;
  // Equal for ranks of one host: any bytes. FailedPrecondition where the host cannot tell.
  virtual absl::StatusOr<std::string> Host() = 0;
  // By which peers open a buffer of memory(), whole: any bytes.
  virtual absl::StatusOr<std::string> Handle(const Buffer& buffer) = 0;
  // Where this device reads a peer's buffer, until Close and while the peer keeps it. FailedPrecondition
  // naming the reason where it cannot: another host, or devices without a way to each other.
  virtual absl::StatusOr<const void*> Open(std::string_view handle) = 0;
  virtual absl::Status Close(const void* opened) = 0;
  // From what Open gave, or from the device's own memory, to the device's own memory; one plane.
  virtual absl::Status Copy(const Copy2DParams& params, Stream& stream) = 0;
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_API_PEER_ACCESS_H_
