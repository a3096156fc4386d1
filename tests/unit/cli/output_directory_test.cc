#include "deploy/cli/output_directory.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "models/file_io.h"
#include "models/safetensors.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAreArray;

class OutputDirectoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "longfill-output-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
  }
  void TearDown() override { fs::remove_all(root_); }

  void Write(const fs::path& name, const std::string& text = "x") {
    fs::create_directories((root_ / name).parent_path());
    std::ofstream(root_ / name) << text;
  }
  // All files below the root, sorted.
  std::vector<std::string> Files() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::recursive_directory_iterator(root_)) {
      if (!entry.is_directory()) names.push_back(fs::relative(entry.path(), root_).string());
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  fs::path root_;
};

TEST_F(OutputDirectoryTest, IsMadeWithItsParentsAndGoesWhenNothingCameOfIt) {
  const fs::path out = root_ / "a" / "b";
  {
    LF_ASSERT_OK_AND_ASSIGN(const auto directory, OutputDirectory::Open(out.string(), 2, false));
    LF_ASSERT_OK(directory->Prepare());
    EXPECT_TRUE(fs::is_directory(directory->Folder(1)));
    std::ofstream(fs::path(directory->Folder(0)) / "kv-layer-000-rank-000.safetensors") << "half";
  }
  EXPECT_FALSE(fs::exists(root_ / "a"));
}

TEST_F(OutputDirectoryTest, StaysWhenKept) {
  {
    LF_ASSERT_OK_AND_ASSIGN(const auto directory, OutputDirectory::Open((root_ / "out").string(), 1, false));
    LF_ASSERT_OK(directory->Prepare());
    LF_ASSERT_OK(WriteTextFile(directory->Folder(0) + "/manifest.json", "{}"));
    directory->Keep();
  }
  EXPECT_THAT(Files(), ElementsAre("out/manifest.json"));
}

TEST_F(OutputDirectoryTest, RefusesToWriteBesideOtherFilesUnlessAsked) {
  Write("notes.txt");
  EXPECT_THAT(OutputDirectory::Open(root_.string(), 1, false),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--overwrite")));
  LF_EXPECT_OK(OutputDirectory::Open(root_.string(), 1, true));
  EXPECT_THAT(Files(), ElementsAre("notes.txt"));
}

TEST_F(OutputDirectoryTest, OverwriteRemovesOnlyFilesOfAnEarlierResult) {
  for (const char* name :
       {"manifest.json", "logits.safetensors", "kv-layer-000-rank-001.safetensors", "notes.txt",
        "manifest.json.partial-77", "kv-layer-1000-rank-001.safetensors.partial-77-3", "000/manifest.json",
        "000/mine.txt", "001/kv-layer-000-rank-000.safetensors"}) {
    Write(name);
  }
  const std::vector<std::string> others = {"sub/manifest.json",
                                           "2024/manifest.json",
                                           "manifest.json.bak",
                                           "manifest.json.partial-",
                                           "manifest.json.partial-7x",
                                           "kv-layer-notes.md",
                                           "kv-layer-000-rank-000.safetensors.old",
                                           "logits.safetensors2"};
  for (const std::string& name : others) Write(name);
  LF_ASSERT_OK_AND_ASSIGN(const auto directory, OutputDirectory::Open(root_.string(), 1, true));
  EXPECT_EQ(Files().size(), 9 + others.size()) << "Open removes nothing";
  LF_ASSERT_OK(directory->Prepare());
  std::vector<std::string> left = others;
  left.insert(left.end(), {"000/mine.txt", "notes.txt"});
  EXPECT_THAT(Files(), UnorderedElementsAreArray(left));
  EXPECT_FALSE(fs::exists(root_ / "001"));
}

TEST_F(OutputDirectoryTest, NamesWhatIsNoDirectory) {
  Write("file");
  EXPECT_THAT(OutputDirectory::Open((root_ / "file").string(), 1, true),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not a directory")));
  EXPECT_THAT(OutputDirectory::Open((root_ / "file" / "below").string(), 1, true),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("file")));
}

TEST_F(OutputDirectoryTest, NamesADirectoryThatItMayNotRead) {
  if (geteuid() == 0) GTEST_SKIP() << "root may read every directory";
  fs::permissions(root_, fs::perms::none);
  EXPECT_THAT(OutputDirectory::Open(root_.string(), 1, true),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr(root_.string())));
  fs::permissions(root_, fs::perms::owner_all);
}

TEST_F(OutputDirectoryTest, TextFilesAreWholeOrAbsent) {
  LF_ASSERT_OK(WriteTextFile((root_ / "manifest.json").string(), "one"));
  LF_ASSERT_OK(WriteTextFile((root_ / "manifest.json").string(), "two"));
  std::stringstream text;
  text << std::ifstream(root_ / "manifest.json").rdbuf();
  EXPECT_EQ(text.str(), "two");
  EXPECT_THAT(Files(), ElementsAre("manifest.json"));
  EXPECT_THAT(WriteTextFile("/dev/full/x", "x"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("/dev/full/x")));
}

TEST_F(OutputDirectoryTest, LogitsFileHoldsPositionsInTheOrderAsked) {
  const std::vector<int64_t> positions = {9, 3};
  const std::vector<float> logits = {1, 2, 3, 4, 5, 6};
  LF_ASSERT_OK(WriteLogitsFile(root_.string(), positions, logits, 3));
  LF_ASSERT_OK_AND_ASSIGN(const auto file, SafetensorsFile::Open((root_ / "logits.safetensors").string()));
  ASSERT_NE(file->Find("logits"), nullptr);
  EXPECT_THAT(file->Find("logits")->shape, ElementsAre(2, 3));
  EXPECT_EQ(file->Find("positions")->stored_dtype, "I64");
  EXPECT_THAT(file->Find("positions")->shape, ElementsAre(2));
  int64_t first = 0;
  std::copy_n(file->Find("positions")->bytes.data(), sizeof(first), reinterpret_cast<std::byte*>(&first));
  EXPECT_EQ(first, 9);
}

}  // namespace
}  // namespace longfill
