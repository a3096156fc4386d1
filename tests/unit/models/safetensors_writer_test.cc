#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <thread>

#include "models/file_io.h"
#include "models/safetensors.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::span<const std::byte> Bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

std::string Text(const SafetensorsTensor& tensor) {
  return {reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size()};
}

std::vector<SafetensorsSpec> TwoTensors() {
  return {{"positions", DType::kInt64, {2}}, {"x", DType::kBFloat16, {2, 3}}};
}

TEST(SafetensorsWriter, WhatItWritesReadsBack) {
  const TempDir dir;
  LF_ASSERT_OK_AND_ASSIGN(
      auto writer, SafetensorsWriter::Create(dir.File("kv"), TwoTensors(), {{"format", "pt"}, {"a", "b"}}));
  LF_ASSERT_OK(writer->Write("x", 8, Bytes("IJKL")));
  LF_ASSERT_OK(writer->Append("positions", Bytes("01234567")));
  LF_ASSERT_OK(writer->Write("x", 0, Bytes("ABCD")));
  LF_ASSERT_OK(writer->Append("positions", Bytes("89abcdef")));
  LF_ASSERT_OK(writer->Write("x", 4, Bytes("EFGH")));
  EXPECT_FALSE(std::filesystem::exists(dir.File("kv")));
  LF_ASSERT_OK(writer->Close());
  EXPECT_THAT(dir.List(), ElementsAre("kv"));
  LF_ASSERT_OK_AND_ASSIGN(const auto file, SafetensorsFile::Open(dir.File("kv")));
  EXPECT_EQ(file->size_bytes(), writer->file_bytes());
  EXPECT_EQ(file->metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"a", "b"}}));
  EXPECT_EQ(Text(*file->Find("positions")), "0123456789abcdef");
  EXPECT_EQ(Text(*file->Find("x")), "ABCDEFGHIJKL");
  EXPECT_EQ(file->Find("x")->dtype, DType::kBFloat16);
  EXPECT_EQ(file->Find("x")->shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(file->Find("positions")->file_offset % 64, 0);
}

TEST(SafetensorsWriter, FilesWithoutBytesAreLegal) {
  const TempDir dir;
  LF_ASSERT_OK_AND_ASSIGN(auto none, SafetensorsWriter::Create(dir.File("none"), {}, {}));
  LF_ASSERT_OK(none->Close());
  LF_EXPECT_OK(SafetensorsFile::Open(dir.File("none")));
  LF_ASSERT_OK_AND_ASSIGN(auto empty,
                          SafetensorsWriter::Create(dir.File("empty"), {{"x", DType::kFloat32, {2, 0}}}, {}));
  LF_ASSERT_OK(empty->Append("x", {}));
  LF_ASSERT_OK(empty->Close());
  LF_ASSERT_OK_AND_ASSIGN(const auto file, SafetensorsFile::Open(dir.File("empty")));
  EXPECT_EQ(file->Find("x")->shape, (std::vector<int64_t>{2, 0}));
}

TEST(SafetensorsWriter, DroppedUnclosedItLeavesTheOldFileAndNothingElse) {
  const TempDir dir;
  WriteText(dir.File("kv"), "old");
  {
    LF_ASSERT_OK_AND_ASSIGN(auto writer, SafetensorsWriter::Create(dir.File("kv"), TwoTensors(), {}));
    LF_ASSERT_OK(writer->Append("positions", Bytes("01234567")));
    EXPECT_EQ(dir.List().size(), 2u);
  }
  EXPECT_THAT(dir.List(), ElementsAre("kv"));
  EXPECT_EQ(ReadText(dir.File("kv")), "old");
}

TEST(SafetensorsWriter, ClosingAnIncompleteFileIsRefusedByTensor) {
  const TempDir dir;
  {
    LF_ASSERT_OK_AND_ASSIGN(auto writer, SafetensorsWriter::Create(dir.File("kv"), TwoTensors(), {}));
    LF_ASSERT_OK(writer->Append("positions", Bytes("0123456789abcdef")));
    LF_ASSERT_OK(writer->Write("x", 0, Bytes("ABCD")));
    LF_ASSERT_OK(writer->Write("x", 6, Bytes("GHIJKL")));
    EXPECT_THAT(writer->Close(), StatusIs(absl::StatusCode::kFailedPrecondition,
                                          AllOf(HasSubstr("'x'"), HasSubstr("not written completely"))));
    EXPECT_THAT(writer->Write("x", 4, Bytes("EF")),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("'x'")));
  }
  EXPECT_THAT(dir.List(), IsEmpty());
}

TEST(SafetensorsWriter, RefusesWritesOutsideOrTwice) {
  const TempDir dir;
  LF_ASSERT_OK_AND_ASSIGN(auto writer, SafetensorsWriter::Create(dir.File("kv"), TwoTensors(), {}));
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(writer->Write("y", 0, Bytes("A")), StatusIs(kInvalid, HasSubstr("no tensor 'y'")));
  EXPECT_THAT(writer->Write("x", -1, Bytes("A")), StatusIs(kInvalid, HasSubstr("exceed its 12")));
  EXPECT_THAT(writer->Write("x", 13, {}), StatusIs(kInvalid, HasSubstr("exceed its 12")));
  EXPECT_THAT(writer->Write("x", 11, Bytes("AB")), StatusIs(kInvalid, HasSubstr("exceed its 12")));
  EXPECT_THAT(writer->Write("x", INT64_MAX, Bytes("AB")), StatusIs(kInvalid, HasSubstr("exceed its 12")));
  LF_ASSERT_OK(writer->Write("x", 4, Bytes("EFGH")));
  EXPECT_THAT(writer->Write("x", 4, Bytes("E")), StatusIs(kInvalid, HasSubstr("written before")));
  EXPECT_THAT(writer->Write("x", 7, Bytes("HI")), StatusIs(kInvalid, HasSubstr("written before")));
  EXPECT_THAT(writer->Write("x", 0, Bytes("ABCDE")), StatusIs(kInvalid, HasSubstr("written before")));
  EXPECT_THAT(writer->Write("x", 0, Bytes("ABCDEFGHIJ")), StatusIs(kInvalid, HasSubstr("written before")));
  LF_EXPECT_OK(writer->Write("x", 0, Bytes("ABCD")));
  LF_EXPECT_OK(writer->Write("x", 8, Bytes("IJKL")));
  LF_EXPECT_OK(writer->Append("positions", Bytes("0123456789abcdef")));
  LF_EXPECT_OK(writer->Close());
  EXPECT_THAT(writer->Close(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("closed")));
  EXPECT_THAT(writer->Append("x", Bytes("A")),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("closed")));
}

TEST(SafetensorsWriter, RefusesBadSpecs) {
  const TempDir dir;
  const std::string path = dir.File("kv");
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(SafetensorsWriter::Create(path, {TwoTensors()[0], TwoTensors()[0]}, {}),
              StatusIs(kInvalid, HasSubstr("given twice")));
  EXPECT_THAT(SafetensorsWriter::Create(path, {{"__metadata__", DType::kFloat32, {1}}}, {}),
              StatusIs(kInvalid, HasSubstr("reserved")));
  EXPECT_THAT(SafetensorsWriter::Create(path, {{"x", DType::kFloat32, {-1}}}, {}),
              StatusIs(kInvalid, HasSubstr("negative extent -1")));
  EXPECT_THAT(SafetensorsWriter::Create(path, {{"x", DType::kFloat32, {INT64_MAX, 2}}}, {}),
              StatusIs(kInvalid, HasSubstr("overflows")));
  EXPECT_THAT(SafetensorsWriter::Create(path, {{"\xff", DType::kFloat32, {1}}}, {}),
              StatusIs(kInvalid, HasSubstr("UTF-8")));
  EXPECT_THAT(SafetensorsWriter::Create(dir.File("none/kv"), TwoTensors(), {}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none/kv")));
  EXPECT_THAT(dir.List(), IsEmpty());
}

TEST(SafetensorsWriter, ThreadsMayWriteAtTheSameTime) {
  const TempDir dir;
  constexpr int kThreads = 4;
  constexpr int64_t kPieces = 200;
  LF_ASSERT_OK_AND_ASSIGN(auto writer, SafetensorsWriter::Create(
                                           dir.File("kv"), {{"x", DType::kInt32, {kThreads * kPieces}}}, {}));
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int64_t piece = 0; piece < kPieces; ++piece) {
        const int32_t value = static_cast<int32_t>(piece * kThreads + thread);
        LF_EXPECT_OK(writer->Write("x", 4 * value, std::as_bytes(std::span(&value, 1))));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  LF_ASSERT_OK(writer->Close());
  LF_ASSERT_OK_AND_ASSIGN(const auto file, SafetensorsFile::Open(dir.File("kv")));
  for (int32_t i = 0; i < kThreads * kPieces; ++i) {
    int32_t value = -1;
    std::memcpy(&value, file->Find("x")->bytes.data() + 4 * i, 4);
    ASSERT_EQ(value, i);
  }
}

TEST(WriteFully, AFullDiskIsResourceExhaustedWithThePath) {
  const int fd = open("/dev/full", O_WRONLY);
  if (fd < 0) GTEST_SKIP() << "/dev/full is absent";
  EXPECT_THAT(
      WriteFully(fd, 0, Bytes("abc"), "out/kv"),
      StatusIs(absl::StatusCode::kResourceExhausted, AllOf(HasSubstr("out/kv"), HasSubstr("No space left"))));
  close(fd);
}

TEST(WriteFully, OtherErrorsNameThePath) {
  const int fd = open("/dev/null", O_RDONLY);
  EXPECT_THAT(WriteFully(fd, 0, Bytes("abc"), "out/kv"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("out/kv")));
  close(fd);
}

// The largest size that this process may give a file stands in for the end of the disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  void (*handler_)(int);
  rlimit before_{};
};

TEST(SafetensorsWriter, NoRoomAtCreationLeavesNothing) {
  const TempDir dir;
  const FileSizeLimit limit(4096);
  EXPECT_THAT(SafetensorsWriter::Create(dir.File("kv"), {{"x", DType::kFloat32, {2000}}}, {}),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr(dir.File("kv"))));
  EXPECT_THAT(dir.List(), IsEmpty());
}

TEST(SafetensorsWriter, ADiskThatFillsUpLaterFailsTheWriteAndLeavesNothing) {
  const TempDir dir;
  {
    LF_ASSERT_OK_AND_ASSIGN(auto writer,
                            SafetensorsWriter::Create(dir.File("kv"), {{"x", DType::kFloat32, {2000}}}, {}));
    LF_ASSERT_OK(writer->Append("x", Bytes(std::string(3000, 'a'))));
    {
      const FileSizeLimit limit(4096);  // the write crosses it, so that it is cut short before it fails
      EXPECT_THAT(writer->Append("x", Bytes(std::string(5000, 'b'))),
                  StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr(dir.File("kv"))));
    }
    EXPECT_THAT(writer->Append("x", Bytes("c")),
                StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("kv")));
    EXPECT_THAT(writer->Close(), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("kv")));
  }
  EXPECT_THAT(dir.List(), IsEmpty());
}

}  // namespace
}  // namespace longfill
