// What sinks share: conversion of rows; and the sink that keeps nothing but a checksum.

#include <array>
#include <cstring>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/kv/crc32c.h"
#include "runtime/kv/file_memory.h"
#include "runtime/kv/kv_convert.h"
#include "runtime/kv/kv_discard_sink.h"
#include "runtime/kv/kv_store.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

// [heads, rows] of head_dim elements that lie `row_stride` apart, in `dtype`.
std::vector<std::byte> Values(int64_t count, DType dtype) {
  std::mt19937 random(11);
  std::normal_distribution<float> normal(0.0F, 3.0F);
  std::vector<float> wide(static_cast<size_t>(count));
  for (float& value : wide) value = normal(random);
  std::vector<std::byte> bytes(static_cast<size_t>(count * DTypeBytes(dtype)));
  NarrowFromFloat(wide.data(), count, dtype, bytes.data());
  return bytes;
}

TEST(ConvertHeadRows, RoundsOnceAndCopiesWhatIsOfTheTypeAlready) {
  for (const DType from : kFloats) {
    for (const DType to : kFloats) {
      for (const int64_t head_dim : {5, 96}) {
        for (const int64_t row_stride : {head_dim, head_dim + 3}) {
          for (const int64_t rows : {0, 1, 64}) {  // 64 * 96 elements: more than one piece of the conversion
            SCOPED_TRACE(absl::StrCat(std::string(DTypeName(from)), " to ", std::string(DTypeName(to)), ", ",
                                      rows, " rows ", row_stride, " apart"));
            const int64_t head_stride = 64 * row_stride + 7;
            const std::vector<std::byte> values = Values(3 * head_stride, from);
            std::vector<std::byte> got(static_cast<size_t>(rows * head_dim * DTypeBytes(to)));
            ConvertHeadRows({values.data(), head_stride, row_stride}, from, 2, rows, head_dim, to,
                            got.data());
            std::vector<std::byte> expected(got.size());
            for (int64_t row = 0; row < rows; ++row) {
              for (int64_t i = 0; i < head_dim; ++i) {
                float wide = 0;
                WidenToFloat(Advance(static_cast<const void*>(values.data()),
                                     2 * head_stride + row * row_stride + i, from),
                             from, 1, &wide);
                NarrowFromFloat(&wide, 1, to,
                                Advance(static_cast<void*>(expected.data()), row * head_dim + i, to));
              }
            }
            EXPECT_TRUE(got == expected);
          }
        }
      }
    }
  }
}

// ---- Discard

constexpr int64_t kLayers = 2, kHeads = 3, kHeadDim = 4, kRows = 100;

KvTransferSpec Spec(int64_t num_tokens = kRows) {
  return {.request_id = "r",
          .transfer_id = "t",
          .plan = ShardPlan({1, 1}, num_tokens),
          .num_layers = kLayers,
          .num_kv_heads = kHeads,
          .head_dim = kHeadDim};
}

class DiscardSink : public testing::Test {
 protected:
  // key or value of a layer: [kHeads, kRows, kHeadDim] bf16
  const std::byte* Of(int64_t layer, bool key) const {
    return values_.data() + (layer * 2 + (key ? 0 : 1)) * kHeads * kRows * kHeadDim * 2;
  }
  absl::StatusOr<uint32_t> Checksum(const std::vector<int64_t>& cuts) {
    LF_ASSIGN_OR_RETURN(const auto sink, MakeKvDiscardSinkFactory()(Spec()));
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      int64_t begin = 0;
      for (const int64_t end : cuts) {
        const auto view = [&](bool key) {
          return HeadsView<const void>{Of(layer, key) + begin * kHeadDim * 2, kRows * kHeadDim, kHeadDim};
        };
        LF_RETURN_IF_ERROR(sink->Append(layer, begin, end, view(true), view(false), DType::kBFloat16));
        begin = end;
      }
    }
    LF_RETURN_IF_ERROR(sink->Finish(absl::OkStatus()));
    return sink->checksum().value_or(0);
  }
  std::vector<std::byte> values_ = Values(kLayers * 2 * kHeads * kRows * kHeadDim, DType::kBFloat16);
};

TEST_F(DiscardSink, ChecksumIsThatOfTheHeadsWhateverThePieces) {
  uint32_t expected = 0;
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    for (const bool key : {true, false}) {
      for (int64_t head = 0; head < kHeads; ++head) {
        const uint32_t crc = Crc32c(Of(layer, key) + head * kRows * kHeadDim * 2, kRows * kHeadDim * 2);
        std::array<unsigned char, 4> bytes;
        for (size_t i = 0; i < 4; ++i) bytes[i] = static_cast<unsigned char>(crc >> (8 * i));
        expected = Crc32c(bytes.data(), 4, expected);
      }
    }
  }
  for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{100}, {1, 2, 99, 100}, {50, 50, 100}}) {
    LF_ASSERT_OK_AND_ASSIGN(const uint32_t got, Checksum(cuts));
    EXPECT_EQ(got, expected);
  }
  values_[777] ^= std::byte{1};
  LF_ASSERT_OK_AND_ASSIGN(const uint32_t changed, Checksum({100}));
  EXPECT_NE(changed, expected);
}

TEST_F(DiscardSink, RowsOutOfOrderAndMissingLayersAreErrors) {
  LF_ASSERT_OK_AND_ASSIGN(const auto sink, MakeKvDiscardSinkFactory()(Spec()));
  const HeadsView<const void> view = {Of(0, true), kRows * kHeadDim, kHeadDim};
  EXPECT_THAT(sink->Append(0, 1, 2, view, view, DType::kBFloat16),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("row 0 of layer 0 is next")));
  EXPECT_THAT(sink->Append(1, 0, 100, view, view, DType::kBFloat16),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("layer 1 came")));
  LF_EXPECT_OK(sink->Append(0, 0, 100, view, view, DType::kBFloat16));
  EXPECT_THAT(sink->Finish(absl::OkStatus()),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("1 of 2 layers")));
  LF_EXPECT_OK(sink->Finish(absl::CancelledError("gone")));
  LF_ASSERT_OK_AND_ASSIGN(const auto empty, MakeKvDiscardSinkFactory()(Spec(0)));
  LF_EXPECT_OK(empty->Append(0, 0, 0, {}, {}, DType::kBFloat16));
  LF_EXPECT_OK(empty->Finish(absl::OkStatus()));
}

// ---- Memory in files

TEST(FileMemory, HoldsAKvStoreAndLeavesNoFile) {
  const TempDir directory;
  LF_ASSERT_OK_AND_ASSIGN(const auto memory, FileMemoryResource::Create(directory.path()));
  {
    const std::unique_ptr<KvTier> tier = MakeMemoryTier(memory.get());
    KvStore store({}, tier.get());
    const std::vector<std::byte> values = Values(kHeads * kRows * kHeadDim, DType::kFloat32);
    const HeadsView<const void> view = {values.data(), kRows * kHeadDim, kHeadDim};
    LF_ASSERT_OK_AND_ASSIGN(const auto sink, store.Open(Spec()));
    EXPECT_EQ(memory->bytes_in_use(), Spec().OwnedBytes());
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      LF_ASSERT_OK(sink->Append(layer, 0, kRows, view, view, DType::kFloat32));
    }
    LF_ASSERT_OK(sink->Finish(absl::OkStatus()));
    LF_ASSERT_OK_AND_ASSIGN(const auto reader, store.Read("t"));
    std::string key, value;
    LF_ASSERT_OK(reader->Copy(1, {.num_tokens = kRows}, KvLayout::kHeadsTokens, &key, &value));
    ASSERT_EQ(value.size(), values.size());
    EXPECT_EQ(std::memcmp(value.data(), values.data(), values.size()), 0);
    EXPECT_THAT(directory.List(), IsEmpty());
    LF_ASSERT_OK(store.End("t", TransferState::kComplete, absl::OkStatus()).status());
  }
  EXPECT_EQ(memory->bytes_in_use(), 0);
}

TEST(FileMemory, WhatTheDiskDoesNotHoldIsAnErrorAtOnce) {
  const TempDir directory;
  LF_ASSERT_OK_AND_ASSIGN(const auto memory, FileMemoryResource::Create(directory.path()));
  EXPECT_THAT(memory->Allocate(int64_t{1} << 60, "a cache"),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("a cache")));
  EXPECT_THAT(directory.List(), IsEmpty());
  EXPECT_THAT(FileMemoryResource::Create(directory.File("missing")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("missing")));
}

}  // namespace
}  // namespace longfill
