// Parity coverage and the oracle's rendering of the published walk against the published conversion itself.

#include <filesystem>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/oracle/oracle.h"
#include "kernels/sparse/coverage.h"
#include "nlohmann/json.hpp"
#include "tests/testing/host_index.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

struct Row {
  std::vector<int64_t> ranges;
  std::vector<int64_t> columns;
};

void ExpectRow(const std::vector<int32_t>& columns, const std::vector<int32_t>& distances, int64_t num_tokens,
               int64_t row_block, const Row& want) {
  const oracle::PublishedTile tile = oracle::ConvertPublished(columns, distances, row_block);
  EXPECT_EQ(tile.range_starts, want.ranges) << "oracle";
  EXPECT_EQ(tile.columns, want.columns) << "oracle";

  const SparseIndex index = MakeVerticalSlashIndex(columns, distances, Coverage::kParity);
  std::vector<KeyRange> runs;
  AppendPublishedRuns(std::get<DiagonalColumnIndex>(index).distances, row_block, &runs);
  std::vector<int64_t> starts;
  for (const KeyRange& run : runs) {
    for (int64_t start = run.begin; start < run.end; start += 64) starts.push_back(start);
  }
  EXPECT_EQ(starts, want.ranges);

  TileKeys keys;
  ExpandTile(HostIndex(index).view(), row_block, num_tokens, &keys);
  EXPECT_EQ(std::vector<int64_t>(keys.columns.begin(), keys.columns.end()), want.columns);
  const int64_t key_end = std::min(64 * row_block + 64, num_tokens);
  std::erase_if(runs, [key_end](const KeyRange& run) { return run.begin >= key_end; });
  for (KeyRange& run : runs) run.end = std::min(run.end, key_end);
  EXPECT_EQ(keys.ranges, runs);
}

TEST(PublishedConversion, RunOvershootsAndDropsColumnsInIt) {
  // Edges 120, 250, 319, 320: the last run grows by a whole 64 to 383, and column 310 falls in it.
  ExpectRow({0, 5, 100, 150, 250, 310}, {0, 1, 70, 200}, 320, 4, {{56, 186, 255, 319}, {0, 5, 150, 250}});
}

TEST(PublishedConversion, NearDistancesOfTheFirstRowBlockAreOneRange) {
  ExpectRow({0, 30, 63}, {0, 1, 10, 63}, 64, 0, {{0}, {}});
}

TEST(PublishedConversion, EdgeExactly64BeyondARunExtendsIt) {
  // Row block 2, end 192: edges 64 and 128 join, 192 joins; with 127 instead of 128 the run overshoots 191 by
  // nothing.
  ExpectRow({}, {0, 64, 128}, 192, 2, {{0, 64, 128}, {}});
  // Edges 64, 129: one more than 64 apart, so a new run begins at 65 and leaves column 64 between them.
  ExpectRow({64}, {0, 63, 128}, 192, 2, {{0, 65, 129}, {64}});
}

TEST(PublishedConversion, DistancesBeyondTheRowBlockAreSkipped) {
  ExpectRow({70}, {0, 128, 500}, 192, 1, {{64}, {}});
  ExpectRow({3, 70}, {0, 127, 500}, 192, 1, {{0, 64}, {}});
}

TEST(PublishedConversion, IsNotShiftInvariant) {
  // Distances 100 and 40. Row block 1 (end 128): both edges count, 28 raised to 64. Row block 2 (end 192):
  // edges 92, 152.
  ExpectRow({}, {0, 40, 100}, 192, 1, {{0, 64}, {}});
  ExpectRow({}, {0, 40, 100}, 192, 2, {{28, 92, 156}, {}});
}

TEST(PublishedConversion, RecordedCasesAreReproducedExactly) {
  const std::filesystem::path path =
      std::filesystem::path(LONGFILL_SHARED_DIR) / "data/vertical_slash_conversion.json";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is absent (LONGFILL_SHARED_DIR)";
  std::ifstream file(path);
  const nlohmann::json cases = nlohmann::json::parse(file);
  ASSERT_EQ(cases.size(), 54u);
  for (size_t i = 0; i < cases.size(); ++i) {
    const nlohmann::json& c = cases[i];
    for (size_t m = 0; m < c["rows"].size(); ++m) {
      SCOPED_TRACE(absl::StrCat("case ", i, " row block ", m));
      ExpectRow(c["vertical"], c["slash"], c["tokens"], m, {c["rows"][m]["ranges"], c["rows"][m]["columns"]});
    }
  }
}

}  // namespace
}  // namespace longfill
