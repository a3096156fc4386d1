// What ranks read of one another's device memory: in one process, from another one, and what is refused.

#include <cstdlib>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/api/backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::HasSubstr;

constexpr int64_t kWords = 3 << 20;  // 12 MiB
constexpr int64_t kBytes = kWords * 4;
constexpr const char* kHandleVariable = "LONGFILL_TEST_PEER_HANDLE";

class PeerAccessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Backend>> backend = CreateCudaBackend({});
    if (!backend.ok()) GTEST_SKIP() << backend.status().message();
    backend_ = *std::move(backend);
  }

  PeerAccess& peers() { return *backend_->peers(); }

  // Rows of 1,000 words, every other one of `from`, side by side; the words of `words` that they are.
  void ExpectReads(const void* from, const std::vector<int32_t>& words) {
    constexpr int64_t kRow = 1000;
    constexpr int64_t kRows = kWords / (2 * kRow);
    LF_ASSERT_OK_AND_ASSIGN(const Buffer to, backend_->memory().Allocate(kRows * kRow * 4, "read words"));
    LF_ASSERT_OK(peers().Copy({.to = to.data(),
                               .to_pitch = kRow * 4,
                               .from = from,
                               .from_pitch = 2 * kRow * 4,
                               .row_bytes = kRow * 4,
                               .rows = kRows},
                              backend_->stream()));
    std::vector<int32_t> read(static_cast<size_t>(kRows * kRow));
    LF_ASSERT_OK(backend_->kernels().CopyOut(read.data(), to.data(), to.size_bytes(), backend_->stream()));
    LF_ASSERT_OK(backend_->stream().Sync());
    for (int64_t i = 0; i < kRows * kRow; ++i) {
      ASSERT_EQ(read[static_cast<size_t>(i)], words[static_cast<size_t>(i / kRow * 2 * kRow + i % kRow)])
          << "word " << i;
    }
  }

  static std::vector<int32_t> Words() {
    std::vector<int32_t> words(static_cast<size_t>(kWords));
    std::iota(words.begin(), words.end(), 7);
    return words;
  }

  Buffer SharedWords() {
    absl::StatusOr<Buffer> buffer = peers().memory().Allocate(kBytes, "words");
    EXPECT_THAT(buffer, IsOk());
    const std::vector<int32_t> words = Words();
    LF_EXPECT_OK(backend_->kernels().CopyIn(buffer->data(), words.data(), kBytes, backend_->stream()));
    LF_EXPECT_OK(backend_->stream().Sync());
    return *std::move(buffer);
  }

  std::unique_ptr<Backend> backend_;
};

TEST_F(PeerAccessTest, ReadsWithinAProcess) {
  const Buffer buffer = SharedWords();
  EXPECT_EQ(peers().memory().bytes_in_use(), kBytes);
  LF_ASSERT_OK_AND_ASSIGN(const std::string handle, peers().Handle(buffer));
  LF_ASSERT_OK_AND_ASSIGN(const void* opened, peers().Open(handle));
  EXPECT_EQ(opened, buffer.data());
  ExpectReads(opened, Words());
  LF_EXPECT_OK(peers().Close(opened));
}

TEST_F(PeerAccessTest, ReadsOfAnotherProcess) {
  const Buffer buffer = SharedWords();
  LF_ASSERT_OK_AND_ASSIGN(const std::string handle, peers().Handle(buffer));
  const std::string hex = absl::BytesToHexString(absl::string_view(handle.data(), handle.size()));
  ASSERT_EQ(setenv(kHandleVariable, hex.c_str(), 1), 0);
  // A program of its own: CUDA does not survive a fork.
  const int status = std::system("/proc/$PPID/exe --gtest_filter=PeerAccessTest.Child >/dev/null");
  unsetenv(kHandleVariable);
  EXPECT_EQ(status, 0);
}

TEST_F(PeerAccessTest, Child) {
  const char* const hex = std::getenv(kHandleVariable);
  if (hex == nullptr) GTEST_SKIP() << "ReadsOfAnotherProcess runs this";
  const std::string handle = absl::HexStringToBytes(hex);
  LF_ASSERT_OK_AND_ASSIGN(const void* opened, peers().Open(handle));
  ExpectReads(opened, Words());
  LF_EXPECT_OK(peers().Close(opened));
}

TEST_F(PeerAccessTest, AnEmptyBufferIsOneToo) {
  LF_ASSERT_OK_AND_ASSIGN(const Buffer empty, peers().memory().Allocate(0, "nothing"));
  LF_ASSERT_OK_AND_ASSIGN(const std::string handle, peers().Handle(empty));
  LF_ASSERT_OK_AND_ASSIGN(const void* opened, peers().Open(handle));
  EXPECT_EQ(opened, nullptr);
  LF_EXPECT_OK(peers().Close(opened));
}

TEST_F(PeerAccessTest, OtherHostsAndOtherBytesAreRefused) {
  EXPECT_THAT(peers().Open("too short"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no handle")));
  const Buffer buffer = SharedWords();
  LF_ASSERT_OK_AND_ASSIGN(std::string handle, peers().Handle(buffer));
  handle[0] = static_cast<char>(handle[0] ^ 1);  // the host comes first
  EXPECT_THAT(peers().Open(handle),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("on another host")));
}

TEST_F(PeerAccessTest, MemoryThatIsNotThereIsAnError) {
  EXPECT_THAT(peers().memory().Allocate(int64_t{1} << 50, "too much"),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("too much")));
  EXPECT_EQ(peers().memory().bytes_in_use(), 0);
}

}  // namespace
}  // namespace longfill
