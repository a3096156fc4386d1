#ifndef LONGFILL_TESTS_TESTING_GUARDED_BACKEND_H_
#define LONGFILL_TESTS_TESTING_GUARDED_BACKEND_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "kernels/api/backend.h"

namespace longfill {

// A device that several backends of a test share, as processes share a GPU. A backend holds what it has freed
// until it is trimmed.
struct SharedDevice {
  explicit SharedDevice(int64_t bytes) : memory_bytes(bytes) {}
  const int64_t memory_bytes;
  std::atomic<int64_t> held_bytes{0};  // by all backends
  std::atomic<bool> lost{false};       // it answers nothing that it is asked about itself
};

struct GuardedOptions {
  int64_t limit_bytes = 0;                         // of all allocations; 0: none
  std::shared_ptr<SharedDevice> device = nullptr;  // empty: one of its own, without an end
  std::string host = "a host";                     // PeerAccess::Host
  std::function<absl::Status(std::string_view call)> fault =
      nullptr;  // asked before each kernel, by its name
};

// The CPU kernels behind what is hard about a GPU: it says that it is one, whose peers are others in this
// process, its memory starts with garbage and can be touched by its kernels only (anything else ends the test
// with SIGSEGV, as do accesses behind an allocation), and what CopyOut writes arrives once somebody has
// waited for it. Thread-safe as a GPU is.
std::unique_ptr<Backend> CreateGuardedBackend(GuardedOptions options = {});

// The plain CPU backend with one thread and such a limit.
std::unique_ptr<Backend> CreateLimitedCpuBackend(int64_t limit_bytes = 0);

}  // namespace longfill

#endif  // LONGFILL_TESTS_TESTING_GUARDED_BACKEND_H_
