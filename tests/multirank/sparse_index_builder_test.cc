// The selection is a function of Q and K only: every mesh of every group size gives the bits of one rank, and
// those agree with the definition in fp64.

#include "parallel/sparse_index_builder.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/oracle/oracle.h"
#include "kernels/sparse/coverage.h"
#include "tests/multirank/dual_chunk_prompt.h"
#include "tests/multirank/prompt.h"
#include "tests/multirank/rank_backend.h"
#include "tests/testing/sanitized.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::HasSubstr;

constexpr int64_t kLengths[] = {0, 1, 5, 63, 64, 65, 127, 128, 129, 300, 1000, 1337};
constexpr int64_t kFewLengths[] = {0, 65, 300, 1337};

// Of all kinds, from number `first` on.
std::vector<HeadPattern> MixedPatterns(int64_t num_heads, uint32_t first = 0) {
  const std::vector<HeadPattern> kinds{VerticalSlash{40, 120},
                                       BlockSparse{3},
                                       VerticalSlash{1000, 6096},
                                       BlockShare{4, 0.1},
                                       Dense{},
                                       BlockShare{2, 0.05},
                                       BlockShare{2, 0.02, 8},
                                       BlockShare{2, 0.05, 0, 4},
                                       VerticalSlash{0, 5},
                                       BlockShare{2, 0.3},
                                       BlockSparse{100},
                                       AShape{4, 100}};
  std::vector<HeadPattern> patterns;
  for (int64_t h = 0; h < num_heads; ++h) patterns.push_back(kinds[(first + h) % kinds.size()]);
  return patterns;
}

// A layer's index on the host.
struct HostLayer {
  std::vector<SparseIndex> heads;
  std::vector<PairCounts> pairs;
};

void CheckLayer(const LayerIndex& layer, const HostLayer& host, std::span<const HeadPattern> patterns,
                const DualChunk& dual_chunk, int64_t num_tokens) {
  EXPECT_GE(layer.seconds, 0);
  EXPECT_GE(layer.communication_seconds, 0);
  const int64_t num_chunks = dual_chunk.NumChunks(num_tokens);
  ASSERT_EQ(host.heads.size(), num_chunks * patterns.size());
  for (size_t h = 0; h < patterns.size(); ++h) {
    PairCounts expected;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const TokenRange rows = dual_chunk.Tokens(chunk, num_tokens);
      const SparseIndex& index = host.heads[chunk * patterns.size() + h];
      LF_EXPECT_OK(ValidateIndex(index, rows.end));
      const PackedIndices packed({&index, 1});
      const PairCounts pairs = CountRowBlockPairs(packed.Views(packed.data())[0], rows.begin / kRowBlock,
                                                  (rows.end + kRowBlock - 1) / kRowBlock, rows.end);
      expected.covered += pairs.covered;
      expected.published += pairs.published;
    }
    EXPECT_EQ(host.pairs[h].covered, expected.covered) << "head " << h;
    if (!std::holds_alternative<BlockSparse>(patterns[h])) {
      EXPECT_EQ(host.pairs[h].published, expected.published) << "head " << h;
    }
  }
}

// Every layer is built twice, on the same builder: memory is the plan's, and the second is the first again.
absl::StatusOr<HostLayer> BuildOn(const std::string& backend_name, Communicator& host, const Prompt& prompt,
                                  const Mesh& mesh, Coverage coverage, std::span<const HeadPattern> patterns,
                                  int64_t memory_limit_bytes = 0) {
  LF_ASSIGN_OR_RETURN(const auto backend, RankBackend(backend_name, host.rank()));
  auto limited = backend;
  if (memory_limit_bytes > 0) {
    LF_ASSIGN_OR_RETURN(limited, RankBackend(backend_name, host.rank(), memory_limit_bytes));
  }
  LF_ASSIGN_OR_RETURN(const auto world, DeviceWorld(backend_name, host, *limited));
  const ShardPlan plan = prompt.Plan(mesh);
  const RankPrompt mine(prompt, plan, host.rank(), *backend);
  MemoryResource& memory = limited->memory();
  const int64_t before = memory.bytes_in_use();
  HostLayer result;
  {
    LF_ASSIGN_OR_RETURN(SparseIndexBuilder builder,
                        SparseIndexBuilder::Create(*limited, *world, prompt.geometry, coverage));
    memory.ResetPeak();
    for (int repeat = 0; repeat < 2; ++repeat) {
      LF_ASSIGN_OR_RETURN(const LayerIndex layer, builder.Build(plan, mine.View(mine.q), mine.View(mine.k),
                                                                patterns, prompt.query_rotary));
      HostLayer got{.pairs = layer.pairs};
      for (const IndexView& view : layer.heads) {
        got.heads.push_back(DownloadIndex(*limited, view, prompt.num_tokens));
      }
      CheckLayer(layer, got, patterns, prompt.geometry.dual_chunk, prompt.num_tokens);
      if (repeat > 0) {
        EXPECT_TRUE(got.heads == result.heads);
        EXPECT_TRUE(got.pairs == result.pairs);
      }
      result = std::move(got);
    }
    EXPECT_EQ(memory.bytes_in_use() - before,
              SparseIndexBuilder::IndexBytes(prompt.geometry, plan, patterns));
    const int64_t planned =
        SparseIndexBuilder::PlanBytes(limited->kernels(), prompt.geometry, plan, patterns);
    int64_t most = memory.peak_bytes() - before;
    CpuStream stream;
    LF_RETURN_IF_ERROR(host.AllReduce(&most, 1, ReduceType::kInt64, ReduceOp::kMax, stream));
    EXPECT_EQ(most, planned);
  }
  EXPECT_EQ(memory.bytes_in_use(), before);
  return result;
}

class DistributedIndex : public RankBackendTest {
 protected:
  absl::StatusOr<HostLayer> BuildAlone(const Prompt& prompt, Coverage coverage,
                                       std::span<const HeadPattern> patterns) {
    const auto single = CreateSingleCommunicator();
    return BuildOn(GetParam(), *single, prompt, {1, 1}, coverage, patterns);
  }

  void ExpectSameOnEveryMesh(const Prompt& prompt, Coverage coverage, std::span<const HeadPattern> patterns) {
    LF_ASSERT_OK_AND_ASSIGN(const HostLayer expected, BuildAlone(prompt, coverage, patterns));
    for (const int size : Sizes()) {
      for (const Mesh& mesh : Factorisations(size)) {
        SCOPED_TRACE(testing::Message() << prompt.num_tokens << " tokens, mesh " << ToString(mesh));
        OnEveryRank(size, [&](Communicator& world) {
          LF_ASSERT_OK_AND_ASSIGN(const HostLayer got,
                                  BuildOn(GetParam(), world, prompt, mesh, coverage, patterns));
          ASSERT_EQ(got.heads.size(), expected.heads.size());
          for (size_t i = 0; i < got.heads.size(); ++i) {
            const size_t h = i % patterns.size();
            EXPECT_TRUE(got.heads[i] == expected.heads[i])
                << "rank " << world.rank() << " index " << i << " " << ToString(patterns[h]) << ", "
                << prompt.num_tokens << " tokens, mesh " << ToString(mesh);
            EXPECT_EQ(got.pairs[h], expected.pairs[h]) << "head " << h;
          }
        });
      }
    }
  }

  // By the definition in fp64, but for blocks at the cut.
  void ExpectShares(const Prompt& prompt, int64_t head, const BlockShare& pattern,
                    const BlockListIndex& voted) {
    const AttentionGeometry& geometry = prompt.geometry;
    const int64_t kv_head = head / geometry.q_per_kv();
    const int64_t stride = prompt.num_tokens * geometry.head_dim;
    const auto shares =
        oracle::SelectByShare(prompt.q.data() + head * stride, prompt.k.data() + kv_head * stride,
                              prompt.num_tokens, geometry.head_dim, geometry.scale, pattern);
    ASSERT_EQ(voted.row_offsets.size(), shares.blocks.size() + 1);
    // Representatives are rounded to the compute dtype.
    const double tolerance = (on_cpu() ? 1e-4 : 2e-2) * pattern.min_share;
    for (size_t m = 0; m < shares.blocks.size(); ++m) {
      if (std::ranges::any_of(shares.coarse_shares[m], [&](double share) {
            return std::abs(share - kOpenFactor * pattern.min_share) < kOpenFactor * tolerance;
          })) {
        continue;  // a coarse block may be open or not
      }
      std::vector<int32_t> differing;
      std::set_symmetric_difference(voted.key_blocks.begin() + voted.row_offsets[m],
                                    voted.key_blocks.begin() + voted.row_offsets[m + 1],
                                    shares.blocks[m].begin(), shares.blocks[m].end(),
                                    std::back_inserter(differing));
      for (const int32_t n : differing) {
        EXPECT_NEAR(shares.shares[m][n], pattern.min_share, tolerance)
            << ToString(HeadPattern(pattern)) << ", row block " << m;
      }
    }
  }
};

TEST_P(DistributedIndex, IsTheSameBitForBitOnEveryMesh) {
  const AttentionGeometry geometries[] = {MakeGeometry(4, 1), MakeGeometry(7, 1), MakeGeometry(3, 3)};
  uint32_t seed = 1;
  for (const int64_t num_tokens : on_cpu() ? std::span<const int64_t>(kLengths) : kFewLengths) {
    for (const AttentionGeometry& geometry : geometries) {
      const Prompt prompt(geometry, num_tokens, ++seed);
      ExpectSameOnEveryMesh(prompt, seed % 2 == 0 ? Coverage::kTiles : Coverage::kParity,
                            MixedPatterns(geometry.num_q_heads, 3 * seed));
    }
  }
}

TEST_P(DistributedIndex, IsTheSameWithLongerDealtBlocks) {
  uint32_t seed = 60;
  for (const auto& [deal_block, num_tokens] :
       {std::pair{256, 130}, {256, 1337}, {512, 1025}, {512, 3000}, {1024, 2048}}) {
    Prompt prompt(MakeGeometry(7, 1), num_tokens, ++seed);
    prompt.deal_block = deal_block;
    ExpectSameOnEveryMesh(prompt, seed % 2 == 0 ? Coverage::kTiles : Coverage::kParity,
                          MixedPatterns(7, seed % 2 == 0 ? 0 : 5));
  }
}

// Neighbours that differ in what represents a block or in precision alone, on each of several KV heads.
TEST_P(DistributedIndex, SamplesOfEveryKvHeadAreTheSameOnEveryMesh) {
  const std::vector<HeadPattern> patterns{BlockShare{2, 0.05},    BlockShare{2, 0.03, 8},
                                          BlockShare{2, 0.03, 4}, BlockShare{2, 0.05, 4},
                                          BlockShare{0, 0.01, 1}, BlockShare{0, 0.02, 16},
                                          BlockShare{2, 0.03, 4}, BlockShare{2, 0.03, 4, 0, /*fp8=*/true}};
  for (const int64_t num_tokens : {65, 700, 1337}) {
    const Prompt prompt(MakeGeometry(8, 4), num_tokens, 80);
    ExpectSameOnEveryMesh(prompt, Coverage::kTiles, patterns);
    LF_ASSERT_OK_AND_ASSIGN(const HostLayer layer, BuildAlone(prompt, Coverage::kTiles, patterns));
    for (size_t h = 0; h < patterns.size(); ++h) {
      if (on_gpu() && std::get<BlockShare>(patterns[h]).fp8) continue;  // keys of bf16 round to others
      ExpectShares(prompt, static_cast<int64_t>(h), std::get<BlockShare>(patterns[h]),
                   std::get<BlockListIndex>(layer.heads[h]));
    }
  }
}

// Neighbours that differ in the number of coarse representatives or in precision alone. A prompt below 512
// tokens has no coarse block, and a single one is always open.
TEST_P(DistributedIndex, TwoLevelsOfSharesAreTheSameOnEveryMesh) {
  const std::vector<HeadPattern> patterns{BlockShare{2, 0.05},       BlockShare{2, 0.05, 0, 4},
                                          BlockShare{2, 0.2, 0, 4},  BlockShare{2, 0.2, 0, 8},
                                          BlockShare{0, 0.5, 0, 16}, BlockShare{4, 0.9, 0, 1},
                                          BlockShare{4, 0.3, 8, 4},  BlockShare{4, 0.3, 8, 1},
                                          BlockShare{4, 0.3, 8, 2},  BlockShare{4, 0.3, 8, 2, /*fp8=*/true}};
  const int64_t heads = std::ssize(patterns);
  for (const int64_t num_tokens : {65, 511, 700, 1337, 3000}) {
    Prompt prompt(MakeGeometry(heads, heads / 2), num_tokens, 90);
    // Rows of a row block ask for the same, so that coarse blocks are closed to them.
    const int64_t dim = prompt.geometry.head_dim;
    for (int64_t row = 0; row < heads * num_tokens; ++row) {
      const int64_t first = row / num_tokens * num_tokens + row % num_tokens / kRowBlock * kRowBlock;
      if (row != first) std::copy_n(prompt.q.begin() + first * dim, dim, prompt.q.begin() + row * dim);
    }
    ExpectSameOnEveryMesh(prompt, Coverage::kTiles, patterns);
    LF_ASSERT_OK_AND_ASSIGN(const HostLayer layer, BuildAlone(prompt, Coverage::kTiles, patterns));
    std::vector<HeadPattern> one_level = patterns;
    for (HeadPattern& pattern : one_level) std::get<BlockShare>(pattern).coarse = 0;
    LF_ASSERT_OK_AND_ASSIGN(const HostLayer all_open, BuildAlone(prompt, Coverage::kTiles, one_level));
    if (num_tokens < 512) {
      EXPECT_TRUE(layer.heads == all_open.heads);
    } else if (num_tokens == 3000) {
      EXPECT_FALSE(layer.heads == all_open.heads) << "nothing was closed";
    }
    for (size_t h = 0; h < patterns.size(); ++h) {
      if (on_gpu()) continue;  // rounded, other representatives may be the farthest
      ExpectShares(prompt, static_cast<int64_t>(h), std::get<BlockShare>(patterns[h]),
                   std::get<BlockListIndex>(layer.heads[h]));
    }
  }
}

TEST_P(DistributedIndex, TiesGoToTheLowerIndexOnEveryMesh) {
  Prompt prompt(MakeGeometry(2, 1), 1000, 1);
  std::fill(prompt.k.begin(), prompt.k.end(), 0.0f);  // every key has the same score
  const std::vector<HeadPattern> patterns{VerticalSlash{300, 400}, BlockSparse{4}};
  ExpectSameOnEveryMesh(prompt, Coverage::kParity, patterns);
  LF_ASSERT_OK_AND_ASSIGN(const HostLayer layer, BuildAlone(prompt, Coverage::kParity, patterns));
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

TEST_P(DistributedIndex, AgreesWithTheDefinitionInFp64) {
  const AttentionGeometry geometry = MakeGeometry(4, 1);
  for (const int64_t num_tokens : {1, 65, 300, 1337}) {
    const Prompt prompt(geometry, num_tokens, 77);
    const std::vector<HeadPattern> patterns{VerticalSlash{90, 150}, BlockSparse{3}, BlockShare{4, 0.1},
                                            BlockShare{4, 0.03, 8}};
    LF_ASSERT_OK_AND_ASSIGN(const HostLayer layer, BuildAlone(prompt, Coverage::kTiles, patterns));
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
    for (const size_t head : {2, 3}) {
      ExpectShares(prompt, static_cast<int64_t>(head), std::get<BlockShare>(patterns[head]),
                   std::get<BlockListIndex>(layer.heads[head]));
    }
  }
}

TEST_P(DistributedIndex, DualChunksAgreeWithTheDefinitionInFp64) {
  if (on_gpu()) GTEST_SKIP() << "rotated keys are rounded, so that other entries are near the cut";
  const std::vector<HeadPattern> patterns{VerticalSlash{40, 110}, Dense{}, VerticalSlash{90, 150}};
  const auto heads = static_cast<int64_t>(patterns.size());
  uint32_t seed = 60;
  for (const DualChunk& dual_chunk : kDualChunks) {
    for (const int64_t num_tokens : {129, 700}) {
      const DualChunkPrompt prompt(MakeGeometry(heads, 1), dual_chunk, num_tokens, ++seed);
      LF_ASSERT_OK_AND_ASSIGN(const HostLayer layer, BuildAlone(prompt, Coverage::kTiles, patterns));
      for (int64_t chunk = 0; chunk < dual_chunk.NumChunks(num_tokens) && dual_chunk.Splits(num_tokens);
           ++chunk) {
        for (const int64_t head : {0, 2}) {
          SCOPED_TRACE(testing::Message() << num_tokens << " tokens, chunk " << chunk << " of "
                                          << dual_chunk.chunk_len() << ", head " << head);
          const auto expected = oracle::SelectInDualChunk(prompt.OracleInput(), head, chunk,
                                                          std::get<VerticalSlash>(patterns[head]));
          const auto& lines = std::get<DiagonalColumnIndex>(layer.heads[chunk * heads + head]);
          ExpectSameUpToCut(lines.columns, expected.columns, expected.vertical_scores, 1e-4);
          ExpectSameUpToCut(lines.distances, expected.distances, expected.slash_scores, 1e-4);
        }
      }
    }
  }
}

TEST_P(DistributedIndex, DualChunksAreTheSameBitForBitOnEveryMesh) {
  const std::vector<HeadPattern> patterns{VerticalSlash{40, 110}, AShape{4, 100}, VerticalSlash{90, 150},
                                          Dense{}};
  uint32_t seed = 70;
  for (const int64_t num_tokens :
       {385, 1000}) {  // one query of a chunk of its own, several ranks without any
    ExpectSameOnEveryMesh(DualChunkPrompt(MakeGeometry(4, 2), {448, 64}, num_tokens, ++seed),
                          Coverage::kTiles, patterns);
  }
}

TEST_P(DistributedIndex, DualChunksMayEndWithinDealtBlocks) {
  DualChunkPrompt prompt(MakeGeometry(2, 1), {448, 64}, 1000, 3);
  prompt.deal_block = 256;  // chunks are of 384
  ExpectSameOnEveryMesh(prompt, Coverage::kTiles, std::vector<HeadPattern>(2, VerticalSlash{40, 60}));
}

TEST_P(DistributedIndex, DualChunksRefuseOtherPatternsByName) {
  const auto build = [&](const HeadPattern& pattern, Coverage coverage) {
    const DualChunkPrompt prompt(MakeGeometry(1, 1), {160, 32}, 200, 1);
    return BuildAlone(prompt, coverage, std::vector<HeadPattern>{pattern}).status();
  };
  EXPECT_THAT(
      build(BlockSparse{3}, Coverage::kTiles),
      StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("block-sparse:3 is not supported with dual")));
  EXPECT_THAT(build(BlockShare{3, 0.5}, Coverage::kTiles),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("block-share:3,0.5")));
  EXPECT_THAT(build(VerticalSlash{30, 50}, Coverage::kParity),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("coverage parity")));
  LF_EXPECT_OK(build(Dense{}, Coverage::kParity));
}

// The published kernels force no block, so what they cover is the parity selection.
TEST_P(DistributedIndex, PublishedPairsOfBlocksAreThoseOfTheUnforcedSelection) {
  const Prompt prompt(MakeGeometry(2, 1), 1337, 5);
  const std::vector<HeadPattern> patterns{BlockSparse{3}, BlockSparse{7}};
  LF_ASSERT_OK_AND_ASSIGN(const HostLayer tiles, BuildAlone(prompt, Coverage::kTiles, patterns));
  LF_ASSERT_OK_AND_ASSIGN(const HostLayer parity, BuildAlone(prompt, Coverage::kParity, patterns));
  for (size_t h = 0; h < patterns.size(); ++h) {
    EXPECT_FALSE(tiles.heads[h] == parity.heads[h]);
    EXPECT_EQ(tiles.pairs[h].published, parity.pairs[h].covered);
    EXPECT_EQ(parity.pairs[h].published, parity.pairs[h].covered);
  }
}

// Layers with other patterns and prompts of other lengths on one builder.
TEST_P(DistributedIndex, OneBuilderServesLayersThatDiffer) {
  LF_ASSERT_OK_AND_ASSIGN(const auto backend, RankBackend(GetParam(), 0));
  const auto single = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(const auto world, CreateStagedCommunicator(*single, *backend));
  LF_ASSERT_OK_AND_ASSIGN(SparseIndexBuilder builder,
                          SparseIndexBuilder::Create(*backend, *world, MakeGeometry(2, 1), Coverage::kTiles));
  const std::vector<HeadPattern> layers[] = {{AShape{3, 70}, Dense{}},
                                             {AShape{3, 70}, VerticalSlash{40, 60}},
                                             {Dense{}, AShape{5, 70}},
                                             {VerticalSlash{40, 60}, BlockSparse{2}},
                                             {BlockShare{3, 0.1}, BlockShare{5, 0.2}},
                                             {BlockShare{3, 0.1, 8}, BlockShare{5, 0.2}},
                                             {BlockShare{3, 0.1, 0, 8}, BlockShare{3, 0.1}},
                                             {BlockSparse{2}, BlockShare{5, 0.2}},
                                             {Dense{}, AShape{5, 70}}};
  for (const int64_t num_tokens : {300, 0, 700}) {
    const Prompt prompt(MakeGeometry(2, 1), num_tokens, 6);
    const ShardPlan plan({1, 1}, num_tokens);
    const RankPrompt mine(prompt, plan, 0, *backend);
    for (const std::vector<HeadPattern>& patterns : layers) {
      LF_ASSERT_OK_AND_ASSIGN(const LayerIndex layer,
                              builder.Build(plan, mine.View(mine.q), mine.View(mine.k), patterns));
      LF_ASSERT_OK_AND_ASSIGN(const HostLayer expected, BuildAlone(prompt, Coverage::kTiles, patterns));
      for (size_t h = 0; h < patterns.size(); ++h) {
        EXPECT_TRUE(DownloadIndex(*backend, layer.heads[h], num_tokens) == expected.heads[h])
            << ToString(patterns[h]) << ", " << num_tokens << " tokens";
        EXPECT_EQ(layer.pairs[h], expected.pairs[h]);
      }
    }
  }
}

// More scores than are kept at once on the CPU: heads with equal queries have equal lists whichever heads
// they are ranked with. Only the last queries are read, so all rows of a head may be one.
TEST_P(DistributedIndex, HeadsThatAreRankedInSeveralBatchesAreRankedAlike) {
  if (!on_cpu()) GTEST_SKIP() << "one batch holds all heads of a layer on a device";
  constexpr int64_t kTokens = 600000;
  const AttentionGeometry geometry = MakeGeometry(16, 1, 8);
  LF_ASSERT_OK_AND_ASSIGN(const auto backend, RankBackend(GetParam(), 0));
  const auto world = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(SparseIndexBuilder builder,
                          SparseIndexBuilder::Create(*backend, *world, geometry, Coverage::kTiles));
  const Prompt keys(MakeGeometry(1, 1, 8), kTokens, 9);
  const std::vector<float> one_query(keys.q.begin(), keys.q.begin() + 8);
  const std::vector<HeadPattern> patterns(16, VerticalSlash{500, 700});
  LF_ASSERT_OK_AND_ASSIGN(const LayerIndex layer,
                          builder.Build(ShardPlan({1, 1}, kTokens), HeadsView<const float>{one_query.data()},
                                        HeadsView<const float>{keys.k.data(), 0, 8}, patterns));
  const SparseIndex first = DownloadIndex(*backend, layer.heads[0], kTokens);
  LF_EXPECT_OK(ValidateIndex(first, kTokens));
  EXPECT_EQ(std::get<DiagonalColumnIndex>(first).distances.size(), 700u);
  for (size_t h = 1; h < patterns.size(); ++h) {
    EXPECT_TRUE(DownloadIndex(*backend, layer.heads[h], kTokens) == first) << "head " << h;
    EXPECT_EQ(layer.pairs[h], layer.pairs[0]) << "head " << h;
  }
}

// Ranks of a test that is too dear for all sizes: two, or as many as mpirun has started.
int SizeOfOneRun() { return GroupSizes().size() == 1 ? GroupSizes().front() : 2; }

// So long that the bits of a head are selected in parts, which are not the same for each number of ranks.
TEST_P(DistributedIndex, BlockShareInPartsIsTheSameOnEveryMesh) {
  if (GetParam() != "cpu") GTEST_SKIP() << "the cpu's is the same code, and faster";
  if (kSanitized) GTEST_SKIP() << "so long a prompt takes minutes with a sanitizer";
  const Prompt prompt(MakeGeometry(1, 1, 8), 530'001, 10);
  const std::vector<HeadPattern> patterns{BlockShare{0, 0.01, 1}};
  LF_ASSERT_OK_AND_ASSIGN(const HostLayer expected, BuildAlone(prompt, Coverage::kTiles, patterns));
  EXPECT_GT(expected.pairs[0].covered, 5 * kRowBlock * prompt.num_tokens) << "only forced blocks";
  const Mesh mesh{SizeOfOneRun(), 1};
  OnEveryRank(mesh.size(), [&](Communicator& world) {
    LF_ASSERT_OK_AND_ASSIGN(const HostLayer got,
                            BuildOn(GetParam(), world, prompt, mesh, Coverage::kTiles, patterns));
    EXPECT_TRUE(got.heads == expected.heads);
    EXPECT_TRUE(got.pairs == expected.pairs);
  });
}

// What needs more memory than lists have is known at the end only, by all ranks, and the group goes on.
TEST_P(DistributedIndex, BlockShareListsThatDoNotFitAreTheSameErrorOnAllRanks) {
  if (GetParam() != "cpu") GTEST_SKIP() << "the cpu's is the same code, and faster";
  const AttentionGeometry geometry = MakeGeometry(1, 1, 8);
  Prompt dense(geometry, 70'001, 11);
  std::fill(dense.q.begin(), dense.q.end(), 0.0f);  // every block has the same share
  const std::vector<HeadPattern> patterns{BlockShare{0, 1e-4}};
  const Mesh mesh{SizeOfOneRun(), 1};
  OnEveryRank(mesh.size(), [&](Communicator& world) {
    EXPECT_THAT(BuildOn(GetParam(), world, dense, mesh, Coverage::kTiles, patterns).status(),
                StatusIs(absl::StatusCode::kResourceExhausted,
                         HasSubstr("have 598965 key blocks and there is room for 561222")));
    LF_EXPECT_OK(
        BuildOn(GetParam(), world, Prompt(geometry, 300, 12), mesh, Coverage::kTiles, patterns).status());
  });
}

// It takes part in all exchanges, so that the others have their rows.
TEST_P(DistributedIndex, BlockShareOfARankThatStopsIsEmpty) {
  const Prompt prompt(MakeGeometry(2, 1), 1000, 13);
  const std::vector<HeadPattern> patterns(2, BlockShare{2, 0.05});
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& host) {
      LF_ASSERT_OK_AND_ASSIGN(const auto backend, RankBackend(GetParam(), host.rank()));
      LF_ASSERT_OK_AND_ASSIGN(const auto world, DeviceWorld(GetParam(), host, *backend));
      const ShardPlan plan({size, 1}, prompt.num_tokens);
      const RankPrompt mine(prompt, plan, host.rank(), *backend);
      LF_ASSERT_OK_AND_ASSIGN(
          SparseIndexBuilder builder,
          SparseIndexBuilder::Create(*backend, *world, prompt.geometry, Coverage::kTiles));
      LF_ASSERT_OK_AND_ASSIGN(const LayerIndex layer,
                              builder.Build(plan, mine.View(mine.q), mine.View(mine.k), patterns, {},
                                            [&] { return host.rank() == size - 1; }));
      std::set<int64_t> stopped;  // row blocks
      for (int64_t i = 0; i < plan.NumTokens(size - 1); ++i) {
        stopped.insert(plan.TokenPositions(size - 1).Position(i) / kRowBlock);
      }
      for (const IndexView& view : layer.heads) {
        const auto list = std::get<BlockListIndex>(DownloadIndex(*backend, view, prompt.num_tokens));
        for (size_t m = 0; m + 1 < list.row_offsets.size(); ++m) {
          EXPECT_EQ(list.row_offsets[m] == list.row_offsets[m + 1], stopped.contains(static_cast<int64_t>(m)))
              << "row block " << m;
        }
      }
    });
  }
}

TEST_P(DistributedIndex, BadPatternAndMissingMemoryAreTheSameErrorOnAllRanks) {
  const Prompt prompt(MakeGeometry(2, 1), 1000, 3);
  for (const int size : Sizes()) {
    const Mesh mesh{size, 1};
    OnEveryRank(size, [&](Communicator& world) {
      const std::vector<HeadPattern> good{VerticalSlash{40, 60}, Dense{}};
      const std::vector<HeadPattern> bad{VerticalSlash{-1, 60}, Dense{}};
      const std::vector<HeadPattern>& mine = world.rank() == size - 1 ? bad : good;
      EXPECT_THAT(BuildOn(GetParam(), world, prompt, mesh, Coverage::kTiles, mine).status(),
                  StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("-1")));
      if (!on_gpu()) {  // whose memory cannot be limited
        const int64_t limit = world.rank() == size - 1 ? 1000 : 0;
        EXPECT_THAT(BuildOn(GetParam(), world, prompt, mesh, Coverage::kTiles, good, limit).status(),
                    StatusIs(absl::StatusCode::kResourceExhausted,
                             HasSubstr(size > 1 ? absl::StrCat("rank ", size - 1, ": no memory for")
                                                : "no memory for")));
      }
      LF_EXPECT_OK(BuildOn(GetParam(), world, prompt, mesh, Coverage::kTiles, good).status());
    });
  }
}

LF_INSTANTIATE_RANK_BACKENDS(DistributedIndex);

}  // namespace
}  // namespace longfill
