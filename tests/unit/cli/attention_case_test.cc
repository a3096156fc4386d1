#include "deploy/cli/attention_case.h"

#include <algorithm>
#include <set>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

TEST(RandomBlockSpecs, AreReadAndRefusedByName) {
  LF_ASSERT_OK_AND_ASSIGN(const RandomBlocks blocks, ParseRandomBlocks("random-blocks:12.5,128x64"));
  EXPECT_EQ(blocks.percent, 12.5);
  EXPECT_EQ(blocks.block_rows, 128);
  EXPECT_EQ(blocks.block_keys, 64);
  EXPECT_EQ(blocks.min_blocks, kMinRandomBlocks);
  for (const char* text :
       {"random-blocks:", "random-blocks:0,64x64", "random-blocks:101,64x64", "random-blocks:5,64x32",
        "random-blocks:1.2.3,64x64", "random-blocks:5,64x64,", "random-blocks:5x64,64", "blocks"}) {
    EXPECT_THAT(ParseRandomBlocks(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text)));
  }
}

std::vector<int32_t> RowBlock(const BlockListIndex& index, int64_t row_block) {
  return {index.key_blocks.begin() + index.row_offsets[row_block],
          index.key_blocks.begin() + index.row_offsets[row_block + 1]};
}

TEST(RandomBlockLists, HaveTheirShareOfWholeBlocks) {
  constexpr int64_t kTokens = 64 * 300 + 5;
  for (const auto& [rows, keys] : {std::pair{64, 64}, {128, 64}, {128, 128}}) {
    const RandomBlocks blocks = {.percent = 50, .block_rows = rows, .block_keys = keys, .min_blocks = 32};
    const BlockListIndex index = MakeRandomBlocks(blocks, kTokens, 3);
    LF_ASSERT_OK(ValidateIndex(index, kTokens));
    // All there are, then no fewer than 32, then half.
    EXPECT_EQ(RowBlock(index, 9).size(), 10U);
    const int64_t wide = keys / 64;
    EXPECT_EQ(std::ssize(RowBlock(index, 79)), std::max<int64_t>(32, 40 / wide) * wide)
        << rows << "x" << keys;
    EXPECT_EQ(std::ssize(RowBlock(index, 299)), 150) << rows << "x" << keys;
    // Rows of a block share a list; a wide block is whole.
    if (rows == 128) {
      std::vector<int32_t> upper = RowBlock(index, 200);
      std::vector<int32_t> lower = RowBlock(index, 201);
      std::erase(lower, 201);  // not before the upper half
      EXPECT_EQ(upper, lower);
    }
    if (keys == 128) {
      const std::vector<int32_t> row = RowBlock(index, 299);
      const std::set<int32_t> listed(row.begin(), row.end());
      for (const int32_t block : row) EXPECT_TRUE(listed.contains(block ^ 1)) << block;
    }
  }
  EXPECT_NE(MakeRandomBlocks({.percent = 5, .block_rows = 64, .block_keys = 64}, kTokens, 1),
            MakeRandomBlocks({.percent = 5, .block_rows = 64, .block_keys = 64}, kTokens, 2));
}

}  // namespace
}  // namespace longfill
