#include "kernels/sparse/position_map.h"

#include <gtest/gtest.h>

#include <vector>

namespace longfill {
namespace {

// Maps with what they mean written out: the positions of their first rows.
struct Example {
  PositionMap map;
  std::vector<int64_t> positions;
};

std::vector<Example> Examples() {
  return {{PositionMap::Contiguous(5), {5, 6, 7, 8, 9}},
          {{1, 2, 6}, {1, 2, 7, 8, 13, 14, 19, 20}},
          // Three ranks, there and back in blocks of two: 0 0 1 1 2 2 2 2 1 1 0 0 0 0 ...
          {{0, 2, 6, 4}, {0, 1, 10, 11, 12, 13, 22, 23}},
          {{2, 2, 6, 0}, {2, 3, 8, 9, 14, 15, 20, 21}},
          {{4, 2, 6, -4}, {4, 5, 6, 7, 16, 17, 18, 19}}};
}

TEST(PositionMap, GivesThePositionsThatAreWrittenOut) {
  for (const auto& [map, positions] : Examples()) {
    SCOPED_TRACE(ToString(map));
    EXPECT_TRUE(map.Ascends());
    for (size_t row = 0; row < positions.size(); ++row) {
      EXPECT_EQ(map.Position(static_cast<int64_t>(row)), positions[row]) << "row " << row;
    }
  }
}

TEST(PositionMap, CountsRowsBelowAPositionFromAnyRowOn) {
  for (const auto& [map, positions] : Examples()) {
    for (int64_t from = 0; from < static_cast<int64_t>(positions.size()); ++from) {
      const PositionMap part = map.From(from);
      SCOPED_TRACE(ToString(part));
      int64_t below = 0;
      for (int64_t position = 0; position <= positions.back(); ++position) {
        EXPECT_EQ(part.RowsBelow(position), below) << "position " << position;
        if (position == part.Position(below)) ++below;
      }
      EXPECT_EQ(part.Position(0), positions[static_cast<size_t>(from)]);
    }
  }
}

TEST(PositionMap, CountsInWholeBlocksOfRows) {
  const PositionMap map = {256, 128, 384, -256, 128};
  ASSERT_TRUE(map.HasWholeBlocks(64));
  for (int64_t block = 0; block < 20; ++block) {
    EXPECT_EQ(map.OfBlocks(64).Position(block) * 64, map.Position(block * 64)) << "block " << block;
  }
  EXPECT_FALSE(map.HasWholeBlocks(256));
  EXPECT_TRUE(map.KeepsTogether(64, 1000));
  EXPECT_TRUE(PositionMap({256, 100, 384}).KeepsTogether(64, 100));
  EXPECT_FALSE(PositionMap({256, 100, 384}).KeepsTogether(64, 101));
  EXPECT_FALSE(PositionMap({255, 100, 384}).KeepsTogether(64, 100));
}

TEST(PositionMap, TellsWhichAscend) {
  for (const PositionMap& map :
       {PositionMap{-1, 2, 6}, PositionMap{0, 0, 6}, PositionMap{0, 8, 6}, PositionMap{0, 2, 6, 5},
        PositionMap{0, 2, 6, -5}, PositionMap{0, 2, 6, 0, -1}}) {
    EXPECT_FALSE(map.Ascends()) << ToString(map);
  }
}

}  // namespace
}  // namespace longfill
