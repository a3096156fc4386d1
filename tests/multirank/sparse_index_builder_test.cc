// The selection is a function of Q and K only: every mesh of every group size gives the bits of one rank, and
// those agree with the definition in fp64.

#include "parallel/sparse_index_builder.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/oracle/oracle.h"
#include "tests/multirank/prompt.h"
#include "tests/multirank/ranks.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::HasSubstr;

CpuStream g_stream;

constexpr int64_t kSelectBlocksScratch = 32 << 10;  // the CPU kernels' own, at these sizes
constexpr int64_t kLengths[] = {0, 1, 5, 63, 64, 65, 127, 128, 129, 300, 1000, 1337};

std::vector<HeadPattern> MixedPatterns(int64_t num_heads) {
  const std::vector<HeadPattern> kinds{
      VerticalSlash{40, 120}, BlockSparse{3}, VerticalSlash{1000, 6096}, Dense{}, VerticalSlash{0, 5},
      BlockSparse{100},       AShape{4, 100}};
  std::vector<HeadPattern> patterns;
  for (int64_t h = 0; h < num_heads; ++h) patterns.push_back(kinds[h % kinds.size()]);
  return patterns;
}

absl::StatusOr<LayerIndex> BuildOn(Communicator& world, const Prompt& prompt, const Mesh& mesh,
                                   Coverage coverage, std::span<const HeadPattern> patterns,
                                   int64_t memory_limit_bytes = 0) {
  const ShardPlan plan(mesh, prompt.num_tokens);
  RankPrompt mine(prompt, plan, world.rank(), memory_limit_bytes);
  LF_ASSIGN_OR_RETURN(SparseIndexBuilder builder,
                      SparseIndexBuilder::Create(*mine.kernels, world, prompt.geometry, coverage));
  auto layer = builder.Build(plan, mine.View(mine.q), mine.View(mine.k), patterns, g_stream);
  EXPECT_LE(
      mine.memory.peak_bytes(),
      SparseIndexBuilder::PlanBytes(*mine.kernels, prompt.geometry, plan, patterns) + kSelectBlocksScratch);
  EXPECT_EQ(mine.memory.bytes_in_use(), 0);
  return layer;
}

absl::StatusOr<LayerIndex> BuildAlone(const Prompt& prompt, Coverage coverage,
                                      std::span<const HeadPattern> patterns) {
  const auto single = CreateSingleCommunicator();
  return BuildOn(*single, prompt, {1, 1}, coverage, patterns);
}

void ExpectSameOnEveryMesh(const Prompt& prompt, Coverage coverage, std::span<const HeadPattern> patterns) {
  LF_ASSERT_OK_AND_ASSIGN(const LayerIndex expected, BuildAlone(prompt, coverage, patterns));
  for (const int size : GroupSizes()) {
    for (const Mesh& mesh : Factorisations(size)) {
      SCOPED_TRACE(testing::Message() << prompt.num_tokens << " tokens, mesh " << ToString(mesh));
      OnEveryRank(size, [&](Communicator& world) {
        LF_ASSERT_OK_AND_ASSIGN(const LayerIndex got, BuildOn(world, prompt, mesh, coverage, patterns));
        ASSERT_EQ(got.heads.size(), expected.heads.size());
        for (size_t h = 0; h < patterns.size(); ++h) {
          EXPECT_TRUE(got.heads[h] == expected.heads[h])
              << "rank " << world.rank() << " head " << h << " " << ToString(patterns[h]) << ", "
              << prompt.num_tokens << " tokens, mesh " << ToString(mesh);
          EXPECT_EQ(got.pairs[h], expected.pairs[h]) << "head " << h;
        }
      });
    }
  }
}

TEST(DistributedIndex, IsTheSameBitForBitOnEveryMesh) {
  const AttentionGeometry geometries[] = {MakeGeometry(4, 1), MakeGeometry(7, 1), MakeGeometry(3, 3)};
  uint32_t seed = 1;
  for (const int64_t num_tokens : kLengths) {
    for (const AttentionGeometry& geometry : geometries) {
      const Prompt prompt(geometry, num_tokens, ++seed);
      ExpectSameOnEveryMesh(prompt, seed % 2 == 0 ? Coverage::kTiles : Coverage::kParity,
                            MixedPatterns(geometry.num_q_heads));
    }
  }
}

TEST(DistributedIndex, TiesGoToTheLowerIndexOnEveryMesh) {
  Prompt prompt(MakeGeometry(2, 1), 1000, 1);
  std::fill(prompt.k.begin(), prompt.k.end(), 0.0f);  // every key has the same score
  const std::vector<HeadPattern> patterns{VerticalSlash{300, 400}, BlockSparse{4}};
  ExpectSameOnEveryMesh(prompt, Coverage::kParity, patterns);
  LF_ASSERT_OK_AND_ASSIGN(const LayerIndex layer, BuildAlone(prompt, Coverage::kParity, patterns));
  const auto& lines = std::get<DiagonalColumnIndex>(layer.heads[0]);
  ASSERT_EQ(lines.columns.size(), 300u);
  for (int32_t i = 0; i < 300; ++i) EXPECT_EQ(lines.columns[i], i);
  const auto& blocks = std::get<BlockListIndex>(layer.heads[1]);
  EXPECT_EQ(std::vector<int32_t>(blocks.key_blocks.end() - 4, blocks.key_blocks.end()),
            (std::vector<int32_t>{0, 1, 2, 3}));
}

// Entries that only one side selected must score like the last one taken.
void ExpectSameUpToCut(const std::vector<int32_t>& got, const std::vector<int32_t>& expected,
                       const std::vector<double>& scores, double tolerance) {
  ASSERT_EQ(got.size(), expected.size());
  std::vector<int32_t> differing;
  std::set_symmetric_difference(got.begin(), got.end(), expected.begin(), expected.end(),
                                std::back_inserter(differing));
  double lowest = INFINITY, highest = -INFINITY;
  for (const int32_t i : differing) {
    lowest = std::min(lowest, scores[i]);
    highest = std::max(highest, scores[i]);
  }
  if (differing.empty()) return;
  EXPECT_LE(highest - lowest, tolerance * std::max(std::abs(highest), std::abs(lowest)));
}

TEST(DistributedIndex, AgreesWithTheDefinitionInFp64) {
  const AttentionGeometry geometry = MakeGeometry(2, 1);
  for (const int64_t num_tokens : {1, 65, 300, 1337}) {
    const Prompt prompt(geometry, num_tokens, 77);
    const std::vector<HeadPattern> patterns{VerticalSlash{90, 150}, BlockSparse{3}};
    LF_ASSERT_OK_AND_ASSIGN(const LayerIndex layer, BuildAlone(prompt, Coverage::kTiles, patterns));
    const auto expected =
        oracle::SelectVerticalSlash(prompt.q.data(), prompt.k.data(), num_tokens, geometry.head_dim,
                                    geometry.scale, std::get<VerticalSlash>(patterns[0]));
    const auto& lines = std::get<DiagonalColumnIndex>(layer.heads[0]);
    ExpectSameUpToCut(lines.columns, expected.columns, expected.vertical_scores, 1e-4);
    ExpectSameUpToCut(lines.distances, expected.distances, expected.slash_scores, 1e-4);
    const float* q = prompt.q.data() + num_tokens * geometry.head_dim;
    const auto blocks =
        oracle::SelectBlocks(q, prompt.k.data(), num_tokens, geometry.head_dim, 3, /*force=*/true);
    const auto& lists = std::get<BlockListIndex>(layer.heads[1]);
    ASSERT_EQ(lists.row_offsets.size(), blocks.blocks.size() + 1);
    for (size_t m = 0; m < blocks.blocks.size(); ++m) {
      const std::vector<int32_t> list(lists.key_blocks.begin() + lists.row_offsets[m],
                                      lists.key_blocks.begin() + lists.row_offsets[m + 1]);
      ExpectSameUpToCut(list, blocks.blocks[m], blocks.scores[m], 1e-4);
    }
  }
}

TEST(DistributedIndex, BadPatternAndMissingMemoryAreTheSameErrorOnAllRanks) {
  const Prompt prompt(MakeGeometry(2, 1), 1000, 3);
  for (const int size : GroupSizes()) {
    const Mesh mesh{size, 1};
    OnEveryRank(size, [&](Communicator& world) {
      const std::vector<HeadPattern> good{VerticalSlash{40, 60}, Dense{}};
      const std::vector<HeadPattern> bad{VerticalSlash{-1, 60}, Dense{}};
      const std::vector<HeadPattern>& mine = world.rank() == size - 1 ? bad : good;
      EXPECT_THAT(BuildOn(world, prompt, mesh, Coverage::kTiles, mine).status(),
                  StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1")));
      const int64_t limit = world.rank() == size - 1 ? 1000 : 0;
      EXPECT_THAT(BuildOn(world, prompt, mesh, Coverage::kTiles, good, limit).status(),
                  StatusIs(absl::StatusCode::kResourceExhausted,
                           HasSubstr(size > 1 ? absl::StrCat("rank ", size - 1, ": no memory for")
                                              : "no memory for")));
      LF_EXPECT_OK(BuildOn(world, prompt, mesh, Coverage::kTiles, good).status());
    });
  }
}

}  // namespace
}  // namespace longfill
