#include <cstdio>
#include <cstdlib>

#include "kernels/api/backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

// Ends with 0 if a kernel that touches what is not there is reported at Sync, and ever after by Health.
[[noreturn]] void LoseTheDevice() {
  const auto check = [](bool condition, const char* what) {
    if (!condition) {
      std::fprintf(stderr, "not so: %s\n", what);
      std::_Exit(1);
    }
  };
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCudaBackend({});
  check(backend.ok() && (*backend)->Health().ok(), "a backend in good health");
  Stream& stream = (*backend)->stream();
  const absl::Status launched =
      (*backend)->kernels().RmsNorm({nullptr, nullptr, 1e-6F, 4, 64, nullptr}, stream);
  check(launched.ok(), "the launch itself succeeds");
  check(stream.Sync().code() == absl::StatusCode::kInternal, "Sync reports the fault");
  const absl::Status health = (*backend)->Health();
  check(health.code() == absl::StatusCode::kInternal, "Health reports the fault");
  check(health.message().find("cudaErrorIllegalAddress") != absl::string_view::npos, "Health names it");
  for (MemoryResource* memory : {&(*backend)->memory(), &(*backend)->host_memory()}) {
    check(memory->Allocate(1 << 20, "more").status().code() == absl::StatusCode::kInternal,
          "memory that cannot be had says why");
  }
  check(!CreateCudaBackend({}).ok(), "there is no second backend");
  std::fprintf(stderr, "lost and said so\n");
  std::_Exit(0);
}

// In a process of its own, which the fault does not outlive.
TEST(LostDeviceDeathTest, IsReportedAtSyncAndByHealth) {
  if (!CudaDeviceCount().ok()) GTEST_SKIP() << CudaDeviceCount().status().message();
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(LoseTheDevice(), ::testing::ExitedWithCode(0), "lost and said so");
}

}  // namespace
}  // namespace longfill
