#ifndef LONGFILL_RUNTIME_KV_REGION_MEMORY_H_
#define LONGFILL_RUNTIME_KV_REGION_MEMORY_H_

#include <cstdint>
#include <map>
#include <mutex>

#include "kernels/base/memory.h"

namespace longfill {

// Gives out parts of one allocation: the first gap that is large enough; neighbouring gaps are joined. Does
// not touch the memory, which may be that of a device.
class RegionMemoryResource final : public MemoryResource {
 public:
  static constexpr int64_t kAlignment = 256;
  // What an allocation of so many bytes takes.
  static int64_t PartBytes(int64_t size_bytes) {
    return (size_bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  explicit RegionMemoryResource(Buffer region);

 private:
  void* DoAllocate(int64_t size_bytes) override;
  void DoDeallocate(void* data, int64_t size_bytes) override;

  const Buffer region_;
  std::mutex mutex_;
  std::map<int64_t, int64_t> gaps_;  // offset -> bytes
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_REGION_MEMORY_H_
