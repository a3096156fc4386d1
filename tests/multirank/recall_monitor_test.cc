// The recall that is measured over a mesh against its definition in fp64, and attention of some heads alone.

#include "parallel/recall_monitor.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/oracle/oracle.h"
#include "parallel/parallel_attention.h"
#include "parallel/sparse_index_builder.h"
#include "tests/multirank/prompt.h"
#include "tests/multirank/rank_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

CpuStream g_stream;

struct Outcome {
  std::vector<double> recall;      // [num_q_heads]
  std::vector<SparseIndex> index;  // [num_q_heads]
};

absl::StatusOr<Outcome> WatchOn(const std::string& backend_name, Communicator& host, const Prompt& prompt,
                                const Mesh& mesh, std::span<const HeadPattern> patterns, int64_t window,
                                int64_t round_bytes) {
  const ShardPlan plan = prompt.Plan(mesh);
  LF_ASSIGN_OR_RETURN(const auto backend, RankBackend(backend_name, host.rank()));
  LF_ASSIGN_OR_RETURN(const auto world, DeviceWorld(backend_name, host, *backend));
  const RankPrompt mine(prompt, plan, host.rank(), *backend);
  LF_ASSIGN_OR_RETURN(RecallMonitor monitor, RecallMonitor::Create(*backend, *world, prompt.geometry, plan));
  MemoryResource& memory = backend->memory();
  int64_t before = memory.bytes_in_use();
  memory.ResetPeak();
  LF_RETURN_IF_ERROR(monitor.Measure(mine.View(mine.q), mine.View(mine.k), window));
  EXPECT_EQ(memory.peak_bytes() - before,
            RecallMonitor::PlanBytes(backend->kernels(), prompt.geometry, plan, window));
  EXPECT_EQ(memory.bytes_in_use(), before);
  LF_ASSIGN_OR_RETURN(SparseIndexBuilder builder,
                      SparseIndexBuilder::Create(*backend, *world, prompt.geometry, Coverage::kTiles));
  LF_ASSIGN_OR_RETURN(const LayerIndex index,
                      builder.Build(plan, mine.View(mine.q), mine.View(mine.k), patterns));
  LF_ASSIGN_OR_RETURN(const auto attention, ParallelAttention::Create(*backend, *world, mesh, prompt.geometry,
                                                                      {.round_bytes = round_bytes}));
  const Buffer out =
      mine.Upload(std::vector<float>(mine.num_rows * prompt.geometry.num_q_heads * mine.width, NAN));
  before = memory.bytes_in_use();
  memory.ResetPeak();
  LF_ASSIGN_OR_RETURN(const ParallelAttentionStats stats,
                      attention->Run(plan, {.q = mine.View(mine.q),
                                            .k = mine.View(mine.k),
                                            .v = mine.View(mine.v),
                                            .indices = index.heads,
                                            .pairs = index.pairs,
                                            .out = out.data(),
                                            .sampled = monitor.positions()}));
  EXPECT_EQ(memory.peak_bytes() - before,
            ParallelAttention::PlanBytes(backend->kernels(), prompt.geometry, plan,
                                         {.round_bytes = round_bytes,
                                          .num_sampled = static_cast<int64_t>(monitor.positions().size())}));
  Outcome outcome;
  LF_ASSIGN_OR_RETURN(outcome.recall, monitor.Recall(stats.sampled_lse));
  for (const IndexView& view : index.heads) {
    outcome.index.push_back(DownloadIndex(*backend, view, prompt.num_tokens));
  }
  return outcome;
}

oracle::Mask MaskOf(const SparseIndex& index, const HeadPattern& pattern, int64_t num_tokens) {
  if (std::holds_alternative<Dense>(pattern)) return oracle::DenseMask(num_tokens);
  if (const auto* a_shape = std::get_if<AShape>(&pattern)) return oracle::AShapeMask(*a_shape, num_tokens);
  if (const auto* lines = std::get_if<DiagonalColumnIndex>(&index)) {
    return oracle::TilesMask(lines->columns, lines->distances, num_tokens);
  }
  const auto& list = std::get<BlockListIndex>(index);
  std::vector<std::vector<int32_t>> blocks;
  for (size_t m = 0; m + 1 < list.row_offsets.size(); ++m) {
    blocks.emplace_back(list.key_blocks.begin() + list.row_offsets[m],
                        list.key_blocks.begin() + list.row_offsets[m + 1]);
  }
  return oracle::BlockMask(blocks, num_tokens);
}

// By the definition: attention weight of the covered keys among those that a row may see, in the mean over
// the sampled rows.
std::vector<double> RecallInFp64(const Prompt& prompt, const std::vector<SparseIndex>& index,
                                 std::span<const HeadPattern> patterns, int64_t window) {
  const AttentionGeometry& geometry = prompt.geometry;
  const std::vector<int64_t> rows = SampledPositions(prompt.num_tokens, geometry.q_per_kv());
  const oracle::Mask visible = window == 0 ? oracle::DenseMask(prompt.num_tokens)
                                           : oracle::AShapeMask(AShape{0, window}, prompt.num_tokens);
  std::vector<double> recall;
  for (int64_t head = 0; head < geometry.num_q_heads; ++head) {
    const oracle::Mask covered = MaskOf(index[head], patterns[head], prompt.num_tokens);
    double sum = 0;
    for (const int64_t row : rows) {
      const float* q = &prompt.q[(head * prompt.num_tokens + row) * geometry.head_dim];
      double all = 0, of_covered = 0;
      for (int64_t key = 0; key <= row; ++key) {
        if (!visible.At(row, key)) continue;
        const float* k =
            &prompt.k[(head / geometry.q_per_kv() * prompt.num_tokens + key) * geometry.head_dim];
        double product = 0;
        for (int64_t i = 0; i < geometry.head_dim; ++i) product += static_cast<double>(q[i]) * k[i];
        const double weight = std::exp(geometry.scale * product);
        all += weight;
        if (covered.At(row, key)) of_covered += weight;
      }
      if (all > 0) sum += of_covered / all;  // not if it is no number
    }
    recall.push_back(sum / static_cast<double>(rows.size()));
  }
  return recall;
}

class RecallMonitorTest : public RankBackendTest {
 protected:
  void ExpectTheDefinition(const Prompt& prompt, std::span<const HeadPattern> patterns, int64_t window = 0,
                           int64_t round_bytes = 0) {
    for (const int size : Sizes()) {
      for (const Mesh& mesh : Factorisations(size)) {
        OnEveryRank(size, [&](Communicator& world) {
          SCOPED_TRACE(
              absl::StrCat(prompt.num_tokens, " tokens, window ", window, ", mesh ", ToString(mesh)));
          LF_ASSERT_OK_AND_ASSIGN(const Outcome got,
                                  WatchOn(GetParam(), world, prompt, mesh, patterns, window, round_bytes));
          std::vector<double> most = got.recall, least = got.recall;
          const auto count = static_cast<int64_t>(most.size());
          LF_ASSERT_OK(world.AllReduce(most.data(), count, ReduceType::kFloat64, ReduceOp::kMax, g_stream));
          LF_ASSERT_OK(world.AllReduce(least.data(), count, ReduceType::kFloat64, ReduceOp::kMin, g_stream));
          EXPECT_EQ(most, least) << "ranks decide alike";
          if (world.rank() != 0) return;
          const std::vector<double> expected = RecallInFp64(prompt, got.index, patterns, window);
          for (size_t head = 0; head < expected.size(); ++head) {
            EXPECT_NEAR(got.recall[head], expected[head], on_gpu() ? 4e-3 : 1e-5)
                << ToString(patterns[head]) << ", head " << head;
          }
        });
      }
    }
  }
};

TEST_P(RecallMonitorTest, IsTheDefinitionForEveryPatternAndMesh) {
  const HeadPattern kinds[] = {AShape{7, 70}, VerticalSlash{40, 120}, BlockSparse{3}, BlockShare{3, 0.1},
                               Dense{}};
  uint32_t seed = 40;
  for (const auto& [heads, kv_heads] : {std::pair(10, 5), std::pair(7, 1), std::pair(5, 5)}) {
    for (const int64_t num_tokens : {1, 129, 700}) {
      const Prompt prompt(MakeGeometry(heads, kv_heads), num_tokens, ++seed);
      std::vector<HeadPattern> patterns(heads);
      for (size_t h = 0; h < patterns.size(); ++h) patterns[h] = kinds[h % std::size(kinds)];
      ExpectTheDefinition(prompt, patterns);
    }
  }
}

// On every mesh alike, although which of a number and NaN is larger depends on their order.
TEST_P(RecallMonitorTest, RowsWhoseWeightsAreNoNumbersHaveNone) {
  for (const int64_t num_tokens : {129, 700}) {
    Prompt prompt(MakeGeometry(4, 2), num_tokens, 70);
    const int64_t width = prompt.geometry.head_dim;
    std::fill_n(prompt.q.begin() + (num_tokens + num_tokens - 1) * width, width, NAN);  // head 1, last row
    ExpectTheDefinition(prompt,
                        std::vector<HeadPattern>{AShape{7, 70}, AShape{7, 70}, Dense{}, AShape{1, 90}});
  }
}

// More query heads for each KV head than a tile holds rows of.
TEST_P(RecallMonitorTest, RowsMayFillSeveralTiles) {
  const Prompt prompt(MakeGeometry(12, 1), 500, 60);
  ExpectTheDefinition(prompt, std::vector<HeadPattern>(12, VerticalSlash{30, 50}));
}

TEST_P(RecallMonitorTest, IsRelativeToTheWindowOfTheModel) {
  const Prompt prompt(MakeGeometry(4, 2), 700, 61);
  const std::vector<HeadPattern> patterns{AShape{0, 30}, AShape{0, 100}, AShape{0, 200}, AShape{0, 150}};
  ExpectTheDefinition(prompt, patterns, /*window=*/200);
}

TEST_P(RecallMonitorTest, HoldsWithLongerDealtBlocks) {
  Prompt prompt(MakeGeometry(4, 2), 1100, 47);
  prompt.deal_block = 256;
  ExpectTheDefinition(
      prompt, std::vector<HeadPattern>{AShape{7, 70}, VerticalSlash{40, 60}, Dense{}, BlockShare{3, 0.1}});
}

TEST_P(RecallMonitorTest, HoldsInRoundsOfOneKvHead) {
  const Prompt prompt(MakeGeometry(6, 3), 520, 62);
  ExpectTheDefinition(prompt, std::vector<HeadPattern>(6, VerticalSlash{30, 60}), 0, /*round_bytes=*/1);
}

// Some heads, with gaps: they get what they get among all, and the others keep what was there.
TEST_P(RecallMonitorTest, SomeHeadsAreComputedAloneAndOthersStay) {
  const Prompt prompt(MakeGeometry(8, 4), 700, 63);
  const std::vector<HeadPattern> patterns(8, AShape{7, 70});
  for (const std::vector<int32_t>& heads :
       {std::vector<int32_t>{5}, std::vector<int32_t>{0, 3, 4, 7}, std::vector<int32_t>{1, 2}}) {
    for (const int size : Sizes()) {
      for (const Mesh& mesh : Factorisations(size)) {
        for (const int64_t round_bytes : {0, 1}) {
          OnEveryRank(size, [&](Communicator& host) {
            SCOPED_TRACE(absl::StrCat("mesh ", ToString(mesh), ", ", heads.size(), " heads"));
            const ShardPlan plan = prompt.Plan(mesh);
            LF_ASSERT_OK_AND_ASSIGN(const auto backend, RankBackend(GetParam(), host.rank()));
            LF_ASSERT_OK_AND_ASSIGN(const auto world, DeviceWorld(GetParam(), host, *backend));
            const RankPrompt mine(prompt, plan, host.rank(), *backend);
            LF_ASSERT_OK_AND_ASSIGN(
                SparseIndexBuilder builder,
                SparseIndexBuilder::Create(*backend, *world, prompt.geometry, Coverage::kTiles));
            LF_ASSERT_OK_AND_ASSIGN(const LayerIndex index,
                                    builder.Build(plan, mine.View(mine.q), mine.View(mine.k), patterns));
            LF_ASSERT_OK_AND_ASSIGN(const auto attention,
                                    ParallelAttention::Create(*backend, *world, mesh, prompt.geometry,
                                                              {.round_bytes = round_bytes}));
            const int64_t row = prompt.geometry.num_q_heads * mine.width;
            const Buffer whole = mine.Upload(std::vector<float>(mine.num_rows * row, 3));
            const Buffer some = mine.Upload(std::vector<float>(mine.num_rows * row, 3));
            ParallelAttentionParams params{.q = mine.View(mine.q),
                                           .k = mine.View(mine.k),
                                           .v = mine.View(mine.v),
                                           .indices = index.heads,
                                           .pairs = index.pairs,
                                           .out = whole.data()};
            LF_ASSERT_OK(attention->Run(plan, params).status());
            params.out = some.data();
            params.heads = heads;
            LF_ASSERT_OK(attention->Run(plan, params).status());
            const std::vector<float> expected = mine.Download(whole);
            const std::vector<float> got = mine.Download(some);
            for (size_t i = 0; i < got.size(); ++i) {
              const auto head = static_cast<int32_t>(static_cast<int64_t>(i) % row / mine.width);
              const bool computed = std::ranges::binary_search(heads, head);
              ASSERT_EQ(got[i], computed ? expected[i] : 3.0F) << "element " << i << " of head " << head;
            }
          });
        }
      }
    }
  }
}

TEST_P(RecallMonitorTest, BadListsAreNamedOnAllRanks) {
  const Prompt prompt(MakeGeometry(2, 1), 300, 64);
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& world) {
      const ShardPlan plan({size, 1}, prompt.num_tokens);
      LF_ASSERT_OK_AND_ASSIGN(const auto backend, RankBackend(GetParam(), world.rank()));
      LF_ASSERT_OK_AND_ASSIGN(const auto attention,
                              ParallelAttention::Create(*backend, world, {size, 1}, prompt.geometry));
      const std::vector<IndexView> indices(2);
      const std::vector<PairCounts> pairs(2);
      const std::vector<int32_t> heads{0, 2};
      EXPECT_THAT(attention->Run(plan, {.indices = indices, .pairs = pairs, .heads = heads}).status(),
                  StatusIs(absl::StatusCode::kInvalidArgument, testing::HasSubstr("heads[1] = 2 of 2")));
      const std::vector<int64_t> sampled{7, 7};
      EXPECT_THAT(attention->Run(plan, {.indices = indices, .pairs = pairs, .sampled = sampled}).status(),
                  StatusIs(absl::StatusCode::kInvalidArgument, testing::HasSubstr("sampled[1] = 7 of 300")));
    });
  }
}

LF_INSTANTIATE_RANK_BACKENDS(RecallMonitorTest);

}  // namespace
}  // namespace longfill
