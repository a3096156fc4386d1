#include "runtime/kv/file_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

// A file without a name, or -1 with errno.
int OpenUnnamed(const std::string& directory) {
  std::string path = directory + "/longfill-kv-XXXXXX";
  const int file = mkostemp(path.data(), O_CLOEXEC);
  if (file >= 0) unlink(path.c_str());
  return file;
}

}  // namespace

absl::StatusOr<std::unique_ptr<FileMemoryResource>> FileMemoryResource::Create(const std::string& directory) {
  const int file = OpenUnnamed(directory);
  if (file < 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat("no file for KV caches can be made in ", directory));
  }
  close(file);
  return std::unique_ptr<FileMemoryResource>(new FileMemoryResource(directory));
}

void* FileMemoryResource::DoAllocate(int64_t size_bytes) {
  const int file = OpenUnnamed(directory_);
  if (file < 0) return nullptr;
  void* data = MAP_FAILED;
  if (posix_fallocate(file, 0, size_bytes) == 0) {
    data = mmap(nullptr, static_cast<size_t>(size_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  close(file);  // the mapping keeps it
  return data == MAP_FAILED ? nullptr : data;
}

void FileMemoryResource::DoDeallocate(void* data, int64_t size_bytes) {
  munmap(data, static_cast<size_t>(size_bytes));
}

}  // namespace longfill
