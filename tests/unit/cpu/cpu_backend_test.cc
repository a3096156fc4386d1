#include "kernels/api/backend.h"

#include "absl/strings/str_cat.h"
#include "tests/unit/cpu/cpu_test_util.h"

namespace longfill {
namespace {

constexpr char kInstructionSets[] = "(AVX3|AVX3_DL|AVX3_ZEN4|AVX2|SSE4|SCALAR|EMU128|NEON)";

TEST(CpuBackendTest, NamesItsInstructionSetAndThreads) {
  const std::unique_ptr<Backend> backend = CreateCpuBackend(2);
  EXPECT_THAT(backend->facts().name,
              testing::MatchesRegex(absl::StrCat("CPU \\(", kInstructionSets, ", 2 threads\\)")));
  EXPECT_EQ(backend->facts().memory_bytes, 0);
  EXPECT_THAT(std::string(backend->kernels().name()),
              testing::MatchesRegex(absl::StrCat("cpu ", kInstructionSets, ", 2 threads")));
}

TEST(CpuBackendTest, IsOneMemoryForHostAndDevice) {
  const std::unique_ptr<Backend> backend = CreateCpuBackend(1);
  EXPECT_EQ(backend->kernels().device(), DeviceKind::kCpu);
  EXPECT_EQ(backend->kernels().compute_dtype(), DType::kFloat32);
  EXPECT_EQ(&backend->kernels().memory(), &backend->memory());
  EXPECT_EQ(&backend->host_memory(), &backend->memory());
  LF_ASSERT_OK_AND_ASSIGN(const int64_t free_bytes, backend->FreeMemoryBytes());
  EXPECT_EQ(free_bytes, 0) << "not known";
  LF_EXPECT_OK(backend->Health());
}

TEST(CpuBackendTest, StreamsAndEventsAreImmediate) {
  const std::unique_ptr<Backend> backend = CreateCpuBackend(1);
  LF_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> stream, backend->NewStream());
  LF_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Event> event, backend->NewEvent());
  LF_EXPECT_OK(stream->WaitFor(*event));
  LF_EXPECT_OK(event->Record(*stream));
  LF_ASSERT_OK_AND_ASSIGN(const bool passed, event->Passed());
  EXPECT_TRUE(passed);
  LF_EXPECT_OK(backend->stream().WaitFor(*event));
  LF_EXPECT_OK(backend->stream().Sync());
}

}  // namespace
}  // namespace longfill
