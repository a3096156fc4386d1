#include "kernels/sparse/sparse_index.h"

#include <functional>
#include <string>

#include "kernels/sparse/coverage.h"
#include "tests/testing/host_index.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

TEST(MakeVerticalSlashIndex, SortsAndAddsDistanceZero) {
  const SparseIndex made = MakeVerticalSlashIndex({9, 2, 5}, {300, 64, 128, 129, 194}, Coverage::kTiles);
  const auto& index = std::get<DiagonalColumnIndex>(made);
  EXPECT_EQ(index.columns, (std::vector<int32_t>{2, 5, 9}));
  EXPECT_EQ(index.distances, (std::vector<int32_t>{0, 64, 128, 129, 194, 300}));
  EXPECT_EQ(index.runs, (std::vector<DistanceRun>{{0, 130, false}, {194, 195, false}, {300, 301, false}}));
  LF_EXPECT_OK(ValidateIndex(made, 301));
}

using Runs = std::vector<DistanceRun>;

TEST(CoarseRuns, GrowByWholePiecesFromTheLargestDistance) {
  EXPECT_EQ(CoarseRuns({}), Runs{});
  EXPECT_EQ(CoarseRuns(std::vector<int32_t>{0}), (Runs{{0, 1, false}}));
  // 500 and 499: one more piece for 499, which reaches down to 436 and takes in 437; 435 needs a third.
  EXPECT_EQ(CoarseRuns(std::vector<int32_t>{499, 500}), (Runs{{436, 501, false}}));
  EXPECT_EQ(CoarseRuns(std::vector<int32_t>{437, 499, 500}), (Runs{{436, 501, false}}));
  EXPECT_EQ(CoarseRuns(std::vector<int32_t>{435, 499, 500}), (Runs{{372, 501, false}}));
  // A distance 64 below the last piece adjoins it, one 65 below does not.
  EXPECT_EQ(CoarseRuns(std::vector<int32_t>{372, 499, 500}), (Runs{{372, 501, false}}));
  EXPECT_EQ(CoarseRuns(std::vector<int32_t>{371, 499, 500}), (Runs{{371, 372, false}, {436, 501, false}}));
}

TEST(CoarseRuns, EndAtDistanceZero) {
  EXPECT_EQ(CoarseRuns(std::vector<int32_t>{0, 30}), (Runs{{0, 31, false}}));
  EXPECT_EQ(CoarseRuns(std::vector<int32_t>{0, 64, 65}), (Runs{{0, 66, false}}));
  // 110, 46 and -18, although 100 is more than 64 above 0.
  EXPECT_EQ(CoarseRuns(std::vector<int32_t>{0, 100, 110, 200}), (Runs{{0, 111, false}, {200, 201, false}}));
}

TEST(MakeVerticalSlashIndex, OfNothingIsTheDiagonal) {
  for (const Coverage coverage : {Coverage::kTiles, Coverage::kParity}) {
    const SparseIndex index = MakeVerticalSlashIndex({}, {}, coverage);
    EXPECT_EQ(std::get<DiagonalColumnIndex>(index).distances, std::vector<int32_t>{0});
    LF_EXPECT_OK(ValidateIndex(index, 1));
    EXPECT_EQ(CountPairs(HostIndex(index).view(), 1), (PairCounts{1, 1}));
  }
}

TEST(ValidateIndex, AcceptsWhatTheLoweringsMake) {
  for (const int64_t n : {1, 64, 65, 1000}) {
    LF_EXPECT_OK(ValidateIndex(MakeDenseIndex(), n));
    LF_EXPECT_OK(ValidateIndex(MakeAShapeIndex({100, 50}), n));
    LF_EXPECT_OK(ValidateIndex(MakeAShapeIndex({0, 1}, n), n));
    LF_EXPECT_OK(ValidateIndex(MakeVerticalSlashIndex({0}, {0}, Coverage::kTiles), n));
    LF_EXPECT_OK(ValidateIndex(MakeVerticalSlashIndex({0}, {0}, Coverage::kParity), n));
  }
}

struct BrokenDiagonal {
  const char* message;
  std::function<void(DiagonalColumnIndex&)> damage;
};

TEST(ValidateIndex, NamesWhatIsBrokenInADiagonalColumnIndex) {
  const BrokenDiagonal cases[] = {
      {"distances[2] = 200 is not in [0, 200)", [](auto& x) { x.distances[2] = 200; }},
      {"distances[0] = -1 is not in", [](auto& x) { x.distances[0] = -1; }},
      {"distances[1] = 0 follows 0", [](auto& x) { x.distances[1] = 0; }},
      {"distances[2] = 4 follows 5", [](auto& x) { x.distances[2] = 4; }},
      {"distance 0 is missing", [](auto& x) { x.distances.erase(x.distances.begin()); }},
      {"columns[1] = 200 is not in [0, 200)", [](auto& x) { x.columns[1] = 200; }},
      {"columns[0] = -7 is not in", [](auto& x) { x.columns[0] = -7; }},
      {"columns[1] = 3 follows 3", [](auto& x) { x.columns[1] = 3; }},
      {"are not those of the 3 distances", [](auto& x) { x.runs.pop_back(); }},
      {"are not those of the 3 distances", [](auto& x) { x.runs[1].d_hi = 102; }},
      {"are not those of the 3 distances", [](auto& x) { x.runs[1].exact = true; }},
      {"runs[0] = [6, 6) is empty or negative",
       [](auto& x) {
         x.runs[0] = {6, 6, false};
       }},
      {"runs[0] = [-1, 6) is empty or negative", [](auto& x) { x.runs[0].d_lo = -1; }},
      {"runs[1] starts at 5 before the end 6", [](auto& x) { x.runs[1].d_lo = 5; }},
      {"runs[1] starts at 68, nearer than 64",
       [](auto& x) {
         x.runs[1] = {68, 101, true};
       }},
      {"parity coverage without distances",
       [](auto& x) {
         x.distances.clear();
         x.coverage = Coverage::kParity;
       }},
  };
  for (const BrokenDiagonal& c : cases) {
    auto index = std::get<DiagonalColumnIndex>(MakeVerticalSlashIndex({3, 9}, {0, 5, 100}, Coverage::kTiles));
    c.damage(index);
    EXPECT_THAT(ValidateIndex(index, 200), StatusIs(absl::StatusCode::kInternal, HasSubstr(c.message)));
  }
}

struct BrokenBlocks {
  const char* message;
  std::function<void(BlockListIndex&)> damage;
};

TEST(ValidateIndex, NamesWhatIsBrokenInABlockListIndex) {
  const BrokenBlocks cases[] = {
      {"row_offsets has 4 entries, expected 5 for 200 tokens", [](auto& x) { x.row_offsets.pop_back(); }},
      {"row_offsets run from 1 to 7", [](auto& x) { x.row_offsets[0] = 1; }},
      {"row_offsets run from 0 to 9, expected 0 to 7", [](auto& x) { x.row_offsets[4] = 9; }},
      {"row_offsets[3] = 2 is below 3", [](auto& x) { x.row_offsets[3] = 2; }},
      {"row_offsets[4] = 7 is below 99", [](auto& x) { x.row_offsets[3] = 99; }},
      {"key block 3 of row block 2 is not in [0, 2]", [](auto& x) { x.key_blocks[4] = 3; }},
      {"key block -1 of row block 0 is not in [0, 0]", [](auto& x) { x.key_blocks[0] = -1; }},
      {"key block 0 of row block 1 follows 0", [](auto& x) { x.key_blocks[2] = 0; }},
  };
  const BlockListIndex good{{0, 1, 3, 5, 7}, {0, 0, 1, 0, 2, 0, 3}};
  LF_ASSERT_OK(ValidateIndex(good, 200));
  for (const BrokenBlocks& c : cases) {
    BlockListIndex index = good;
    c.damage(index);
    EXPECT_THAT(ValidateIndex(index, 200), StatusIs(absl::StatusCode::kInternal, HasSubstr(c.message)));
  }
}

}  // namespace
}  // namespace longfill
