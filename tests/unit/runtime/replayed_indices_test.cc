// Recorded selections: what is read, what is refused, and that every head gets its own budget from the right
// row.

#include "runtime/engine/replayed_indices.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "kernels/sparse/coverage.h"
#include "tests/testing/host_index.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kTokens = 1000;
constexpr int64_t kLayers = 2;
constexpr int64_t kHeads = 3;
constexpr int64_t kVertical = 200;
constexpr int64_t kSlash = 300;

// Rows of distinct values of [0, kTokens), in random order.
std::vector<int32_t> RankedRows(int64_t row_length, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> all(kTokens);
  std::iota(all.begin(), all.end(), 0);
  std::vector<int32_t> rows;
  for (int64_t row = 0; row < kLayers * kHeads; ++row) {
    std::shuffle(all.begin(), all.end(), random);
    rows.insert(rows.end(), all.begin(), all.begin() + row_length);
  }
  return rows;
}

struct Recording {
  std::vector<int32_t> vertical = RankedRows(kVertical, 1);
  std::vector<int32_t> slash = RankedRows(kSlash, 2);
  std::string tokens = absl::StrCat(kTokens);
  std::string vertical_shape = absl::StrCat("[", kLayers, ",", kHeads, ",", kVertical, "]");
  std::string slash_shape = absl::StrCat("[", kLayers, ",", kHeads, ",", kSlash, "]");
  std::string dtype = "I32";

  std::string Bytes() const {
    const size_t split = vertical.size() * sizeof(int32_t);
    const size_t end = split + slash.size() * sizeof(int32_t);
    std::string data(end, '\0');
    std::copy_n(reinterpret_cast<const char*>(vertical.data()), split, data.begin());
    std::copy_n(reinterpret_cast<const char*>(slash.data()), end - split,
                data.begin() + static_cast<std::ptrdiff_t>(split));
    return SafetensorsBytes(
        absl::StrCat(R"({"__metadata__":{"tokens":")", tokens, R"("},"vertical":{"dtype":")", dtype,
                     R"(","shape":)", vertical_shape, R"(,"data_offsets":[0,)", split,
                     R"(]},"slash":{"dtype":")", dtype, R"(","shape":)", slash_shape, R"(,"data_offsets":[)",
                     split, ",", end, "]}}"),
        data);
  }
};

absl::StatusOr<RecordedIndices> LoadFrom(const std::string& bytes) {
  const TempDir dir;
  WriteText(dir.File("recorded.safetensors"), bytes);
  return RecordedIndices::Load(dir.File("recorded.safetensors"));
}

RecordedIndices Recorded() {
  auto recorded = LoadFrom(Recording().Bytes());
  EXPECT_THAT(recorded, IsOk());
  return *std::move(recorded);
}

PatternSet Uniform(const HeadPattern& pattern) { return PatternSet::Uniform(pattern, 5, 4); }

std::vector<int32_t> Ascending(std::span<const int32_t> values) {
  std::vector<int32_t> sorted(values.begin(), values.end());
  std::sort(sorted.begin(), sorted.end());
  return sorted;
}

TEST(RecordedIndices, HoldsWhatTheFileHolds) {
  const RecordedIndices recorded = Recorded();
  const Recording recording;
  EXPECT_EQ(recorded.num_tokens(), kTokens);
  EXPECT_EQ(recorded.num_layers(), kLayers);
  EXPECT_EQ(recorded.num_heads(), kHeads);
  EXPECT_EQ(recorded.max_vertical(), kVertical);
  EXPECT_EQ(recorded.max_slash(), kSlash);
  EXPECT_TRUE(std::ranges::equal(recorded.vertical(1, 2), std::span(recording.vertical).last(kVertical)));
  EXPECT_TRUE(std::ranges::equal(recorded.slash(0, 1), std::span(recording.slash).subspan(kSlash, kSlash)));
}

TEST(RecordedIndices, RefusesFilesOfAnotherForm) {
  struct Case {
    std::function<void(Recording&)> spoil;
    std::string message;
  };
  const Case cases[] = {
      {[](Recording& r) { r.tokens = ""; }, "metadata tokens"},
      {[](Recording& r) { r.tokens = "1000x"; }, "metadata tokens"},
      {[](Recording& r) { r.tokens = "0"; }, "metadata tokens"},
      {[](Recording& r) { r.dtype = "U32"; }, "\"vertical\" is U32"},
      {[](Recording& r) { r.vertical_shape = absl::StrCat("[", kLayers * kHeads, ",", kVertical, "]"); },
       "of rank 2"},
      {[](Recording& r) { r.slash_shape = absl::StrCat("[", kHeads, ",", kLayers, ",", kSlash, "]"); },
       "recorded of 2 x 3"},
      {[](Recording& r) { r.vertical[kVertical + 7] = -1; }, "vertical[0, 1, 7] = -1"},
      {[](Recording& r) { r.slash[4 * kSlash + 9] = kTokens; }, "slash[1, 1, 9] = 1000 is not in [0, 1000)"},
      {[](Recording& r) { r.slash[5] = r.slash[200]; }, "slash[0, 0, 200]"},
  };
  for (const Case& bad : cases) {
    Recording recording;
    bad.spoil(recording);
    EXPECT_THAT(LoadFrom(recording.Bytes()),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(bad.message)));
  }
  EXPECT_THAT(LoadFrom(SafetensorsBytes(R"({"__metadata__":{"tokens":"5"}})", "")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no tensor \"vertical\"")));
  EXPECT_THAT(LoadFrom("no safetensors"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("recorded")));
  EXPECT_THAT(RecordedIndices::Load("/nowhere/x.safetensors"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("/nowhere/x.safetensors")));
}

TEST(RecordedIndices, NamesBothLengthsWhereTheyDiffer) {
  EXPECT_THAT(Recorded().CheckReplays(Uniform(VerticalSlash{30, 50}), 999),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("1000"), HasSubstr("999"))));
}

TEST(RecordedIndices, RefusesBudgetsThatWereNotRecorded) {
  const RecordedIndices recorded = Recorded();
  EXPECT_THAT(recorded.CheckReplays(Uniform(VerticalSlash{kVertical, kSlash}), kTokens), IsOk());
  PatternSet patterns = Uniform(VerticalSlash{30, 50});
  patterns.Set(3, 2, VerticalSlash{kVertical + 1, 50});
  EXPECT_THAT(recorded.CheckReplays(patterns, kTokens),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("layer 3, head 2"), HasSubstr("201"), HasSubstr("200 keys and 300"))));
  EXPECT_THAT(recorded.CheckReplays(Uniform(VerticalSlash{30, kSlash + 1}), kTokens),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("301")));
}

TEST(RecordedIndices, RefusesWhatItHasNothingFor) {
  const RecordedIndices recorded = Recorded();
  EXPECT_THAT(recorded.CheckReplays(Uniform(BlockSparse{100}), kTokens),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("block-sparse:100")));
  for (const HeadPattern& pattern : {HeadPattern(Dense{}), HeadPattern(AShape{1, 64})}) {
    EXPECT_THAT(recorded.CheckReplays(Uniform(pattern), kTokens),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("nothing to replay")));
  }
}

TEST(RecordedIndices, EveryHeadTakesItsBudgetFromLayersAndHeadsInTurn) {
  const RecordedIndices recorded = Recorded();
  for (int64_t layer = 0; layer < 5; ++layer) {
    PatternSet patterns = Uniform(VerticalSlash{0, 0});
    for (int64_t head = 0; head < 4; ++head) {
      patterns.Set(layer, head, VerticalSlash{40 + 10 * head, 60 + layer});
    }
    const std::vector<SparseIndex> indices = recorded.IndicesOfLayer(patterns, layer, Coverage::kTiles);
    ASSERT_EQ(indices.size(), 4u);
    for (int64_t head = 0; head < 4; ++head) {
      const auto& index = std::get<DiagonalColumnIndex>(indices[static_cast<size_t>(head)]);
      EXPECT_EQ(index.columns,
                Ascending(recorded.vertical(layer % kLayers, head % kHeads).first(40 + 10 * head)));
      std::vector<int32_t> distances =
          Ascending(recorded.slash(layer % kLayers, head % kHeads).first(60 + layer));
      if (distances.front() != 0) distances.insert(distances.begin(), 0);
      EXPECT_EQ(index.distances, distances) << layer << " " << head;
      EXPECT_THAT(ValidateIndex(indices[static_cast<size_t>(head)], kTokens), IsOk());
    }
  }
}

TEST(RecordedIndices, BudgetsAreClampedAsAtRunTimeAndOtherHeadsNeedNoRecord) {
  PatternSet patterns = Uniform(VerticalSlash{0, 1});
  patterns.Set(0, 1, Dense{});
  patterns.Set(0, 2, AShape{5, 64});
  const std::vector<SparseIndex> indices = Recorded().IndicesOfLayer(patterns, 0, Coverage::kParity);
  const auto& clamped = std::get<DiagonalColumnIndex>(indices[0]);
  EXPECT_EQ(clamped.columns.size(), 30u);
  EXPECT_THAT(clamped.distances.size(), testing::AnyOf(50u, 51u));  // distance 0 is added
  EXPECT_EQ(clamped.coverage, Coverage::kParity);
  EXPECT_EQ(indices[1], MakeDenseIndex());
  EXPECT_EQ(indices[2], MakeAShapeIndex({5, 64}));
}

class ReplayedIndicesTest : public testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = CreateCpuBackend(1);
};

TEST_F(ReplayedIndicesTest, PutsItsOwnViewsAndPairCountsIntoTheIndexOfALayer) {
  const RecordedIndices recorded = Recorded();
  PatternSet patterns = Uniform(VerticalSlash{100, 60});
  patterns.Set(4, 3, AShape{10, 128});
  LF_ASSERT_OK_AND_ASSIGN(const auto replayed, ReplayedIndices::Create(recorded, patterns, Coverage::kTiles));
  const int64_t before = backend_->memory().bytes_in_use();
  for (int prompt = 0; prompt < 2; ++prompt) {
    ASSERT_THAT(replayed->Begin(*backend_, kTokens), IsOk());
    EXPECT_EQ(backend_->memory().bytes_in_use() - before, replayed->PlanBytes(kTokens));
    for (int64_t layer = 0; layer < 5; ++layer) {
      LayerIndex index;
      index.seconds = 1.5;
      ASSERT_THAT(replayed->Replace(layer, &index), IsOk());
      const std::vector<SparseIndex> expected = recorded.IndicesOfLayer(patterns, layer, Coverage::kTiles);
      ASSERT_EQ(index.heads.size(), expected.size());
      ASSERT_EQ(index.pairs.size(), expected.size());
      EXPECT_EQ(index.seconds, 1.5);  // of what was built
      for (size_t head = 0; head < expected.size(); ++head) {
        const auto& want = std::get<DiagonalColumnIndex>(expected[head]);
        const IndexView& got = index.heads[head];
        EXPECT_TRUE(std::ranges::equal(std::span(got.columns, want.columns.size()), want.columns));
        EXPECT_TRUE(std::ranges::equal(std::span(got.runs, want.runs.size()), want.runs));
        EXPECT_EQ(got.counts->distances, static_cast<int32_t>(want.distances.size()));
        EXPECT_EQ(index.pairs[head], CountPairs(HostIndex(expected[head]).view(), kTokens))
            << layer << " " << head;
      }
    }
    replayed->End();
    EXPECT_EQ(backend_->memory().bytes_in_use(), before);
  }
}

TEST_F(ReplayedIndicesTest, PromptsOfAnotherLengthKeepWhatWasBuilt) {
  LF_ASSERT_OK_AND_ASSIGN(
      const auto replayed,
      ReplayedIndices::Create(Recorded(), Uniform(VerticalSlash{100, 60}), Coverage::kTiles));
  const int64_t before = backend_->memory().bytes_in_use();
  EXPECT_EQ(replayed->PlanBytes(kTokens + 1), 0);
  ASSERT_THAT(replayed->Begin(*backend_, kTokens + 1), IsOk());
  EXPECT_EQ(backend_->memory().bytes_in_use(), before);
  LayerIndex index;
  index.pairs = {{.published = 3, .covered = 4}};
  ASSERT_THAT(replayed->Replace(0, &index), IsOk());
  EXPECT_TRUE(index.heads.empty());
  EXPECT_EQ(index.pairs, (std::vector<PairCounts>{{.published = 3, .covered = 4}}));
  replayed->End();
}

TEST(SharedRecordings, PublishedPatternsOfLlama3CanBeReplayed) {
  const std::string shared = LONGFILL_SHARED_DIR;
  for (const int64_t tokens : {131072, 524288, 1048576}) {
    const std::string file = absl::StrCat(shared, "/data/needle_indices_", tokens, ".safetensors");
    if (!std::filesystem::exists(file)) GTEST_SKIP() << "no " << file;
    LF_ASSERT_OK_AND_ASSIGN(const RecordedIndices recorded, RecordedIndices::Load(file));
    LF_ASSERT_OK_AND_ASSIGN(
        const PatternSet patterns,
        LoadPatternFile(shared + "/patterns/Llama_3_8B_Instruct_262k_kv_out_v32_fit_o_best_pattern.json", 32,
                        32));
    EXPECT_THAT(recorded.CheckReplays(patterns, tokens), IsOk());
  }
}

}  // namespace
}  // namespace longfill
