#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "tests/contract/backend_fixture.h"

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;

constexpr uint8_t kPoison = 0x7F;

std::vector<uint8_t> Pattern(int64_t count) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 37 + i / 251);
  return bytes;
}

class MemoryTest : public BackendTest {
 protected:
  Buffer NewBuffer(int64_t bytes) {
    absl::StatusOr<Buffer> buffer = backend().memory().Allocate(bytes, "a test array");
    EXPECT_THAT(buffer, IsOk());
    return buffer.ok() ? *std::move(buffer) : Buffer();
  }
};
LF_INSTANTIATE_BACKENDS(MemoryTest);

TEST_P(MemoryTest, AllocationsAreAlignedAndAccountedFor) {
  for (MemoryResource* memory : {&backend().memory(), &backend().host_memory()}) {
    const int64_t before = memory->bytes_in_use();
    memory->ResetPeak();
    {
      LF_ASSERT_OK_AND_ASSIGN(const Buffer odd, memory->Allocate(7, "seven bytes"));
      LF_ASSERT_OK_AND_ASSIGN(const Buffer large, memory->Allocate(int64_t{3} << 20, "three MiB"));
      LF_ASSERT_OK_AND_ASSIGN(const Buffer none, memory->Allocate(0, "nothing"));
      EXPECT_EQ(reinterpret_cast<uintptr_t>(odd.data()) % 64, 0);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(large.data()) % 64, 0);
      EXPECT_EQ(none.data(), nullptr);
      EXPECT_EQ(memory->bytes_in_use(), before + 7 + (3 << 20));
    }
    EXPECT_EQ(memory->bytes_in_use(), before);
    EXPECT_EQ(memory->peak_bytes(), before + 7 + (3 << 20));
    EXPECT_THAT(memory->Allocate(-1, "less"),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("less")));
  }
}

TEST_P(MemoryTest, ExhaustionNamesWhatAndHowMuchAndTheBackendGoesOn) {
  if (!on_gpu()) GTEST_SKIP() << "host memory has no end that a test should look for";
  const int64_t too_much = int64_t{1} << 50;
  EXPECT_THAT(backend().memory().Allocate(too_much, "the moon"),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("the moon"), HasSubstr(std::to_string(too_much)))));
  LF_EXPECT_OK(backend().Health());
  const std::vector<uint8_t> bytes = Pattern(1000);
  EXPECT_EQ(Download<uint8_t>(Upload(bytes).data(), 1000), bytes);
}

TEST_P(MemoryTest, FreedPiecesComeBackAsOneLargeAllocation) {
  if (!on_gpu()) GTEST_SKIP() << "the pool is the GPU's";
  LF_ASSERT_OK_AND_ASSIGN(const int64_t free_bytes, backend().FreeMemoryBytes());
  ASSERT_GT(free_bytes, 0);
  const int64_t total = free_bytes / 10 * 6;
  constexpr int64_t kPieces = 61;
  {
    std::vector<Buffer> pieces;
    for (int64_t i = 0; i < kPieces; ++i) pieces.push_back(NewBuffer(total / kPieces));
    LF_ASSERT_OK_AND_ASSIGN(const int64_t free_beside, backend().FreeMemoryBytes());
    EXPECT_NEAR(static_cast<double>(free_beside), static_cast<double>(free_bytes - total),
                0.03 * static_cast<double>(total));
  }
  LF_ASSERT_OK(stream().Sync());
  LF_ASSERT_OK_AND_ASSIGN(const int64_t free_after, backend().FreeMemoryBytes());
  EXPECT_NEAR(static_cast<double>(free_after), static_cast<double>(free_bytes),
              0.03 * static_cast<double>(total));
  EXPECT_THAT(backend().memory().Allocate(total, "all of it"), IsOk());
}

TEST_P(MemoryTest, WhatIsHeldIsCountedAndTrimGivesIdlePiecesBack) {
  MemoryResource& memory = backend().memory();
  LF_ASSERT_OK(stream().Sync());
  LF_ASSERT_OK(memory.Trim());
  memory.ResetPeak();
  LF_ASSERT_OK_AND_ASSIGN(const int64_t free_before, backend().FreeMemoryBytes());
  LF_ASSERT_OK_AND_ASSIGN(const int64_t held_before, memory.PeakHeldBytes());
  constexpr int64_t kSize = int64_t{512} << 20;
  { const Buffer buffer = NewBuffer(kSize); }
  LF_ASSERT_OK(stream().Sync());
  LF_ASSERT_OK_AND_ASSIGN(const int64_t held, memory.PeakHeldBytes());
  EXPECT_GE(held, held_before + kSize / 2);
  LF_ASSERT_OK_AND_ASSIGN(const int64_t idle, memory.IdleBytes());
  if (on_gpu()) {
    EXPECT_GE(idle, kSize);
  }
  LF_ASSERT_OK(memory.Trim());
  LF_ASSERT_OK_AND_ASSIGN(const int64_t idle_after, memory.IdleBytes());
  EXPECT_LT(idle_after, kSize / 4);
  LF_ASSERT_OK_AND_ASSIGN(const int64_t free_after, backend().FreeMemoryBytes());
  EXPECT_NEAR(static_cast<double>(free_after), static_cast<double>(free_before), 0.1 * kSize);
}

TEST_P(MemoryTest, CopiesThereAndBackAreEqual) {
  for (int64_t bytes : {0, 1, 3, 4, 5, 16, 3999, 4000, 4001, 65535, 65536, 65537, (1 << 20) + 3}) {
    for (int64_t offset : {0, 1, 4}) {
      SCOPED_TRACE(testing::Message() << bytes << " bytes at " << offset);
      const std::vector<uint8_t> sent = Pattern(bytes);
      const Buffer buffer = Bytes(offset + bytes + 1);
      LF_ASSERT_OK(kernels().CopyIn(buffer.as<char>() + offset, sent.data(), bytes, stream()));
      const std::vector<uint8_t> got = Download<uint8_t>(buffer.data(), offset + bytes + 1);
      EXPECT_EQ(std::vector<uint8_t>(got.begin() + offset, got.end() - 1), sent);
      EXPECT_THAT(std::vector<uint8_t>(got.begin(), got.begin() + offset), Each(kPoison));
      EXPECT_EQ(got.back(), kPoison);
    }
  }
  EXPECT_THAT(kernels().CopyIn(nullptr, nullptr, -1, stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1")));
}

TEST_P(MemoryTest, CopyInHasReadTheHostMemoryOnReturn) {
  for (int64_t bytes : {1000, 64 << 10, 32 << 20}) {
    SCOPED_TRACE(bytes);
    LF_ASSERT_OK_AND_ASSIGN(const Buffer pinned, backend().host_memory().Allocate(bytes, "host memory"));
    const std::vector<uint8_t> sent = Pattern(bytes);
    std::memcpy(pinned.data(), sent.data(), sent.size());
    std::vector<uint8_t> pageable = sent;
    const Buffer first = NewBuffer(bytes);
    const Buffer second = NewBuffer(bytes);
    LF_ASSERT_OK(kernels().CopyIn(first.data(), pinned.data(), bytes, stream()));
    std::memset(pinned.data(), 0, sent.size());
    LF_ASSERT_OK(kernels().CopyIn(second.data(), pageable.data(), bytes, stream()));
    std::memset(pageable.data(), 0, pageable.size());
    EXPECT_TRUE(Download<uint8_t>(first.data(), bytes) == sent) << "page-locked";
    EXPECT_TRUE(Download<uint8_t>(second.data(), bytes) == sent) << "pageable";
  }
}

TEST_P(MemoryTest, CopyOutToHostMemoryIsThereAfterSync) {
  constexpr int64_t kBytes = (8 << 20) + 5;
  const std::vector<uint8_t> sent = Pattern(kBytes);
  const Buffer buffer = Upload(sent);
  LF_ASSERT_OK_AND_ASSIGN(const Buffer pinned, backend().host_memory().Allocate(kBytes, "host memory"));
  LF_ASSERT_OK(kernels().CopyOut(pinned.data(), buffer.data(), kBytes, stream()));
  LF_ASSERT_OK(stream().Sync());
  EXPECT_EQ(std::memcmp(pinned.data(), sent.data(), sent.size()), 0);
}

struct Rows {
  int64_t row_bytes, rows, to_pitch, from_pitch, to_offset;
};

TEST_P(MemoryTest, CopiesOfRowsTouchNothingBetweenThem) {
  const std::vector<Rows> cases = {{16, 1, 0, 0, 0},
                                   {1, 7, 1, 1, 0},
                                   {1, 300, 3, 2, 1},
                                   {48, 5000, 64, 48, 16},
                                   {256, 1000, 4096, 256, 0},
                                   {254, 33, 256, 300, 2},
                                   {16384, 17, 16400, 16384, 0},
                                   {16400, 3, 16400, 32768, 0},
                                   {100000, 5, 100016, 100000, 0},
                                   {64, 100, 64, 64, 0},
                                   {37, 11, 37, 37, 5},
                                   {16, 0, 16, 16, 0},
                                   {0, 5, 16, 16, 0},
                                   {128, 20, 128, 0, 0}};
  for (const Rows& c : cases) {
    SCOPED_TRACE(testing::Message() << c.rows << " rows of " << c.row_bytes << ", pitches " << c.to_pitch
                                    << " and " << c.from_pitch);
    const std::vector<uint8_t> source = Pattern(c.rows * std::max(c.from_pitch, c.row_bytes) + 16);
    const Buffer from = Upload(source);
    const int64_t to_bytes = c.to_offset + c.rows * std::max(c.to_pitch, c.row_bytes) + 16;
    const Buffer to = Bytes(to_bytes);
    std::vector<uint8_t> want(static_cast<size_t>(to_bytes), kPoison);
    for (int64_t r = 0; r < c.rows; ++r) {
      std::copy_n(source.begin() + r * c.from_pitch, c.row_bytes,
                  want.begin() + c.to_offset + r * c.to_pitch);
    }
    LF_ASSERT_OK(kernels().Copy2D(
        {to.as<char>() + c.to_offset, c.to_pitch, from.data(), c.from_pitch, c.row_bytes, c.rows}, stream()));
    EXPECT_TRUE(Download<uint8_t>(to.data(), to_bytes) == want);
  }
  // [3 planes][5 rows] of 48 bytes, planes and rows apart in both buffers; aligned, and not.
  for (const int64_t offset : {0, 5}) {
    const std::vector<uint8_t> source = Pattern(3 * 1000 + 48);
    const Buffer from = Upload(source);
    const Buffer to = Bytes(3 * 640 + 48);
    std::vector<uint8_t> want(3 * 640 + 48, kPoison);
    for (int64_t plane = 0; plane < 3; ++plane) {
      for (int64_t row = 0; row < 5; ++row) {
        std::copy_n(source.begin() + plane * 960 + row * 64, 48,
                    want.begin() + offset + plane * 560 + row * 96);
      }
    }
    LF_ASSERT_OK(kernels().Copy2D({.to = to.as<char>() + offset,
                                   .to_pitch = 96,
                                   .from = from.data(),
                                   .from_pitch = 64,
                                   .row_bytes = 48,
                                   .rows = 5,
                                   .planes = 3,
                                   .to_plane_pitch = 560,
                                   .from_plane_pitch = 960},
                                  stream()));
    EXPECT_TRUE(Download<uint8_t>(to.data(), std::ssize(want)) == want) << "offset " << offset;
  }
  EXPECT_THAT(kernels().Copy2D({.to_pitch = 8, .from_pitch = 16, .row_bytes = 16, .rows = 2}, stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("to_pitch 8")));
}

TEST_P(MemoryTest, ZeroSetsItsBytesAndNoOthers) {
  for (int64_t bytes : {0, 1, 17, 4096, 1 << 20}) {
    const Buffer buffer = Bytes(bytes + 8);
    LF_ASSERT_OK(kernels().Zero(buffer.as<char>() + 3, bytes, stream()));
    const std::vector<uint8_t> got = Download<uint8_t>(buffer.data(), bytes + 8);
    EXPECT_THAT(std::vector<uint8_t>(got.begin(), got.begin() + 3), Each(kPoison));
    EXPECT_TRUE(std::vector<uint8_t>(got.begin() + 3, got.begin() + 3 + bytes) ==
                std::vector<uint8_t>(static_cast<size_t>(bytes)));
    EXPECT_THAT(std::vector<uint8_t>(got.begin() + 3 + bytes, got.end()), Each(kPoison));
  }
}

// An event orders what another stream does after what the main one has been given.
TEST_P(MemoryTest, AnotherStreamWaitsForAnEvent) {
  const int64_t count = on_gpu() ? int64_t{1} << 28 : 1 << 16;  // on a GPU a millisecond of filling
  const Buffer filled = NewBuffer(count * 4);
  const Buffer copied = NewBuffer(count * 4);
  LF_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Stream> side, backend().NewStream());
  LF_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Event> before, backend().NewEvent());
  LF_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Event> done, backend().NewEvent());
  LF_ASSERT_OK(kernels().Zero(filled.data(), count * 4, stream()));
  LF_ASSERT_OK(kernels().Zero(copied.data(), count * 4, stream()));
  LF_ASSERT_OK(before->Record(stream()));
  LF_ASSERT_OK(
      kernels().FillRandom({.out = filled.data(), .count = count, .stddev = 1, .seed = 7}, stream()));
  LF_ASSERT_OK(done->Record(stream()));
  LF_ASSERT_OK(side->WaitFor(*done));
  LF_ASSERT_OK(kernels().Copy2D({copied.data(), 0, filled.data(), 0, count * 4, 1}, *side));
  LF_ASSERT_OK(side->Sync());
  EXPECT_THAT(done->Passed(), IsOk());
  EXPECT_TRUE(*done->Passed());
  LF_EXPECT_OK(done->Wait());
  LF_ASSERT_OK_AND_ASSIGN(const double seconds, done->SecondsSince(*before));
  EXPECT_GE(seconds, 0);
  EXPECT_LT(seconds, 60);
  constexpr int64_t kLast = 1000;
  const int64_t offset = (count - kLast) * 4;
  EXPECT_EQ(Download<uint32_t>(copied.as<char>() + offset, kLast),
            Download<uint32_t>(filled.as<char>() + offset, kLast));
  EXPECT_NE(Download<uint32_t>(copied.as<char>() + offset, kLast), std::vector<uint32_t>(kLast));
}

TEST_P(MemoryTest, AnEventThatWasNeverRecordedIsPast) {
  LF_ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Event> event, backend().NewEvent());
  LF_EXPECT_OK(stream().WaitFor(*event));
  LF_EXPECT_OK(event->Wait());
  LF_ASSERT_OK_AND_ASSIGN(const bool passed, event->Passed());
  EXPECT_TRUE(passed);
  LF_EXPECT_OK(stream().Sync());
}

TEST_P(MemoryTest, FactsAndHealthAreThere) {
  EXPECT_FALSE(backend().facts().name.empty());
  LF_EXPECT_OK(backend().Health());
  LF_ASSERT_OK_AND_ASSIGN(const int64_t free_bytes, backend().FreeMemoryBytes());
  EXPECT_EQ(free_bytes > 0, on_gpu());
  EXPECT_EQ(backend().facts().memory_bytes > 0, on_gpu());
  EXPECT_EQ(backend().stream().device(), kernels().device());
  EXPECT_GE(kernels().preferred_rows(), 1);
  EXPECT_EQ(&kernels().memory(), &backend().memory());
}

TEST(BackendCreationTest, WhatIsMissingIsNamed) {
  const absl::StatusOr<int> devices = CudaDeviceCount();
  if (!devices.ok()) {
    const absl::Status created = CreateCudaBackend({}).status();
    EXPECT_EQ(created, devices.status());
    EXPECT_THAT(created,
                ::testing::AnyOf(StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("LONGFILL_CUDA")),
                                 StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no CUDA device"))));
  }
  EXPECT_THAT(CreateCudaBackend({.compute_dtype = DType::kFloat32}).status(),
              StatusIs(absl::StatusCode::kUnimplemented, ::testing::_));
}

// From the definition in kernels/base/random_weights.h, number by number.
float RandomElement(uint64_t seed, uint64_t index, float stddev) {
  const auto mix = [](uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  };
  double sum = 0;
  for (uint64_t draw = 0; draw < 3; ++draw) {
    const uint64_t bits = mix(mix(seed) + (3 * index + draw + 1) * 0x9E3779B97F4A7C15);
    for (int part = 0; part < 4; ++part) sum += static_cast<double>(bits >> (16 * part) & 0xFFFF);
  }
  return stddev * static_cast<float>((sum - 6 * 65535.0) / 65536);
}

TEST_P(MemoryTest, RandomWeightsAreThoseOfTheDefinitionHoweverTheArrayIsSplit) {
  constexpr int64_t kCount = 100003;
  constexpr int64_t kFirst = (int64_t{1} << 33) + 5;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    SCOPED_TRACE(std::string(DTypeName(dtype)));
    const int64_t width = DTypeBytes(dtype);
    std::vector<float> values;
    for (int64_t i = 0; i < kCount; ++i) values.push_back(RandomElement(42, kFirst + i, 0.02F));
    std::vector<uint8_t> want(static_cast<size_t>((kCount + 1) * width), kPoison);
    NarrowFromFloat(values.data(), kCount, dtype, want.data());
    for (const std::vector<int64_t>& cuts :
         std::vector<std::vector<int64_t>>{{0, kCount}, {0, 1, 2, 777, 777, 65536, kCount}}) {
      const Buffer out = Bytes((kCount + 1) * width);
      for (size_t piece = 0; piece + 1 < cuts.size(); ++piece) {
        LF_ASSERT_OK(kernels().FillRandom({.out = out.as<char>() + cuts[piece] * width,
                                           .dtype = dtype,
                                           .count = cuts[piece + 1] - cuts[piece],
                                           .stddev = 0.02F,
                                           .seed = 42,
                                           .first = kFirst + cuts[piece]},
                                          stream()));
      }
      EXPECT_TRUE(Download<uint8_t>(out.data(), (kCount + 1) * width) == want)
          << cuts.size() - 1 << " pieces";
    }
  }
  EXPECT_THAT(kernels().FillRandom({.dtype = DType::kInt32, .count = 1}, stream()),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("int32")));
}

TEST_P(MemoryTest, RandomWeightsHaveTheirMeanAndVariance) {
  constexpr int64_t kCount = 1 << 20;
  const Buffer out = NewBuffer(kCount * 4);
  LF_ASSERT_OK(kernels().FillRandom({.out = out.data(), .count = kCount, .stddev = 3, .seed = 1}, stream()));
  const std::vector<float> values = Download<float>(out.data(), kCount);
  double sum = 0;
  double squares = 0;
  double neighbours = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    sum += values[i];
    squares += double{values[i]} * values[i];
    if (i > 0) neighbours += double{values[i]} * values[i - 1];
  }
  // Five standard errors.
  EXPECT_NEAR(sum / kCount, 0, 5 * 3 / std::sqrt(kCount));
  EXPECT_NEAR(squares / kCount, 9, 5 * 9 * std::sqrt(2.0 / kCount));
  EXPECT_NEAR(neighbours / kCount, 0, 5 * 9 / std::sqrt(kCount));
}

TEST_P(MemoryTest, MoreThan2To31ElementsAreFilledAndCopied) {
  if (!on_gpu()) GTEST_SKIP() << "too slow on a CPU";
  constexpr int64_t kCount = (int64_t{1} << 31) + 4099;
  constexpr int64_t kEnd = 4096;
  const Buffer filled = NewBuffer(kCount * 2);
  const Buffer copied = NewBuffer(kCount * 2);
  LF_ASSERT_OK(kernels().FillRandom(
      {.out = filled.data(), .dtype = DType::kBFloat16, .count = kCount, .stddev = 1, .seed = 3}, stream()));
  LF_ASSERT_OK(kernels().Copy2D({copied.data(), 0, filled.data(), 0, kCount * 2, 1}, stream()));
  std::vector<uint16_t> want;
  for (int64_t i = kCount - kEnd; i < kCount; ++i) want.push_back(FloatToBFloat16(RandomElement(3, i, 1)));
  EXPECT_EQ(Download<uint16_t>(copied.as<uint16_t>() + kCount - kEnd, kEnd), want);
}

}  // namespace
}  // namespace longfill
