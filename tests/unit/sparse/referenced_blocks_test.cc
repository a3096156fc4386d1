// ReferencedBlocks against the oracle's dense masks.

#include "kernels/sparse/referenced_blocks.h"

#include <algorithm>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/oracle/oracle.h"
#include "tests/testing/host_index.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

constexpr int64_t kKeyBlock = 128;

// By the definition: a pair of these rows with a key of the block is covered.
std::vector<bool> BlocksOf(const oracle::Mask& mask, int64_t row_begin, int64_t row_end) {
  std::vector<bool> blocks((mask.num_keys + kKeyBlock - 1) / kKeyBlock);
  for (int64_t query = row_begin; query < row_end; ++query) {
    for (int64_t key = 0; key <= query; ++key) {
      if (mask.At(query, key)) blocks[key / kKeyBlock] = true;
    }
  }
  return blocks;
}

std::vector<bool> BlocksOf(const SparseIndex& index, int64_t num_tokens, int64_t row_begin, int64_t row_end) {
  ReferencedBlocks blocks(num_tokens, kKeyBlock);
  blocks.Add(HostIndex(index).view(), row_begin, row_end);
  return blocks.Blocks();
}

// Every stretch of row blocks.
void ExpectBlocks(const SparseIndex& index, const oracle::Mask& mask) {
  const int64_t n = mask.num_queries;
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    std::vector<bool> want((n + kKeyBlock - 1) / kKeyBlock);
    for (int64_t row = begin; row < n; row += kRowBlock) {
      const int64_t end = std::min(row + kRowBlock, n);
      const std::vector<bool> of_row_block = BlocksOf(mask, row, end);
      for (size_t b = 0; b < want.size(); ++b) want[b] = want[b] || of_row_block[b];
      EXPECT_EQ(BlocksOf(index, n, begin, end), want) << "rows " << begin << " to " << end << " of " << n;
    }
  }
}

std::vector<int32_t> Draw(int64_t limit, int64_t count, std::mt19937& random) {
  std::vector<int32_t> all(static_cast<size_t>(limit));
  for (int64_t i = 0; i < limit; ++i) all[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  std::shuffle(all.begin(), all.end(), random);
  all.resize(static_cast<size_t>(std::min(limit, count)));
  return all;
}

TEST(ReferencedBlocks, OfVerticalSlashHeads) {
  std::mt19937 random(5);
  for (const int64_t n : {1, 64, 100, 640, 1000, 1283}) {
    for (const int64_t count : {0, 1, 3, 12}) {
      const std::vector<int32_t> columns = Draw(n, count, random);
      std::vector<int32_t> distances = Draw(n, count, random);
      SCOPED_TRACE(absl::StrCat(n, " tokens, ", count, " columns and distances"));
      const SparseIndex tiles = MakeVerticalSlashIndex(columns, distances, Coverage::kTiles);
      const SparseIndex parity = MakeVerticalSlashIndex(columns, distances, Coverage::kParity);
      if (std::ranges::count(distances, 0) == 0) distances.push_back(0);
      ExpectBlocks(tiles, oracle::TilesMask(columns, distances, n));
      ExpectBlocks(parity, oracle::ParityMask(columns, distances, n));
    }
  }
}

TEST(ReferencedBlocks, OfExactRuns) {
  const int64_t n = 1100;
  ExpectBlocks(MakeDenseIndex(), oracle::DenseMask(n));
  for (const int64_t n_local : {1, 64, 65, 300}) {
    SCOPED_TRACE(absl::StrCat("a window of ", n_local));
    const AShape pattern{.n_init = 130, .n_local = n_local};
    ExpectBlocks(MakeAShapeIndex(pattern, n), oracle::AShapeMask(pattern, n));
  }
}

TEST(ReferencedBlocks, OfBlockLists) {
  const int64_t n = 400;
  const std::vector<std::vector<int32_t>> lists = {{0}, {1}, {0, 1, 2}, {0, 3}, {2, 4}, {1, 2, 5}, {0, 5, 6}};
  BlockListIndex index{.row_offsets = {0}};
  for (const std::vector<int32_t>& list : lists) {
    index.key_blocks.insert(index.key_blocks.end(), list.begin(), list.end());
    index.row_offsets.push_back(static_cast<int64_t>(index.key_blocks.size()));
  }
  ExpectBlocks(index, oracle::BlockMask(lists, n));
}

TEST(ReferencedBlocks, OfSeveralStretchesAndHeads) {
  const int64_t n = 1024;
  ReferencedBlocks blocks(n, kKeyBlock);
  EXPECT_EQ(blocks.Blocks(), std::vector<bool>(8));
  blocks.Add(HostIndex(MakeAShapeIndex({.n_init = 1, .n_local = 64}, n)).view(), 384, 512);
  EXPECT_EQ(blocks.Blocks(), std::vector<bool>({true, false, true, true, false, false, false, false}));
  blocks.Add(HostIndex(MakeVerticalSlashIndex({700}, {0}, Coverage::kTiles)).view(), 896, 1024);
  EXPECT_EQ(blocks.Blocks(), std::vector<bool>({true, false, true, true, false, true, false, true}));
}

}  // namespace
}  // namespace longfill
