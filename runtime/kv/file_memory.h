#ifndef LONGFILL_RUNTIME_KV_FILE_MEMORY_H_
#define LONGFILL_RUNTIME_KV_FILE_MEMORY_H_

#include <memory>
#include <string>

#include "kernels/base/memory.h"
#include "kernels/base/status.h"

namespace longfill {

// Memory of a KV store in files, for caches larger than the host. Each allocation is an unnamed file of its
// own in one directory, mapped whole, whose blocks are taken in advance: a full disk is an allocation that
// fails, and nothing is left behind by a process that dies. The kernel writes pages out where memory is
// short.
class FileMemoryResource final : public MemoryResource {
 public:
  // The directory must be there. InvalidArgument or the system's refusal when no file can be made in it.
  static absl::StatusOr<std::unique_ptr<FileMemoryResource>> Create(const std::string& directory);

 private:
  explicit FileMemoryResource(std::string directory) : directory_(std::move(directory)) {}
  void* DoAllocate(int64_t size_bytes) override;
  void DoDeallocate(void* data, int64_t size_bytes) override;
  const std::string directory_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_FILE_MEMORY_H_
