// The memory plan: what it predicts against what a prompt takes, and what is refused by it.

#include "runtime/engine/memory_plan.h"

#include <limits>
#include <random>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_kernel_set.h"
#include "models/transformer.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr Mesh kMeshes[] = {{1, 1}, {2, 1}, {1, 2}, {3, 2}, {1, 8}, {8, 1}};

class MemoryPlanTest : public testing::Test {
 protected:
  void SetUp() override {
    LF_ASSERT_OK_AND_ASSIGN(
        config_, LoadModelConfig(absl::StrCat(LONGFILL_SOURCE_DIR, "/tests/golden/data/llama-gqa4")));
  }
  MemoryPlanInput Input(const Mesh& mesh, int64_t num_tokens) const {
    return {.config = &config_, .weights_bytes = 1000, .mesh = mesh, .num_tokens = num_tokens};
  }
  ModelConfig config_;
};

TEST_F(MemoryPlanTest, GrowsWithThePrompt) {
  for (const Mesh& mesh : kMeshes) {
    int64_t previous = PlanMemory(Input(mesh, 0)).TotalBytes();
    for (int64_t num_tokens = 1; num_tokens < 5000; num_tokens += num_tokens < 300 ? 1 : 37) {
      MemoryPlanInput input = Input(mesh, num_tokens);
      input.keep_kv = true;
      const int64_t total = PlanMemory(input).TotalBytes();
      ASSERT_GE(total, previous) << num_tokens << " tokens, mesh " << ToString(mesh);
      previous = total;
    }
    EXPECT_GT(PlanMemory(Input(mesh, 1 << 20)).TotalBytes(), previous);
  }
}

TEST_F(MemoryPlanTest, TotalIsTheSumOfItsParts) {
  const MemoryPlan plan = PlanMemory(Input({2, 2}, 3000));
  EXPECT_EQ(plan.weights_bytes, 1000);
  EXPECT_GT(plan.activation_bytes, 0);
  EXPECT_GT(plan.attention_bytes, 0);
  EXPECT_GT(plan.index_bytes, 0);
  EXPECT_GT(plan.logits_bytes, 0);
  EXPECT_EQ(plan.kv_store_bytes, 0);
  EXPECT_EQ(plan.TotalBytes(), plan.weights_bytes + plan.activation_bytes + plan.attention_bytes +
                                   plan.index_bytes + plan.logits_bytes);
}

TEST_F(MemoryPlanTest, KeepingTheKvAddsItsBytes) {
  for (const Mesh& mesh : kMeshes) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const int64_t num_tokens : {1, 127, 128, 129, 1337}) {
        MemoryPlanInput input = Input(mesh, num_tokens);
        const int64_t without = PlanMemory(input).TotalBytes();
        input.keep_kv = true;
        input.kv_dtype = dtype;
        const ShardPlan plan(mesh, num_tokens);
        int64_t most = 0;
        for (int rank = 0; rank < mesh.size(); ++rank) most = std::max(most, plan.NumTokens(rank));
        // Key and value, 2 layers, 2 KV heads, head dim 32.
        EXPECT_EQ(PlanMemory(input).TotalBytes() - without, 2 * 2 * 2 * 32 * most * DTypeBytes(dtype));
      }
    }
  }
}

TEST_F(MemoryPlanTest, RefusesWithTheLongestPromptThatFits) {
  for (const Mesh& mesh : kMeshes) {
    for (const int64_t fitting : {1, 127, 128, 1000, 20011}) {
      SCOPED_TRACE(absl::StrCat(ToString(mesh), " ", fitting));
      MemoryPlanInput input = Input(mesh, fitting);
      const int64_t available = PlanMemory(input).TotalBytes();
      LF_EXPECT_OK(CheckFits(input, available));
      input.num_tokens = 1 << 20;
      const absl::Status refused = CheckFits(input, available);
      ASSERT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted,
                                    AllOf(HasSubstr("1048576 tokens"), HasSubstr(absl::StrCat(available)),
                                          HasSubstr(absl::StrCat(PlanMemory(input).TotalBytes())))));
      const std::string message(refused.message());
      const size_t begin = message.find("up to ") + 6;
      int64_t named = -1;
      ASSERT_TRUE(absl::SimpleAtoi(message.substr(begin, message.find(' ', begin) - begin), &named))
          << message;
      EXPECT_GE(named, fitting);
      input.num_tokens = named;
      LF_EXPECT_OK(CheckFits(input, available));
      input.num_tokens = named + 1;
      EXPECT_THAT(CheckFits(input, available), StatusIs(absl::StatusCode::kResourceExhausted,
                                                        HasSubstr(absl::StrCat("up to ", named, " "))));
    }
  }
  EXPECT_THAT(CheckFits(Input({1, 1}, 10), 5),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("up to 0 tokens")));
}

TEST_F(MemoryPlanTest, AvailableMemoryIsSharedByTheRanksOfTheHost) {
  LF_ASSERT_OK_AND_ASSIGN(const int64_t alone, AvailableMemoryBytes(1));
  LF_ASSERT_OK_AND_ASSIGN(const int64_t shared, AvailableMemoryBytes(8));
  EXPECT_GT(alone, 0);
  EXPECT_GT(shared, 0);
  EXPECT_LT(shared, alone / 4);
}

// All layers of a prompt on one rank, on an account of their own.
TEST_F(MemoryPlanTest, HoldsWhatAPromptTakes) {
  LF_ASSERT_OK_AND_ASSIGN(
      const auto weights,
      ModelWeights::Load(absl::StrCat(LONGFILL_SOURCE_DIR, "/tests/golden/data/llama-gqa4"), config_));
  for (const HeadPattern& pattern : {HeadPattern(Dense{}), HeadPattern(AShape{7, 70}),
                                     HeadPattern(VerticalSlash{1000, 6096}), HeadPattern(BlockSparse{3})}) {
    for (const int64_t num_tokens : {1, 64, 129, 3001}) {
      const ShardPlan plan({1, 1}, num_tokens);
      const MemoryPlan expected = PlanMemory(Input({1, 1}, num_tokens));
      ThreadPool pool(1);
      CpuMemoryResource memory;
      CpuStream stream;
      const auto world = CreateSingleCommunicator();
      const auto kernels = CreateCpuKernelSet(pool, memory);
      LF_ASSERT_OK_AND_ASSIGN(
          SparseIndexBuilder index,
          SparseIndexBuilder::Create(*kernels, *world, GeometryOf(config_), Coverage::kTiles));
      LF_ASSERT_OK_AND_ASSIGN(const auto attention,
                              ParallelAttention::Create(*kernels, *world, {1, 1}, GeometryOf(config_)));
      LF_ASSERT_OK_AND_ASSIGN(const auto transformer,
                              Transformer::Create(config_, *weights, *kernels, plan, 0));
      EXPECT_EQ(memory.bytes_in_use(), expected.activation_bytes);
      LF_ASSERT_OK(transformer->Embed(std::vector<int32_t>(num_tokens, 5), stream));
      LayerCallbacks callbacks;
      callbacks.on_kv = [](int64_t, int64_t, HeadsView<const float>, HeadsView<const float>) {
        return absl::OkStatus();
      };
      callbacks.should_stop = [] { return absl::OkStatus(); };
      callbacks.agree = [](const absl::Status& mine) { return mine; };
      LayerFigures figures;
      const std::vector<HeadPattern> patterns(config_.num_q_heads, pattern);
      for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
        LF_ASSERT_OK(transformer->RunLayer(layer, patterns,
                                           {.index_builder = &index, .attention = attention.get()}, callbacks,
                                           &figures, stream));
      }
      EXPECT_LE(memory.peak_bytes(),
                expected.activation_bytes + expected.attention_bytes + expected.index_bytes)
          << ToString(pattern) << ", " << num_tokens << " tokens";
    }
  }
}

}  // namespace
}  // namespace longfill
