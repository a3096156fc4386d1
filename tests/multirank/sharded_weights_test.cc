// Layers that the ranks gather are those of the checkpoint, in whatever order prompts end.

#include "models/sharded_weights.h"

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "models/config.h"
#include "models/device_weights.h"
#include "tests/multirank/engine_group.h"
#include "tests/multirank/rank_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

class ShardedWeightsTest : public RankBackendTest {};

std::vector<uint8_t> Download(Backend& backend, const void* data, int64_t bytes) {
  std::vector<uint8_t> host(static_cast<size_t>(bytes));
  LF_EXPECT_OK(backend.kernels().CopyOut(host.data(), data, bytes, backend.stream()));
  LF_EXPECT_OK(backend.stream().Sync());
  return host;
}

void ExpectEqualLinear(Backend& backend, const LinearWeights& got, const LinearWeights& expected,
                       DType bias_dtype) {
  ASSERT_EQ(got.dtype, expected.dtype);
  ASSERT_EQ(got.out_width, expected.out_width);
  ASSERT_EQ(got.in_width, expected.in_width);
  const int64_t bytes = got.out_width * got.in_width * DTypeBytes(got.dtype);
  EXPECT_EQ(Download(backend, got.weight, bytes), Download(backend, expected.weight, bytes));
  ASSERT_EQ(got.bias == nullptr, expected.bias == nullptr);
  if (got.bias == nullptr) return;
  const int64_t bias_bytes = got.out_width * DTypeBytes(bias_dtype);
  EXPECT_EQ(Download(backend, got.bias, bias_bytes), Download(backend, expected.bias, bias_bytes));
}

void ExpectEqualNorm(Backend& backend, const float* got, const float* expected, int64_t width) {
  ASSERT_EQ(got == nullptr, expected == nullptr);
  if (got == nullptr) return;
  const auto bytes = width * static_cast<int64_t>(sizeof(float));
  EXPECT_EQ(Download(backend, got, bytes), Download(backend, expected, bytes));
}

void ExpectEqualLayer(Backend& backend, const ModelConfig& config, LayerWeights got, LayerWeights expected) {
  for (int i = 0; i < kNumWeightRoles; ++i) {
    SCOPED_TRACE(absl::StrCat("role ", i));
    const auto role = static_cast<WeightRole>(i);
    if (expected.Linear(role) != nullptr) {
      ExpectEqualLinear(backend, *got.Linear(role), *expected.Linear(role),
                        backend.kernels().compute_dtype());
    } else if (expected.Norm(role) != nullptr) {
      ExpectEqualNorm(backend, *got.Norm(role), *expected.Norm(role), ShapeOf(role, config).out_width);
    }
  }
}

// All on one rank: what each of them shall have.
absl::StatusOr<std::unique_ptr<const ModelWeights>> Whole(const std::string& name, const ModelConfig& config,
                                                          Backend& backend) {
  LF_ASSIGN_OR_RETURN(auto host, ModelWeights::Load(GoldenModel(name), config));
  return UploadWeights(std::move(host), config, backend);
}

TEST_P(ShardedWeightsTest, GatheredLayersAreThoseOfTheCheckpoint) {
  for (const char* name : {"llama-all-biases-fp32", "llama-mha-tied-fp16", "phi3-longrope-long-factors"}) {
    for (const int size : Sizes()) {
      OnEveryRank(size, [&](Communicator& host_world) {
        SCOPED_TRACE(absl::StrCat(name, ", ", size, " ranks"));
        LF_ASSERT_OK_AND_ASSIGN(const auto backend, RankBackend(GetParam(), host_world.rank()));
        LF_ASSERT_OK_AND_ASSIGN(const auto world, DeviceWorld(GetParam(), host_world, *backend));
        LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(GoldenModel(name)));
        LF_ASSERT_OK_AND_ASSIGN(const auto expected, Whole(name, config, *backend));
        LF_ASSERT_OK_AND_ASSIGN(const auto host, ModelWeights::Load(GoldenModel(name), config));
        const int64_t before = backend->memory().bytes_in_use();
        LF_ASSERT_OK_AND_ASSIGN(
            const auto weights,
            ShardedWeights::Convert(*host, config, *backend, host_world.rank(), host_world.size()));
        const WeightDTypes dtypes = DTypesOfShards(host.get(), config, backend->kernels());
        EXPECT_EQ(backend->memory().bytes_in_use() - before,
                  ShardedWeights::PlanBytes(config, dtypes, host_world.size()));
        EXPECT_EQ(weights->bytes(), backend->memory().bytes_in_use() - before);
        LF_ASSERT_OK(weights->Connect(*world));
        ExpectEqualLinear(*backend, weights->resident().embedding(), expected->embedding(), dtypes.biases);
        ExpectEqualLinear(*backend, weights->resident().lm_head(), expected->lm_head(), dtypes.biases);
        ExpectEqualNorm(*backend, weights->resident().final_norm(), expected->final_norm(),
                        config.hidden_size);
        EXPECT_EQ(weights->resident().num_parameters(), host->num_parameters());
        // A whole prompt, one that ends after its first layer, and a whole one again.
        for (const int64_t num_layers : {config.num_layers, int64_t{1}, config.num_layers}) {
          weights->ResetSeconds();
          for (int64_t layer = 0; layer < num_layers; ++layer) {
            SCOPED_TRACE(absl::StrCat("layer ", layer));
            LF_ASSERT_OK_AND_ASSIGN(const LayerWeights* gathered, weights->Gather(layer));
            ExpectEqualLayer(*backend, config, *gathered, expected->layer(layer));
          }
          LF_ASSERT_OK_AND_ASSIGN(const ShardedWeights::Seconds seconds, weights->TakenSeconds());
          EXPECT_GE(seconds.communication, 0);
          EXPECT_GE(seconds.exposed, 0);
        }
        CpuStream stream;
        LF_EXPECT_OK(host_world.Barrier(stream));
      });
    }
  }
}

// A peer that has left ends the exchange on all others, soon and with an error. In a group of its own: that
// of the other tests would end with it.
TEST_P(ShardedWeightsTest, AnAbortedGroupGathersNothingMore) {
  if (on_gpu()) GTEST_SKIP() << "backends of GPUs are shared by all tests";
  const auto group = CreateInProcessCommunicators(2, {});
  const auto play = [&](Communicator& host_world) {
    LF_ASSERT_OK_AND_ASSIGN(const auto backend, RankBackend(GetParam(), host_world.rank()));
    LF_ASSERT_OK_AND_ASSIGN(const auto world, DeviceWorld(GetParam(), host_world, *backend));
    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(GoldenModel("llama-gqa4")));
    LF_ASSERT_OK_AND_ASSIGN(const auto weights, ShardedWeights::Random(config, 1, *backend, host_world.rank(),
                                                                       host_world.size()));
    LF_ASSERT_OK(weights->Connect(*world));
    if (host_world.rank() == 1) {
      host_world.Abort(absl::AbortedError("left"));
      return;
    }
    absl::Status status;
    for (int64_t layer = 0; layer < config.num_layers && status.ok(); ++layer) {
      status = weights->Gather(layer).status();
    }
    EXPECT_THAT(status, testing::Not(IsOk()));
  };
  std::thread peer([&] { play(*group[1]); });
  play(*group[0]);
  peer.join();
}

// A matrix depends on its seed and place, not on who keeps which part of it.
TEST_P(ShardedWeightsTest, RandomWeightsAreThoseOfOneRank) {
  for (const int size : Sizes()) {
    OnEveryRank(size, [&](Communicator& host_world) {
      LF_ASSERT_OK_AND_ASSIGN(const auto backend, RankBackend(GetParam(), host_world.rank()));
      LF_ASSERT_OK_AND_ASSIGN(const auto world, DeviceWorld(GetParam(), host_world, *backend));
      LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(GoldenModel("llama-gqa4")));
      LF_ASSERT_OK_AND_ASSIGN(const auto expected, RandomWeights(config, *backend, 5));
      LF_ASSERT_OK_AND_ASSIGN(
          const auto weights,
          ShardedWeights::Random(config, 5, *backend, host_world.rank(), host_world.size()));
      LF_ASSERT_OK(weights->Connect(*world));
      for (int64_t layer = 0; layer < config.num_layers; ++layer) {
        LF_ASSERT_OK_AND_ASSIGN(const LayerWeights* gathered, weights->Gather(layer));
        ExpectEqualLayer(*backend, config, *gathered, expected->layer(layer));
      }
      CpuStream stream;
      LF_EXPECT_OK(host_world.Barrier(stream));
    });
  }
}

LF_INSTANTIATE_RANK_BACKENDS(ShardedWeightsTest);

}  // namespace
}  // namespace longfill
