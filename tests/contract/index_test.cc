#include <algorithm>
#include <random>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/contract/backend_fixture.h"

namespace longfill {
namespace {

// Sorted, without duplicates.
std::vector<int32_t> Distinct(std::vector<int32_t> values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

std::vector<int32_t> RandomPositions(int64_t count, int64_t limit, std::mt19937& generator) {
  std::vector<int32_t> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<int32_t>(generator() % limit));
  return Distinct(std::move(values));
}

// Clumps of neighbours, as attention has them: dense stretches, gaps around 64 and 127, and lone distances.
std::vector<int32_t> ClumpedPositions(int64_t count, int64_t limit, std::mt19937& generator) {
  std::vector<int32_t> values;
  int64_t position = 0;
  while (std::ssize(values) < count) {
    constexpr int64_t kGaps[] = {1, 1, 1, 2, 7, 63, 64, 65, 100, 126, 127, 128, 129, 1000};
    position += generator() % 50 == 0 ? static_cast<int64_t>(generator() % limit) : kGaps[generator() % 14];
    values.push_back(static_cast<int32_t>(position % limit));
  }
  return Distinct(std::move(values));
}

struct Selection {
  std::vector<int32_t> columns, distances;
};

class IndexTest : public BackendTest {
 protected:
  struct Built {
    std::vector<int32_t> columns, distances;
    std::vector<DistanceRun> runs;
    IndexCounts counts;
  };
  struct Capacities {
    int32_t columns, distances, runs;
  };

  // Bits of the selections through BuildIndex. What lies behind a list's capacity must stay as it was.
  std::vector<Built> Build(const std::vector<Selection>& heads, int64_t words_per_list, Coverage coverage,
                           const Capacities& capacities) {
    std::vector<uint64_t> bits(heads.size() * 2 * static_cast<size_t>(words_per_list));
    const auto set = [&](size_t list, const std::vector<int32_t>& values) {
      for (const int32_t i : values) bits[list * words_per_list + i / 64] |= uint64_t{1} << i % 64;
    };
    struct Memory {
      Buffer columns, distances, runs, counts;
    };
    std::vector<Memory> memory;
    std::vector<IndexBuffers> out;
    for (size_t h = 0; h < heads.size(); ++h) {
      set(2 * h, heads[h].columns);
      set(2 * h + 1, heads[h].distances);
      memory.push_back({Bytes((capacities.columns + kBehind) * 4),
                        Bytes((capacities.distances + kBehind) * 4),
                        Bytes((capacities.runs + kBehind) * static_cast<int64_t>(sizeof(DistanceRun))),
                        Bytes(static_cast<int64_t>(sizeof(IndexCounts)))});
      out.push_back({memory[h].columns.as<int32_t>(), memory[h].distances.as<int32_t>(),
                     memory[h].runs.as<DistanceRun>(), memory[h].counts.as<IndexCounts>(), capacities.columns,
                     capacities.distances, capacities.runs});
    }
    const Buffer on_backend = Upload(bits);
    const BuildIndexParams params = {on_backend.as<uint64_t>(), words_per_list, coverage, out};
    const Workspace workspace =
        NewWorkspace(kernels().BuildIndexWorkspaceBytes(std::ssize(heads), words_per_list));
    LF_EXPECT_OK(kernels().BuildIndex(params, workspace, stream()));
    std::vector<Built> built;
    for (const Memory& of_head : memory) {
      Built& index = built.emplace_back();
      index.counts = Download<IndexCounts>(of_head.counts.data(), 1)[0];
      index.columns = Stored<int32_t>(of_head.columns, capacities.columns, index.counts.columns);
      index.distances = Stored<int32_t>(of_head.distances, capacities.distances, index.counts.distances);
      index.runs = Stored<DistanceRun>(of_head.runs, capacities.runs, index.counts.runs);
    }
    return built;
  }

  std::vector<PairCounts> Count(std::span<const IndexView> indices, int64_t num_tokens) {
    return Count(indices, num_tokens, num_tokens);
  }
  std::vector<PairCounts> Count(std::span<const IndexView> indices, int64_t num_tokens, int64_t num_rows) {
    const Buffer counts = Bytes(std::ssize(indices) * static_cast<int64_t>(sizeof(PairCounts)));
    const Workspace workspace =
        NewWorkspace(kernels().CountPairsWorkspaceBytes(std::ssize(indices), num_tokens));
    LF_EXPECT_OK(
        kernels().CountPairs({indices, num_tokens, counts.as<PairCounts>(), num_rows}, workspace, stream()));
    return Download<PairCounts>(counts.data(), std::ssize(indices));
  }

 private:
  static constexpr int64_t kBehind = 3;  // elements behind the capacity

  template <typename T>
  std::vector<T> Stored(const Buffer& memory, int64_t capacity, int64_t count) {
    EXPECT_LE(count, capacity);
    EXPECT_GE(count, 0);
    const auto bytes = static_cast<int64_t>(sizeof(T));
    const auto* behind = memory.as<const uint8_t>() + capacity * bytes;
    EXPECT_EQ(Download<uint8_t>(behind, kBehind * bytes),
              std::vector<uint8_t>(static_cast<size_t>(kBehind * bytes), 0x7F));
    return Download<T>(memory.data(), std::clamp<int64_t>(count, 0, capacity));
  }
};
LF_INSTANTIATE_BACKENDS(IndexTest);

DiagonalColumnIndex Lowered(const Selection& selection, Coverage coverage) {
  return std::get<DiagonalColumnIndex>(
      MakeVerticalSlashIndex(selection.columns, selection.distances, coverage));
}

TEST_P(IndexTest, BuildsWhatTheLoweringOfTheSelectionIs) {
  std::mt19937 generator(1);
  for (const int64_t n : {1, 63, 64, 65, 1000, 8192, 131072}) {
    const int64_t few = std::min<int64_t>(n, 50), many = std::min<int64_t>(n, 6000);
    std::vector<int32_t> all(static_cast<size_t>(std::min<int64_t>(n, 8192)));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
    const std::vector<Selection> heads = {
        {RandomPositions(few, n, generator), RandomPositions(many, n, generator)},
        {RandomPositions(many, n, generator), ClumpedPositions(many, n, generator)},
        {{}, {}},
        {{static_cast<int32_t>(n - 1)}, {static_cast<int32_t>(n - 1)}},
        {all, all},
        {{0}, {0}},
        {ClumpedPositions(few, n, generator), ClumpedPositions(few, n, generator)}};
    for (const Coverage coverage : {Coverage::kTiles, Coverage::kParity}) {
      for (const int64_t extra_words : {0, 1, 1500}) {
        SCOPED_TRACE(testing::Message() << n << " tokens, " << CoverageName(coverage));
        const auto built = Build(heads, (n + 63) / 64 + extra_words, coverage, {8192, 8193, 8192});
        for (size_t h = 0; h < heads.size(); ++h) {
          const DiagonalColumnIndex want = Lowered(heads[h], coverage);
          EXPECT_EQ(built[h].counts.overflow, 0) << "head " << h;
          EXPECT_EQ(built[h].columns, want.columns) << "head " << h;
          EXPECT_EQ(built[h].distances, want.distances) << "head " << h;
          EXPECT_EQ(built[h].runs, want.runs) << "head " << h;
        }
      }
    }
  }
}

TEST_P(IndexTest, BuildsManyHeads) {
  std::mt19937 generator(2);
  std::vector<Selection> heads;
  heads.reserve(130);
  for (int h = 0; h < 130; ++h)
    heads.push_back({RandomPositions(h, 700, generator), RandomPositions(h, 700, generator)});
  const auto built = Build(heads, 11, Coverage::kTiles, {200, 200, 200});
  for (size_t h = 0; h < heads.size(); ++h) {
    EXPECT_EQ(built[h].distances, Lowered(heads[h], Coverage::kTiles).distances) << "head " << h;
    EXPECT_EQ(built[h].columns, heads[h].columns) << "head " << h;
  }
}

TEST_P(IndexTest, CutsOffAndReportsWhatDoesNotFit) {
  std::mt19937 generator(3);
  const Selection selection = {RandomPositions(500, 5000, generator), RandomPositions(100, 5000, generator)};
  const DiagonalColumnIndex want = Lowered(selection, Coverage::kTiles);
  const auto columns = static_cast<int32_t>(want.columns.size());
  const auto distances = static_cast<int32_t>(want.distances.size());
  const auto runs = static_cast<int32_t>(want.runs.size());
  const auto overflow = [&](const Capacities& capacities, Coverage coverage = Coverage::kTiles) {
    const Built built = Build({selection}, 79, coverage, capacities)[0];
    EXPECT_EQ(built.counts.columns, std::min(columns, capacities.columns));
    EXPECT_TRUE(std::equal(built.columns.begin(), built.columns.end(), want.columns.begin()));
    EXPECT_TRUE(std::equal(built.distances.begin(), built.distances.end(), want.distances.begin()));
    return built.counts.overflow != 0;
  };
  EXPECT_FALSE(overflow({columns, distances, runs}));
  EXPECT_TRUE(overflow({columns - 1, distances, runs}));
  EXPECT_TRUE(overflow({columns, distances - 1, runs}));
  EXPECT_TRUE(overflow({columns, distances, runs - 1}));
  EXPECT_TRUE(overflow({0, 0, 0}));
  EXPECT_FALSE(overflow({columns, distances, 0}, Coverage::kParity));
}

// Pairs of the published conversion, row block by row block.
int64_t PublishedPairs(const Selection& selection, int64_t num_tokens) {
  int64_t pairs = 0;
  for (int64_t start = 0; start < num_tokens; start += kRowBlock) {
    const int64_t row_end = std::min(start + kRowBlock, num_tokens);
    const oracle::PublishedTile tile =
        oracle::ConvertPublished(selection.columns, selection.distances, start / kRowBlock);
    for (const int64_t range : tile.range_starts) {
      if (range + kRowBlock <= start) {
        pairs += kRowBlock * (row_end - start);
        continue;
      }
      for (int64_t key = range; key < std::min(range + kRowBlock, row_end); ++key) {
        pairs += row_end - std::max(start, key);
      }
    }
    pairs += std::ssize(tile.columns) * (row_end - start);
  }
  return pairs;
}

// Pairs of tiles: for each row block the union of the pieces of the distances, and the columns.
int64_t TilePairs(const Selection& selection, int64_t num_tokens) {
  const std::vector<int64_t> pieces = oracle::TilePieces(selection.distances);
  int64_t pairs = 0;
  for (int64_t start = 0; start < num_tokens; start += kRowBlock) {
    const int64_t row_end = std::min(start + kRowBlock, num_tokens);
    std::vector<uint8_t> covered(static_cast<size_t>(row_end));
    for (const int64_t piece : pieces) {
      const int64_t begin = std::max<int64_t>(0, start - piece);
      const int64_t end = std::min(start + kRowBlock - piece, row_end);
      if (begin < end) std::fill(covered.begin() + begin, covered.begin() + end, uint8_t{1});
    }
    for (const int64_t column : selection.columns) {
      if (column < row_end) covered[column] = 1;
    }
    for (int64_t key = 0; key < row_end; ++key) {
      if (covered[key] != 0) pairs += row_end - std::max(start, key);
    }
  }
  return pairs;
}

TEST_P(IndexTest, CountsPairsOfVerticalSlash) {
  std::mt19937 generator(4);
  for (const int64_t n : {1, 2, 63, 64, 65, 127, 128, 129, 200, 1000, 4096, 4100}) {
    std::vector<Selection> selections;
    selections.reserve(11);
    for (int i = 0; i < 6; ++i) {
      selections.push_back({RandomPositions(generator() % 80, n, generator),
                            i % 2 == 0 ? RandomPositions(generator() % 60, n, generator)
                                       : ClumpedPositions(generator() % 200, n, generator)});
    }
    std::vector<int32_t> all(static_cast<size_t>(n));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
    selections.push_back({all, all});
    selections.push_back({{}, all});
    selections.push_back({all, {}});
    selections.push_back({{}, {}});
    selections.push_back({{}, {static_cast<int32_t>(n - 1)}});
    selections.push_back({});  // distances so far apart that each begins a run
    for (int32_t d = 0; d < n; d += kRowBlock + 1) selections.back().distances.push_back(d);
    std::vector<SparseIndex> indices;
    for (Selection& selection : selections) {
      selection.distances.insert(selection.distances.begin(), 0);
      selection.distances = Distinct(selection.distances);
      for (const Coverage coverage : {Coverage::kTiles, Coverage::kParity}) {
        indices.push_back(MakeVerticalSlashIndex(selection.columns, selection.distances, coverage));
      }
    }
    for (const int64_t rows : {n, n / 2 / kRowBlock * kRowBlock}) {  // the whole prompt, the first half of it
      if (rows == 0) continue;
      const std::vector<PairCounts> got = Count(UploadIndices(indices), n, rows);
      for (size_t i = 0; i < selections.size(); ++i) {
        SCOPED_TRACE(testing::Message() << rows << " of " << n << " tokens, selection " << i);
        const int64_t published = PublishedPairs(selections[i], rows);
        const int64_t tiles = TilePairs(selections[i], rows);
        if (rows == n && n <= 200) {
          EXPECT_EQ(tiles, oracle::TilesMask(selections[i].columns, selections[i].distances, n).CountPairs());
          EXPECT_EQ(published,
                    oracle::ParityMask(selections[i].columns, selections[i].distances, n).CountPairs());
        }
        EXPECT_EQ(got[2 * i].published, published);
        EXPECT_EQ(got[2 * i].covered, tiles);
        EXPECT_EQ(got[2 * i + 1].published, published);
        EXPECT_EQ(got[2 * i + 1].covered, published);
      }
    }
  }
}

TEST_P(IndexTest, CountsNoPartOfARowBlock) {
  const std::vector<SparseIndex> indices = {MakeDenseIndex()};
  const std::vector<IndexView> views = UploadIndices(indices);
  const Buffer counts = Bytes(sizeof(PairCounts));
  const Workspace workspace = NewWorkspace(kernels().CountPairsWorkspaceBytes(1, 200));
  for (const int64_t rows : {100, 1, -64}) {
    EXPECT_THAT(
        kernels().CountPairs({views, 200, counts.as<PairCounts>(), rows}, workspace, stream()),
        StatusIs(absl::StatusCode::kInvalidArgument, testing::HasSubstr(absl::StrCat("num_rows ", rows))));
  }
}

TEST_P(IndexTest, CountsPairsOfALongPrompt) {
  std::mt19937 generator(5);
  const int64_t n = on_gpu() ? 131072 : 32768;
  const Selection selection = {RandomPositions(1000, n, generator), Distinct([&] {
                                 std::vector<int32_t> some = ClumpedPositions(4000, n, generator);
                                 const std::vector<int32_t> more = RandomPositions(2000, n, generator);
                                 some.insert(some.end(), more.begin(), more.end());
                                 for (int32_t d = 0; d < 100; ++d) some.push_back(d);
                                 return some;
                               }())};
  const std::vector<SparseIndex> indices = {
      MakeVerticalSlashIndex(selection.columns, selection.distances, Coverage::kTiles)};
  const std::vector<PairCounts> got = Count(UploadIndices(indices), n);
  EXPECT_EQ(got[0].published, PublishedPairs(selection, n));
  EXPECT_EQ(got[0].covered, TilePairs(selection, n));
}

TEST_P(IndexTest, CountsPairsOfStaticPatterns) {
  for (const int64_t n : {1, 64, 65, 200, 300}) {
    std::vector<SparseIndex> indices = {MakeDenseIndex()};
    std::vector<int64_t> want = {n * (n + 1) / 2};
    for (const AShape& pattern :
         {AShape{0, 1}, AShape{10, 1}, AShape{10, 64}, AShape{128, 70}, AShape{1000, 100}}) {
      indices.push_back(MakeAShapeIndex(pattern));
      want.push_back(oracle::AShapeMask(pattern, n).CountPairs());
    }
    const std::vector<PairCounts> got = Count(UploadIndices(indices), n);
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_EQ(got[i].covered, want[i]) << n << " tokens, index " << i;
      EXPECT_EQ(got[i].published, want[i]) << n << " tokens, index " << i;
    }
  }
}

TEST_P(IndexTest, CountsPairsOfBlockLists) {
  std::mt19937 generator(6);
  for (const int64_t n : {1, 64, 65, 200, 1000}) {
    const int64_t row_blocks = (n + 63) / 64;
    const int64_t row_length = 3;
    std::vector<std::vector<int32_t>> ragged, padded;
    BlockListIndex index;
    index.row_offsets = {0};
    std::vector<int32_t> table;  // [row_blocks, row_length]
    for (int64_t m = 0; m < row_blocks; ++m) {
      ragged.push_back(RandomPositions(generator() % 5, m + 1, generator));
      index.key_blocks.insert(index.key_blocks.end(), ragged.back().begin(), ragged.back().end());
      index.row_offsets.push_back(std::ssize(index.key_blocks));
      std::vector<int32_t>& row = padded.emplace_back();
      for (int64_t i = std::max<int64_t>(0, m + 1 - row_length); i <= m; ++i)
        row.push_back(static_cast<int32_t>(i));
      table.insert(table.end(), row.begin(), row.end());
      table.resize(static_cast<size_t>((m + 1) * row_length), 0x7F7F7F7F);
    }
    const std::vector<SparseIndex> indices = {index};
    std::vector<IndexView> views = UploadIndices(indices);
    const Buffer on_backend = Upload(table);
    IndexView& view = views.emplace_back();
    view.form = IndexView::Form::kBlockList;
    view.key_blocks = on_backend.as<int32_t>();
    view.row_length = row_length;
    const std::vector<PairCounts> got = Count(views, n);
    const int64_t want[] = {oracle::BlockMask(ragged, n).CountPairs(),
                            oracle::BlockMask(padded, n).CountPairs()};
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_EQ(got[i].covered, want[i]) << n << " tokens, index " << i;
      EXPECT_EQ(got[i].published, want[i]) << n << " tokens, index " << i;
    }
  }
}

TEST_P(IndexTest, CountsPairsOfManyHeadsOfAllForms) {
  const int64_t n = 500;
  std::mt19937 generator(7);
  std::vector<SparseIndex> indices;
  std::vector<int64_t> want;
  for (int i = 0; i < 110; ++i) {
    if (i % 3 == 0) {
      indices.push_back(MakeDenseIndex());
      want.push_back(n * (n + 1) / 2);
      continue;
    }
    Selection selection = {RandomPositions(i, n, generator), RandomPositions(i, n, generator)};
    selection.distances = Distinct([&] {
      selection.distances.push_back(0);
      return selection.distances;
    }());
    const Coverage coverage = i % 3 == 1 ? Coverage::kTiles : Coverage::kParity;
    indices.push_back(MakeVerticalSlashIndex(selection.columns, selection.distances, coverage));
    want.push_back(i % 3 == 1 ? TilePairs(selection, n) : PublishedPairs(selection, n));
  }
  const std::vector<PairCounts> got = Count(UploadIndices(indices), n);
  for (size_t i = 0; i < want.size(); ++i) EXPECT_EQ(got[i].covered, want[i]) << "index " << i;
}

TEST_P(IndexTest, NothingToCount) {
  EXPECT_TRUE(Count({}, 100).empty());
  const std::vector<SparseIndex> indices = {MakeDenseIndex()};
  EXPECT_EQ(Count(UploadIndices(indices), 0)[0], PairCounts{});
}

}  // namespace
}  // namespace longfill
