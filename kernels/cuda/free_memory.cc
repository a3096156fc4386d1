#include "kernels/cuda/free_memory.h"

#include <dlfcn.h>

#include <memory>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

// nvmlMemory_t, and the functions by their types in the NVML API reference; they return 0 for success.
struct NvmlMemory {
  unsigned long long total = 0;
  unsigned long long free = 0;
  unsigned long long used = 0;
};
using NvmlCall = int (*)();
using NvmlHandleByUuid = int (*)(const char* uuid, void** handle);
using NvmlMemoryInfo = int (*)(void* handle, NvmlMemory* memory);

struct CloseLibrary {
  void operator()(void* library) const { dlclose(library); }
};

// "GPU-" and the bytes in groups of 4, 2, 2, 2 and 6.
std::string NvmlName(const cudaUUID_t& device) {
  const std::string hex = absl::BytesToHexString({device.bytes, sizeof(device.bytes)});
  return absl::StrCat("GPU-", hex.substr(0, 8), "-", hex.substr(8, 4), "-", hex.substr(12, 4), "-",
                      hex.substr(16, 4), "-", hex.substr(20));
}

}  // namespace

int64_t FreeBytesWithoutContext(const cudaUUID_t& device) {
  const std::unique_ptr<void, CloseLibrary> library(dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL));
  if (library == nullptr) return 0;
  const auto find = [&](const char* name) { return dlsym(library.get(), name); };
  const auto init = reinterpret_cast<NvmlCall>(find("nvmlInit_v2"));
  const auto shutdown = reinterpret_cast<NvmlCall>(find("nvmlShutdown"));
  const auto handle_of = reinterpret_cast<NvmlHandleByUuid>(find("nvmlDeviceGetHandleByUUID"));
  const auto memory_of = reinterpret_cast<NvmlMemoryInfo>(find("nvmlDeviceGetMemoryInfo"));
  if (init == nullptr || shutdown == nullptr || handle_of == nullptr || memory_of == nullptr) return 0;
  if (init() != 0) return 0;
  void* handle = nullptr;
  NvmlMemory memory;
  const bool known = handle_of(NvmlName(device).c_str(), &handle) == 0 && memory_of(handle, &memory) == 0;
  shutdown();
  return known ? static_cast<int64_t>(memory.free) : 0;
}

}  // namespace longfill
