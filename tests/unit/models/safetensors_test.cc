#include "models/safetensors.h"

#include <sys/stat.h>

#include <cstring>
#include <random>
#include <utility>

#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string Data(size_t size) { return std::string(size, '\1'); }

TEST(SafetensorsFile, ExposesTensorsInTheOrderOfTheirBytes) {
  const TempDir dir;
  const std::string header = R"({"__metadata__":{"format":"pt"},)"
                             R"("b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                             R"("empty":{"dtype":"F16","shape":[0,3],"data_offsets":[8,8]},)"
                             R"("a":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]},)"
                             R"("scalar":{"dtype":"I64","shape":[],"data_offsets":[12,20]},)"
                             R"("odd":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[20,23]}}   )";
  WriteText(dir.File("m"), SafetensorsBytes(header, Data(23)));
  LF_ASSERT_OK_AND_ASSIGN(const auto file, SafetensorsFile::Open(dir.File("m")));
  std::vector<std::string> names;
  for (const SafetensorsTensor& tensor : file->tensors()) names.push_back(tensor.name);
  EXPECT_EQ(names, (std::vector<std::string>{"b", "empty", "a", "scalar", "odd"}));
  EXPECT_EQ(file->metadata().at("format"), "pt");
  EXPECT_EQ(file->header_bytes(), static_cast<int64_t>(header.size()));
  const SafetensorsTensor* a = file->Find("a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(a->dtype, DType::kBFloat16);
  EXPECT_EQ(a->shape, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(a->file_offset, 8 + static_cast<int64_t>(header.size()) + 8);
  EXPECT_EQ(a->bytes.size(), 4u);
  EXPECT_EQ(file->Find("odd")->dtype, std::nullopt);
  EXPECT_EQ(file->Find("odd")->stored_dtype, "F8_E4M3");
  EXPECT_EQ(file->Find("none"), nullptr);
}

TEST(SafetensorsFile, ViewsOutliveTheFilesName) {
  const TempDir dir;
  WriteText(dir.File("m"), SafetensorsOf({{"x", "F32", {2}}}));
  LF_ASSERT_OK_AND_ASSIGN(const auto file, SafetensorsFile::Open(dir.File("m")));
  std::filesystem::remove(dir.File("m"));
  EXPECT_EQ(static_cast<int>(file->Find("x")->bytes[1]), 7);
}

TEST(SafetensorsFile, AnEmptyHeaderHoldsNothing) {
  const TempDir dir;
  WriteText(dir.File("m"), SafetensorsBytes("{}", ""));
  LF_ASSERT_OK_AND_ASSIGN(const auto file, SafetensorsFile::Open(dir.File("m")));
  EXPECT_TRUE(file->tensors().empty());
}

TEST(SafetensorsFile, RefusesWhatIsNoPlainFile) {
  const TempDir dir;
  EXPECT_THAT(SafetensorsFile::Open(dir.File("none")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  EXPECT_THAT(SafetensorsFile::Open(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("plain file")));
  ASSERT_EQ(mkfifo(dir.File("fifo").c_str(), 0600), 0);
  EXPECT_THAT(SafetensorsFile::Open(dir.File("fifo")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("plain file")));
}

struct Hostile {
  const char* header;
  size_t data_bytes;
  const char* message;
};

TEST(SafetensorsFile, RefusesHostileHeaders) {
  const Hostile cases[] = {
      {"", 0, "does not begin with '{'"},
      {" {}", 0, "does not begin with '{'"},
      {"[]", 0, "does not begin with '{'"},
      {"{", 0, "not valid JSON"},
      {"{}x", 0, "not valid JSON"},
      {"{}{}", 0, "not valid JSON"},
      {"{\"\xff\":1}", 0, "not valid JSON"},
      {R"({"x":1})", 0, "'x' must have dtype, shape and data_offsets"},
      {R"({"x":{}})", 0, "'x' must have dtype, shape and data_offsets"},
      {R"({"x":{"dtype":"F32","shape":[2]}})", 8, "must have dtype, shape and data_offsets"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1}})", 8, "nothing else"},
      {R"({"x":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}})", 8, "unknown dtype '\\\"F31\\\"'"},
      {R"({"x":{"dtype":4,"shape":[2],"data_offsets":[0,8]}})", 8, "unknown dtype '4'"},
      {R"({"x":{"dtype":"F32","shape":2,"data_offsets":[0,8]}})", 8, "shape that is no list"},
      {R"({"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8, "bad extent '-2'"},
      {R"({"x":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", 8, "bad extent '2.0'"},
      {R"({"x":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}})", 8, "bad extent"},
      {R"({"x":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]}})", 8, "bad extent"},
      {R"({"x":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}})", 8,
       "at most 16"},
      {R"({"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}})", 8, "representable"},
      {R"({"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, "representable"},
      {R"({"x":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}})", 1, "no whole"},
      {R"({"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8,
       "needs 12 bytes, its data_offsets span 8"},
      {R"({"x":{"dtype":"F32","shape":[],"data_offsets":[0,8]}})", 8, "needs 4 bytes"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0]}})", 8, "not two numbers"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":{"0":8}}})", 8, "not two numbers"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, "outside the file's 8 bytes"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}})", 8, "outside the file's 8 bytes"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4, "outside the file's 4 bytes"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,18446744073709551615]}})", 8,
       "outside"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 9, "tensors end at byte"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8, "leaving a hole"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
       12, "'y' begins at byte"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
       12, "inside the tensor before it"},
      {R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       8, "inside the tensor before it"},
      {R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       8, "duplicate key 'x'"},
      {R"({"x":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4, "duplicate key 'dtype'"},
      {R"({"__metadata__":{"a":1}})", 0, "__metadata__ 'a' is no string"},
      {R"({"__metadata__":[]})", 0, "__metadata__ is no object"},
      {R"({"x":{"dtype":[[[[[[1]]]]]]}})", 0, "nested deeper than"},
  };
  const TempDir dir;
  for (const Hostile& hostile : cases) {
    WriteText(dir.File("m"), SafetensorsBytes(hostile.header, Data(hostile.data_bytes)));
    EXPECT_THAT(
        SafetensorsFile::Open(dir.File("m")),
        StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr(dir.File("m")), HasSubstr(hostile.message))))
        << hostile.header;
  }
}

TEST(SafetensorsFile, RefusesHostileHeaderLengths) {
  const TempDir dir;
  const std::string valid = SafetensorsOf({{"x", "F32", {2}}});
  const std::pair<uint64_t, const char*> lengths[] = {
      {valid.size() - 7, "reaches beyond the file"},
      {100'000'000, "reaches beyond the file"},
      {100'000'001, "above the limit of 100000000"},
      {UINT64_MAX, "above the limit"},
      {uint64_t{1} << 63, "above the limit"},
      {0, "does not begin with '{'"},
      {1, "not valid JSON"},
  };
  for (const auto& [length, message] : lengths) {
    std::string bytes = valid;
    std::memcpy(bytes.data(), &length, sizeof(length));
    WriteText(dir.File("m"), bytes);
    EXPECT_THAT(SafetensorsFile::Open(dir.File("m")),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(message)))
        << length;
  }
}

TEST(SafetensorsFile, RefusesEveryTruncation) {
  const TempDir dir;
  const std::string valid = SafetensorsOf({{"x", "F32", {2}}, {"y", "BF16", {3}}});
  for (size_t size = 0; size < valid.size(); ++size) {
    WriteText(dir.File("m"), valid.substr(0, size));
    EXPECT_THAT(SafetensorsFile::Open(dir.File("m")),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(dir.File("m"))))
        << size;
  }
}

TEST(SafetensorsFile, NestingAsDeepAsTheFileIsRefused) {
  const TempDir dir;
  WriteText(dir.File("m"), SafetensorsBytes("{\"x\":" + std::string(1 << 20, '['), ""));
  EXPECT_THAT(SafetensorsFile::Open(dir.File("m")),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("nested deeper")));
}

// Whatever a flipped bit makes of a file, opening it ends in a status or in views that lie inside the
// mapping.
TEST(SafetensorsFile, SurvivesEveryFlippedBitAndManyFlippedBytes) {
  const TempDir dir;
  const std::string valid = SafetensorsOf({{"x", "F32", {2, 3}}, {"y", "BF16", {5}}, {"z", "I64", {1}}});
  std::mt19937 random(20260);
  const auto check = [&](const std::string& bytes) {
    WriteText(dir.File("m"), bytes);
    const auto file = SafetensorsFile::Open(dir.File("m"));
    if (!file.ok()) {
      EXPECT_EQ(file.status().code(), absl::StatusCode::kDataLoss) << file.status();
      return;
    }
    int sum = 0;
    for (const SafetensorsTensor& tensor : (*file)->tensors()) {
      for (const std::byte byte : tensor.bytes) sum += static_cast<int>(byte);
    }
    EXPECT_GE(sum, 0);
  };
  for (size_t bit = 0; bit < valid.size() * 8; ++bit) {
    std::string bytes = valid;
    bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << (bit % 8)));
    check(bytes);
  }
  for (int round = 0; round < 2000; ++round) {
    std::string bytes = valid;
    const size_t first = round % 2 == 0 ? 8 : 0;  // half of the rounds leave the length alone
    for (int flips = 1 + static_cast<int>(random() % 4); flips > 0; --flips) {
      bytes[first + random() % (bytes.size() - first)] = "{}[]\",:0123456789-e\\ \xff"[random() % 22];
    }
    check(bytes);
  }
}

TEST(SafetensorsFile, OpensFilesWrittenByHuggingFace) {
  const std::vector<std::string> folders = GoldenModels();
  if (folders.empty()) GTEST_SKIP() << "tests/golden/data is absent";
  for (const std::string& folder : folders) {
    LF_ASSERT_OK_AND_ASSIGN(const auto file, SafetensorsFile::Open(folder + "/golden.safetensors"));
    EXPECT_NE(file->Find("logits"), nullptr) << folder;
    EXPECT_EQ(file->Find("positions")->dtype, DType::kInt64);
  }
}

}  // namespace
}  // namespace longfill
