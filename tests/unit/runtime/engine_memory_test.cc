// The memory plan: what it predicts against what a prompt takes, and what is refused by it.

#include "runtime/engine/memory_plan.h"

#include <limits>
#include <random>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "runtime/engine/prefill_engine.h"
#include "runtime/kv/kv_discard_sink.h"
#include "tests/testing/sanitized.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/runtime/fake_device.h"

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
    patterns_ = PatternSet::Uniform(VerticalSlash{1000, 6096}, config_.num_layers, config_.num_q_heads);
  }
  MemoryPlanInput Input(const Mesh& mesh, int64_t num_tokens) const {
    return {.config = &config_,
            .kernels = &backend_->kernels(),
            .patterns = &patterns_,
            .weights_bytes = 1000,
            .mesh = mesh,
            .num_tokens = num_tokens};
  }
  const std::unique_ptr<Backend> backend_ = CreateCpuBackend(1);
  ModelConfig config_;
  PatternSet patterns_;
};

TEST_F(MemoryPlanTest, GrowsWithThePrompt) {
  for (const Mesh& mesh : kMeshes) {
    int64_t previous = PlanMemory(Input(mesh, 0)).TotalBytes();
    for (int64_t num_tokens = 1; num_tokens < 5000; num_tokens += num_tokens < 300 ? 1 : 37) {
      MemoryPlanInput input = Input(mesh, num_tokens);
      input.kv_tier = {.kind = KvTierKind::kHost};
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
  EXPECT_EQ(plan.PoolBytes(), plan.activation_bytes + plan.attention_bytes + plan.index_bytes);
}

// Of a device: two budgets, either of which may be the one that refuses.
TEST_F(MemoryPlanTest, DeviceAndHostAreCheckedByThemselves) {
  FakeDevice device;
  MemoryPlanInput input = Input({2, 1}, 1000);
  input.kernels = &device.kernels();
  input.weights_in_pool = true;
  input.outside_bytes = 50;
  input.kv_tier = {.kind = KvTierKind::kHost};
  input.kv_export = {.num_buffers = 3, .buffer_bytes = 100};
  const MemoryPlan plan = PlanMemory(input);
  EXPECT_EQ(plan.kv_ring_bytes, 300);
  EXPECT_GT(plan.staging_bytes, 0);
  EXPECT_EQ(plan.DeviceBytes(), plan.PoolBytes() + 50);
  EXPECT_EQ(plan.HostBytes(),
            plan.logits_bytes + plan.staging_bytes + plan.kv_ring_bytes + plan.kv_store_bytes);
  const MemoryBudget exact = {.device_bytes = plan.DeviceBytes(), .host_bytes = plan.HostBytes()};
  LF_EXPECT_OK(CheckFits(input, exact));
  MemoryBudget budget = exact;
  --budget.device_bytes;
  EXPECT_THAT(CheckFits(input, budget),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr(absl::StrCat(plan.DeviceBytes(), " bytes of GPU memory")),
                             HasSubstr("tokens would fit"))));
  EXPECT_LT(LongestPrompt(input, budget, 2000), 1000);
  budget = exact;
  --budget.host_bytes;
  EXPECT_THAT(CheckFits(input, budget),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       HasSubstr(absl::StrCat(plan.HostBytes(), " bytes of host memory"))));
  input.staged_exchange = false;
  EXPECT_EQ(PlanMemory(input).staging_bytes, 0) << "from device to device";
  input.staged_exchange = true;
  input.mesh = {1, 1};
  EXPECT_EQ(PlanMemory(input).staging_bytes, 0);
}

TEST_F(MemoryPlanTest, RowsOfOtherHostsCountOnTop) {
  FakeDevice device;
  MemoryPlanInput input = Input({4, 1}, 1000);
  input.kernels = &device.kernels();
  input.peer_copies = true;
  const MemoryPlan one_host = PlanMemory(input);
  input.peer_hosts = PeerHosts({0, 0, 1, 1});
  const MemoryPlan two_hosts = PlanMemory(input);
  const ShardPlan plan(input.mesh, input.num_tokens);
  const int64_t most_rows =
      std::max(plan.NumTokens(0) + plan.NumTokens(2), plan.NumTokens(1) + plan.NumTokens(3));
  const int64_t row_bytes =
      input.config->num_kv_heads * input.config->head_dim * DTypeBytes(device.kernels().compute_dtype());
  EXPECT_EQ(two_hosts.activation_bytes - one_host.activation_bytes, 2 * most_rows * row_bytes);
}

TEST_F(MemoryPlanTest, ReplacedIndicesCountOnTop) {
  MemoryPlanInput input = Input({1, 1}, 1000);
  const MemoryPlan without = PlanMemory(input);
  input.replacement_bytes = [](int64_t num_tokens) { return 3 * num_tokens; };
  EXPECT_EQ(PlanMemory(input).PoolBytes() - without.PoolBytes(), 3000);
}

TEST_F(MemoryPlanTest, KeepingTheKvAddsItsBytes) {
  for (const Mesh& mesh : kMeshes) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const int64_t num_tokens : {1, 127, 128, 129, 1337}) {
        MemoryPlanInput input = Input(mesh, num_tokens);
        const int64_t without = PlanMemory(input).TotalBytes();
        input.kv_tier = {.kind = KvTierKind::kHost};
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

// A budget of the device counts whole, a ring of the host as far as the prompt fills it.
TEST_F(MemoryPlanTest, TiersCountTheirBytes) {
  FakeDevice device;
  MemoryPlanInput input = Input({2, 1}, 1000);
  input.kernels = &device.kernels();
  const MemoryPlan without = PlanMemory(input);
  input.kv_tier = {.kind = KvTierKind::kDevice, .bytes = 600000};
  const MemoryPlan on_device = PlanMemory(input);
  EXPECT_EQ(on_device.DeviceBytes() - without.DeviceBytes(), 600000);
  EXPECT_EQ(on_device.PoolBytes() - without.PoolBytes(), 600000);
  EXPECT_EQ(on_device.HostBytes() - without.HostBytes(), 8 << 20);
  EXPECT_EQ(on_device.kv_needed_bytes, 2 * 2 * 2 * 32 * 512 * 2);  // 512 rows of bfloat16
  const MemoryBudget plenty = {.device_bytes = int64_t{1} << 40, .host_bytes = int64_t{1} << 40};
  LF_EXPECT_OK(CheckFits(input, plenty));
  input.num_tokens = 20000;
  EXPECT_THAT(CheckFits(input, plenty),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("600000 are kept for KV caches on the device"),
                             HasSubstr("up to 2322 tokens"))));
  input.kv_tier = {.kind = KvTierKind::kReader, .bytes = 1 << 20};
  input.kv_dtype = DType::kBFloat16;
  EXPECT_EQ(PlanMemory(input).kv_store_bytes, 1 << 20);
  EXPECT_EQ(PlanMemory(input).kv_budget_bytes, 0);
  input.num_tokens = 100;
  EXPECT_EQ(PlanMemory(input).kv_store_bytes, 2 * 2 * 2 * 32 * 100 * 2);
}

TEST_F(MemoryPlanTest, RefusesWithTheLongestPromptThatFits) {
  for (const Mesh& mesh : kMeshes) {
    for (const int64_t fitting : {1, 127, 128, 1000, 20011}) {
      SCOPED_TRACE(absl::StrCat(ToString(mesh), " ", fitting));
      MemoryPlanInput input = Input(mesh, fitting);
      const MemoryBudget available = {.host_bytes = PlanMemory(input).TotalBytes()};
      LF_EXPECT_OK(CheckFits(input, available));
      input.num_tokens = 1 << 20;
      const absl::Status refused = CheckFits(input, available);
      ASSERT_THAT(refused,
                  StatusIs(absl::StatusCode::kResourceExhausted,
                           AllOf(HasSubstr("1048576 tokens"), HasSubstr(absl::StrCat(available.host_bytes)),
                                 HasSubstr(absl::StrCat(PlanMemory(input).TotalBytes())))));
      const std::string message(refused.message());
      const size_t begin = message.find("up to ") + 6;
      int64_t named = -1;
      ASSERT_TRUE(absl::SimpleAtoi(message.substr(begin, message.find(' ', begin) - begin), &named))
          << message;
      input.num_tokens = named;
      LF_EXPECT_OK(CheckFits(input, available));
      // The fullest rank of a slightly shorter prompt may have more tokens (kMaxExcess).
      EXPECT_GE(static_cast<double>(named), 0.99 * static_cast<double>(fitting));
      input.num_tokens = named + named / 50 + kTokenBlock * mesh.size();
      EXPECT_THAT(CheckFits(input, available),
                  StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("tokens would fit")));
    }
  }
  EXPECT_THAT(CheckFits(Input({1, 1}, 10), {.host_bytes = 5}),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("up to 0 tokens")));
}

TEST_F(MemoryPlanTest, AvailableMemoryIsSharedByTheRanksOfTheHost) {
  LF_ASSERT_OK_AND_ASSIGN(const int64_t alone, AvailableMemoryBytes(1, 0));
  LF_ASSERT_OK_AND_ASSIGN(const int64_t shared, AvailableMemoryBytes(8, 0));
  EXPECT_GT(alone, 0);
  EXPECT_GT(shared, 0);
  EXPECT_LT(shared, alone / 4);
  // Mapped files are all there for every rank.
  LF_ASSERT_OK_AND_ASSIGN(const int64_t mapped, AvailableMemoryBytes(8, int64_t{1} << 50));
  EXPECT_GT(mapped, int64_t{1} << 50);
}

// Half dense heads, half sparse ones, and layers that differ.
constexpr char kMixedPatterns[] =
    R"([{"0": ["vertical_and_slash", 100, 300, 1.0], "1": ["stream_llm", 7, 70, 1.0]},
        {"0": ["block_sparse", 0, 0, 1.0], "1": ["vertical_and_slash", 1000, 20, 1.0]}])";

// Whole prompts on one rank: what Backend::memory() gave out at most, against the plan.
void ExpectPeakIsThePlan(const EngineOptions& options, const ModelConfig& config) {
  const auto world = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(const auto engine, PrefillEngine::Create(options, *world));
  for (const char* attention : {"dense", "a-shape:7,70", "vertical-slash:1000,6096", "block-sparse:3",
                                "block-share:3,0.1", "block-share:8,0.1,8", kMixedPatterns}) {
    for (const int64_t num_tokens : {1, 64, 129, 3001}) {
      SCOPED_TRACE(absl::StrCat(num_tokens, " tokens, ", attention));
      PrefillRequest request;
      request.token_ids.assign(num_tokens, 5);
      request.attention.text = attention;
      if (attention == kMixedPatterns) request.attention = {"mixed.json", attention};
      request.logits_positions.resize(std::min<int64_t>(num_tokens, 100));
      request.kv_dtype = engine->compute_dtype();
      LF_ASSERT_OK_AND_ASSIGN(const PrefillResult result,
                              engine->Prefill(request, MakeKvDiscardSinkFactory(), {}));
      const PrefillFigures& figures = result.figures;
      EXPECT_LE(figures.peak_device_bytes, figures.planned_device_bytes);
      EXPECT_GE(static_cast<double>(figures.peak_device_bytes),
                0.97 * static_cast<double>(figures.planned_device_bytes));
      EXPECT_EQ(figures.planned_device_bytes, engine->PlanMemory(request).PoolBytes());
      EXPECT_EQ(result.logits.size(), request.logits_positions.size() * config.vocab_size);
    }
  }
}

// A monitor takes what is planned; a guard no more than that, and how much is known when all heads fall
// short.
TEST_F(MemoryPlanTest, PeakOfAWatchedPromptIsInThePlan) {
  config_.max_position_embeddings = 4096;
  const auto world = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(
      const auto engine,
      PrefillEngine::Create({.bench_model = BenchModel{.config = config_, .seed = 1}}, *world));
  for (const char* attention :
       {"a-shape:7,70", "vertical-slash:100,200", "block-sparse:3", "block-share:3,0.1", kMixedPatterns}) {
    if (kSanitized && attention != kMixedPatterns) continue;
    for (const double min_recall : {0.0, 1.0}) {
      for (const int64_t num_tokens : {1, 129, 3001}) {
        SCOPED_TRACE(absl::StrCat(num_tokens, " tokens, ", attention, ", least recall ", min_recall));
        PrefillRequest request;
        request.token_ids.resize(num_tokens);
        for (int64_t i = 0; i < num_tokens; ++i) request.token_ids[i] = static_cast<int32_t>(i * 37 % 97);
        request.attention.text = attention;
        if (attention == kMixedPatterns) request.attention = {"mixed.json", attention};
        request.recall = {.monitor = true, .min_recall = min_recall};
        LF_ASSERT_OK_AND_ASSIGN(const PrefillResult result,
                                engine->Prefill(request, MakeKvDiscardSinkFactory(), {}));
        const PrefillFigures& figures = result.figures;
        EXPECT_LE(figures.peak_device_bytes, figures.planned_device_bytes);
        EXPECT_GE(static_cast<double>(figures.peak_device_bytes),
                  (min_recall == 0 ? 0.97 : 0.6) * static_cast<double>(figures.planned_device_bytes));
        EXPECT_EQ(figures.planned_device_bytes, engine->PlanMemory(request).PoolBytes());
        if (num_tokens != 129) {  // where some patterns leave out keys
          EXPECT_EQ(figures.recall.recomputed > 0, num_tokens == 3001 && min_recall == 1);
        }
      }
    }
  }
}

TEST_F(MemoryPlanTest, NobodyWhoWatchesTakesNothing) {
  MemoryPlanInput input = Input({2, 2}, 3000);
  patterns_ = PatternSet::Uniform(VerticalSlash{100, 200}, config_.num_layers, config_.num_q_heads);
  const MemoryPlan without = PlanMemory(input);
  input.recall.monitor = true;
  const MemoryPlan watched = PlanMemory(input);
  EXPECT_GE(watched.attention_bytes, without.attention_bytes);
  EXPECT_EQ(watched.index_bytes, without.index_bytes);
  input.recall.min_recall = 0.9;
  EXPECT_GT(PlanMemory(input).index_bytes, without.index_bytes) << "indices of four times the budgets";
  patterns_ = PatternSet::Uniform(Dense{}, config_.num_layers, config_.num_q_heads);
  const int64_t guarded = PlanMemory(input).PoolBytes();
  input.recall = {};
  EXPECT_EQ(PlanMemory(input).PoolBytes(), guarded) << "dense heads are not watched";
}

TEST_F(MemoryPlanTest, PeakOfAPromptIsThePlanOnTheCpu) {
  config_.max_position_embeddings = 4096;
  ExpectPeakIsThePlan({.bench_model = BenchModel{.config = config_, .seed = 1}}, config_);
}

TEST_F(MemoryPlanTest, PeakOfAPromptIsThePlanOnCuda) {
  const absl::StatusOr<int> devices = CudaDeviceCount();
  if (!devices.ok()) GTEST_SKIP() << devices.status().message();
  config_.max_position_embeddings = 4096;
  config_.head_dim = 64;  // of those that a GPU has kernels for
  ExpectPeakIsThePlan({.bench_model = BenchModel{.config = config_, .seed = 1},
                       .device = {.kind = DeviceKind::kCuda},
                       .kv_export = {.num_buffers = 2, .buffer_bytes = int64_t{1} << 20}},
                      config_);
}

TEST_F(MemoryPlanTest, PromptBeyondTheLimitIsRefusedWithTheLengthThatFits) {
  config_.max_position_embeddings = 1 << 20;
  const auto world = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(
      const auto engine,
      PrefillEngine::Create(
          {.bench_model = BenchModel{.config = config_, .seed = 1}, .memory_limit_bytes = 32 << 20}, *world));
  PrefillRequest request;
  request.attention.text = "dense";
  request.token_ids.assign(100000, 5);
  const int64_t longest = engine->LongestPrompt(request);
  EXPECT_THAT(engine->Validate(request), StatusIs(absl::StatusCode::kResourceExhausted,
                                                  HasSubstr(absl::StrCat("up to ", longest, " "))));
  EXPECT_GT(longest, 0);
  request.token_ids.resize(longest);
  LF_EXPECT_OK(engine->Validate(request));
}

}  // namespace
}  // namespace longfill
