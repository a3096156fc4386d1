// ExpandTile and CountPairs against the oracle's dense masks.

#include "kernels/sparse/coverage.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/oracle/oracle.h"
#include "tests/testing/host_index.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

constexpr int64_t kLengths[] = {1, 2, 29, 30, 31, 63, 64, 65, 99, 100, 101, 127, 128, 200, 301, 513};

// The pairs of all tiles; every broken promise of TileKeys is a failure that names the tile.
oracle::Mask Expand(const IndexView& index, int64_t num_tokens) {
  oracle::Mask mask(num_tokens, num_tokens);
  TileKeys keys;
  for (int64_t m = 0; m * kRowBlock < num_tokens; ++m) {
    ExpandTile(index, m, num_tokens, &keys);
    const int64_t row_end = std::min((m + 1) * kRowBlock, num_tokens);
    SCOPED_TRACE(absl::StrCat("row block ", m, " of ", num_tokens, " tokens"));
    int64_t done = 0;
    for (const KeyRange& range : keys.ranges) {
      EXPECT_GE(range.begin, done);
      EXPECT_LT(range.begin, range.end);
      EXPECT_LE(range.end, row_end);
      EXPECT_GE(range.min_distance, 0);
      done = range.end;
    }
    EXPECT_TRUE(std::adjacent_find(keys.columns.begin(), keys.columns.end(), std::greater_equal<>()) ==
                keys.columns.end());
    int64_t pairs = 0;
    const auto cover = [&](int64_t query, int64_t key) {
      EXPECT_FALSE(mask.At(query, key)) << "pair (" << query << ", " << key << ") twice";
      mask.Set(query, key);
      ++pairs;
    };
    for (int64_t query = m * kRowBlock; query < row_end; ++query) {
      for (const KeyRange& range : keys.ranges) {
        for (int64_t key = range.begin; key < range.end; ++key) {
          if (query - key >= range.min_distance && query - key < range.max_distance) cover(query, key);
        }
      }
      for (const int64_t key : keys.columns) {
        EXPECT_TRUE(key >= 0 && key < row_end) << "column " << key;
        if (key <= query) cover(query, key);
      }
    }
    EXPECT_EQ(CountTilePairs(keys, m, num_tokens), pairs);
  }
  return mask;
}

// Names the first pair that differs.
void ExpectSameMask(const oracle::Mask& got, const oracle::Mask& want) {
  for (size_t i = 0; i < want.covered.size(); ++i) {
    if (got.covered[i] == want.covered[i]) continue;
    ADD_FAILURE() << "pair (" << i / want.num_keys << ", " << i % want.num_keys << ") is "
                  << (want.covered[i] ? "lost" : "covered but not to be");
    return;
  }
}

void ExpectCovers(const IndexView& index, const oracle::Mask& want, int64_t published) {
  const int64_t n = want.num_queries;
  ExpectSameMask(Expand(index, n), want);
  EXPECT_EQ(CountPairs(index, n), (PairCounts{published, want.CountPairs()}));
  PairCounts sum;
  for (int64_t m = 0; m * kRowBlock < n; ++m) {
    const PairCounts counts = CountRowBlockPairs(index, m, m + 1, n);
    sum.published += counts.published;
    sum.covered += counts.covered;
  }
  EXPECT_EQ(sum, (PairCounts{published, want.CountPairs()}));
}

void ExpectCovers(const SparseIndex& index, const oracle::Mask& want, int64_t published) {
  ExpectCovers(HostIndex(index).view(), want, published);
}

PairCounts CountPairs(const SparseIndex& index, int64_t num_tokens) {
  return CountPairs(HostIndex(index).view(), num_tokens);
}

void ExpectVerticalSlash(const std::vector<int32_t>& columns, const std::vector<int32_t>& distances,
                         int64_t n) {
  std::vector<int32_t> with_zero = distances;  // distance 0 is always kept
  if (std::find(with_zero.begin(), with_zero.end(), 0) == with_zero.end()) with_zero.push_back(0);
  const oracle::Mask tiles = oracle::TilesMask(columns, with_zero, n);
  const oracle::Mask parity = oracle::ParityMask(columns, with_zero, n);
  {
    SCOPED_TRACE("tiles");
    ExpectCovers(MakeVerticalSlashIndex(columns, distances, Coverage::kTiles), tiles, parity.CountPairs());
  }
  {
    SCOPED_TRACE("parity");
    ExpectCovers(MakeVerticalSlashIndex(columns, distances, Coverage::kParity), parity, parity.CountPairs());
  }
}

// `count` of [0, limit) in random order; clustered ones are stretches of neighbours.
std::vector<int32_t> RandomPositions(int64_t limit, int64_t count, bool clustered, std::mt19937& random) {
  std::set<int32_t> chosen;
  count = std::min(count, limit);
  while (static_cast<int64_t>(chosen.size()) < count) {
    const int64_t first = static_cast<int64_t>(random() % limit);
    const int64_t length = clustered ? 1 + static_cast<int64_t>(random() % 90) : 1;
    for (int64_t i = first; i < std::min(first + length, limit); ++i) {
      if (static_cast<int64_t>(chosen.size()) < count) chosen.insert(static_cast<int32_t>(i));
    }
  }
  std::vector<int32_t> result(chosen.begin(), chosen.end());
  std::shuffle(result.begin(), result.end(), random);
  return result;
}

std::vector<int32_t> FirstPositions(int64_t count) {
  std::vector<int32_t> positions(count);
  std::iota(positions.begin(), positions.end(), 0);
  return positions;
}

TEST(Coverage, DenseCoversEveryCausalPairAtEveryLength) {
  for (const int64_t n : kLengths) {
    ExpectCovers(MakeDenseIndex(), oracle::DenseMask(n), CausalPairs(n));
  }
}

TEST(Coverage, OfAnEmptyPromptIsEmpty) { EXPECT_EQ(CountPairs(MakeDenseIndex(), 0), PairCounts()); }

TEST(Coverage, AShapeIsExactAtEveryTokenAndLength) {
  for (const int64_t n : kLengths) {
    for (const int64_t n_init : {0, 1, 5, 63, 64, 65, 100, 128, 600}) {
      for (const int64_t n_local : {1, 2, 63, 64, 65, 100, 128, 129, 300, 700}) {
        SCOPED_TRACE(absl::StrCat("a-shape:", n_init, ",", n_local, " at ", n));
        const AShape pattern{n_init, n_local};
        const oracle::Mask want = oracle::AShapeMask(pattern, n);
        ExpectCovers(MakeAShapeIndex(pattern), want, want.CountPairs());
        ExpectCovers(MakeAShapeIndex(pattern, n), want, want.CountPairs());
      }
    }
  }
}

// Any mixture of exact and coarse runs and columns that the structure allows, from the definition of
// DistanceRun.
TEST(Coverage, MixedExactAndCoarseRunsWithColumnsLoseNothingAndDoubleNothing) {
  std::mt19937 random(20261123);
  for (int round = 0; round < 400; ++round) {
    const int64_t n = kLengths[random() % std::size(kLengths)];
    DiagonalColumnIndex index;
    int64_t d = random() % 3 == 0 ? 0 : random() % 150;
    while (d < n + 100) {
      const int64_t length = 1 + static_cast<int64_t>(random() % (random() % 2 == 0 ? 5 : 150));
      index.runs.push_back({d, d + length, random() % 2 == 0});
      d += length - 1 + kRowBlock + static_cast<int64_t>(random() % 3 == 0 ? 0 : random() % 100);
    }
    index.columns = RandomPositions(n, random() % (n + 1), random() % 2 == 0, random);
    std::sort(index.columns.begin(), index.columns.end());
    LF_ASSERT_OK(ValidateIndex(index, n));
    oracle::Mask want(n, n);
    for (int64_t query = 0; query < n; ++query) {
      for (int64_t key = 0; key <= query; ++key) {
        bool covered = std::binary_search(index.columns.begin(), index.columns.end(), key);
        const int64_t start = query / kRowBlock * kRowBlock;
        for (const DistanceRun& run : index.runs) {
          covered |= run.exact ? query - key >= run.d_lo && query - key < run.d_hi
                               : key >= start - run.d_hi + 1 && key < start + kRowBlock - run.d_lo;
        }
        if (covered) want.Set(query, key);
      }
    }
    SCOPED_TRACE(absl::StrCat("round ", round, " tokens ", n));
    ExpectCovers(index, want, want.CountPairs());
    if (testing::Test::HasFailure()) return;
  }
}

TEST(Coverage, OfRandomSelectionsEqualsTheOracleAtEveryLength) {
  std::mt19937 random(1);
  for (const int64_t n : kLengths) {
    for (int round = 0; round < 24; ++round) {
      const bool clustered = round % 2 == 1;
      const int64_t most = round % 4 < 2 ? std::min<int64_t>(n, 8) : n;
      SCOPED_TRACE(absl::StrCat("tokens ", n, " round ", round));
      ExpectVerticalSlash(RandomPositions(n, random() % (most + 1), clustered, random),
                          RandomPositions(n, random() % (most + 1), clustered, random), n);
      if (testing::Test::HasFailure()) return;
    }
  }
}

TEST(Coverage, OfDistancesWithGapsAroundTheTileEqualsTheOracle) {
  const int64_t n = 301;
  for (const int32_t gap : {1, 2, 62, 63, 64, 65, 66, 127, 128, 129}) {
    for (const int32_t first : {0, 1, 37, 64, 65, 236, 300}) {
      std::vector<int32_t> distances;
      for (int32_t d = first; d < n; d += gap) distances.push_back(d);
      SCOPED_TRACE(absl::StrCat("gap ", gap, " first ", first));
      ExpectVerticalSlash({}, distances, n);
      ExpectVerticalSlash({0, 1, 63, 64, 65, 127, 128, 200, 299, 300}, distances, n);
      ExpectVerticalSlash(FirstPositions(n), distances, n);
    }
  }
}

TEST(Coverage, OfDistancesAndColumnsBeyondThePromptIsThatOfTheRest) {
  for (const int64_t n : {1, 63, 64, 65, 130}) {
    const int32_t end = static_cast<int32_t>(n);
    SCOPED_TRACE(absl::StrCat("tokens ", n));
    // Not valid for this prompt (ValidateIndex), but nothing beyond it may be read or covered.
    ExpectVerticalSlash({end, end + 64, 1000000}, {end, end + 1, end + 63, end + 64, end + 65, 2147483647},
                        n);
  }
}

TEST(Coverage, OfBlockListsEqualsTheOracle) {
  std::mt19937 random(5);
  for (const int64_t n : kLengths) {
    const int64_t num_row_blocks = (n + kRowBlock - 1) / kRowBlock;
    for (int round = 0; round < 8; ++round) {
      std::vector<std::vector<int32_t>> blocks;
      BlockListIndex index;
      index.row_offsets.push_back(0);
      for (int64_t m = 0; m < num_row_blocks; ++m) {
        blocks.push_back(RandomPositions(m + 1, random() % (m + 2), false, random));
        std::sort(blocks.back().begin(), blocks.back().end());
        index.key_blocks.insert(index.key_blocks.end(), blocks.back().begin(), blocks.back().end());
        index.row_offsets.push_back(index.key_blocks.size());
      }
      LF_ASSERT_OK(ValidateIndex(index, n));
      SCOPED_TRACE(absl::StrCat("tokens ", n, " round ", round));
      const oracle::Mask want = oracle::BlockMask(blocks, n);
      ExpectCovers(index, want, want.CountPairs());
    }
  }
}

// What lies behind the valid entries of a row is not read as one.
TEST(Coverage, OfPaddedBlockListsEqualsTheOracle) {
  std::mt19937 random(6);
  for (const int64_t n : kLengths) {
    const int64_t num_row_blocks = (n + kRowBlock - 1) / kRowBlock;
    for (const int64_t row_length : {1, 2, 5, 9}) {
      std::vector<std::vector<int32_t>> blocks;
      std::vector<int32_t> padded(num_row_blocks * row_length, -7);
      for (int64_t m = 0; m < num_row_blocks; ++m) {
        blocks.push_back(RandomPositions(m + 1, row_length, false, random));
        std::sort(blocks.back().begin(), blocks.back().end());
        std::copy(blocks.back().begin(), blocks.back().end(), padded.begin() + m * row_length);
      }
      IndexView view;
      view.form = IndexView::Form::kBlockList;
      view.key_blocks = padded.data();
      view.row_length = row_length;
      SCOPED_TRACE(absl::StrCat("tokens ", n, " row length ", row_length));
      const oracle::Mask want = oracle::BlockMask(blocks, n);
      ExpectCovers(view, want, want.CountPairs());
    }
  }
}

TEST(Coverage, OfTilesMovesWithTheRowBlock) {
  std::mt19937 random(11);
  const std::vector<int32_t> distances = RandomPositions(900, 60, false, random);
  const HostIndex index(MakeVerticalSlashIndex({}, distances, Coverage::kTiles));
  TileKeys first;
  TileKeys later;
  const int64_t base = 15;  // from here on no window is cut at key 0
  ExpandTile(index.view(), base, 64 * 64, &first);
  for (int64_t m = base + 1; m < 40; ++m) {
    ExpandTile(index.view(), m, 64 * 64, &later);
    for (KeyRange& range : later.ranges) {
      range.begin -= (m - base) * kRowBlock;
      range.end -= (m - base) * kRowBlock;
    }
    EXPECT_EQ(later.ranges, first.ranges) << "row block " << m;
  }
}

TEST(Coverage, LongStretchesOfColumnsAreRangesAndSinglesAreNot) {
  std::vector<int32_t> columns = FirstPositions(500);
  columns.push_back(700);
  TileKeys keys;
  ExpandTile(HostIndex(MakeVerticalSlashIndex(columns, {0}, Coverage::kTiles)).view(), 20, 64 * 21, &keys);
  EXPECT_EQ(keys.ranges,
            (std::vector<KeyRange>{{0, 500, 0, kNoMaxDistance}, {1280, 1344, 0, kNoMaxDistance}}));
  EXPECT_EQ(keys.columns, std::vector<int32_t>{700});
}

TEST(Coverage, AShapeTileIsOneRangeForTheSinkAndOneForTheWindow) {
  TileKeys keys;
  ExpandTile(HostIndex(MakeAShapeIndex({128, 300})).view(), 20, 64 * 64, &keys);
  EXPECT_EQ(keys.ranges, (std::vector<KeyRange>{{0, 128, 0, kNoMaxDistance}, {981, 1344, 0, 300}}));
  EXPECT_TRUE(keys.columns.empty());
}

// Figures of pairs at a million tokens must come in well under a second; here only that nothing overflows or
// crawls.
TEST(Coverage, CountsAMillionTokens) {
  const int64_t n = 1 << 20;
  EXPECT_EQ(CountPairs(MakeDenseIndex(), n), (PairCounts{CausalPairs(n), CausalPairs(n)}));
  const int64_t a_shape = 128 * (n - 128) + CausalPairs(128) + (n - 128 - 4096) * 4096 + CausalPairs(4096);
  EXPECT_EQ(CountPairs(MakeAShapeIndex({128, 4096}), n), (PairCounts{a_shape, a_shape}));
  EXPECT_EQ(CountPairs(MakeAShapeIndex({n, 1}, n), n).covered, CausalPairs(n));

  std::mt19937 random(7);
  std::vector<int32_t> columns = RandomPositions(n, 970, false, random);
  std::vector<int32_t> distances =
      RandomPositions(n, 6000, true, random);  // neighbours, as real selections are
  for (int32_t i = 0; i < 100; ++i) distances.push_back(i);
  for (std::vector<int32_t>* list : {&columns, &distances}) {
    std::sort(list->begin(), list->end());
    list->erase(std::unique(list->begin(), list->end()), list->end());
  }
  const PairCounts tiles = CountPairs(MakeVerticalSlashIndex(columns, distances, Coverage::kTiles), n);
  const PairCounts parity = CountPairs(MakeVerticalSlashIndex(columns, distances, Coverage::kParity), n);
  EXPECT_EQ(parity.covered, parity.published);
  EXPECT_EQ(tiles.published, parity.published);
  EXPECT_GT(tiles.covered, n * 64);
  EXPECT_LT(tiles.covered, CausalPairs(n));
}

}  // namespace
}  // namespace longfill
