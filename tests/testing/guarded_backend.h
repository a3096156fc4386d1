#ifndef LONGFILL_TESTS_TESTING_GUARDED_BACKEND_H_
#define LONGFILL_TESTS_TESTING_GUARDED_BACKEND_H_

#include <cstdint>
#include <memory>

#include "kernels/api/backend.h"

namespace longfill {

// The CPU kernels behind what is hard about a GPU: it says that it is one, its memory starts with garbage and
// can be touched by its kernels only (anything else ends the test with SIGSEGV, as do accesses behind an
// allocation), and what CopyOut writes arrives with the stream's next Sync. One thread. Allocations beyond
// `limit_bytes` (0: none) fail.
std::unique_ptr<Backend> CreateGuardedBackend(int64_t limit_bytes = 0);

// The plain CPU backend with one thread and such a limit.
std::unique_ptr<Backend> CreateLimitedCpuBackend(int64_t limit_bytes = 0);

}  // namespace longfill

#endif  // LONGFILL_TESTS_TESTING_GUARDED_BACKEND_H_
