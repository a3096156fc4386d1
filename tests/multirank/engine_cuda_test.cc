// Whole models on a GPU against transformers' fp32 results, and ranks that share the GPU, or have one each,
// against one rank. Skips where there is none.

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <thread>

#include "absl/strings/str_cat.h"
#include "models/safetensors.h"
#include "runtime/kv/kv_discard_sink.h"
#include "tests/multirank/engine_group.h"
#include "tests/multirank/nccl_ranks.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// Twice the largest error of transformers' own bfloat16 run against its fp32 one over these checkpoints,
// relative to the largest element: 2.0 % for logits, 1.4 % for keys and values.
constexpr double kLogitsTolerance = 0.041;
constexpr double kKvTolerance = 0.028;

class EngineOnCuda : public testing::Test {
 protected:
  void SetUp() override {
    const absl::StatusOr<int> devices = CudaDeviceCount();
    if (!devices.ok()) GTEST_SKIP() << devices.status().message();
  }
  static GroupOptions Options(const std::string& model_dir, const Mesh& mesh) {
    return {.model_dir = model_dir,
            .mesh = mesh,
            .device = DeviceKind::kCuda,
            .ordinal = 0,
            .kv_export = {.num_buffers = 2, .buffer_bytes = 64 << 10},
            .memory_limit_bytes = 0};
  }
};

std::vector<float> Floats(const SafetensorsFile& file, const std::string& name) {
  const SafetensorsTensor* tensor = file.Find(name);
  EXPECT_NE(tensor, nullptr) << name;
  std::vector<float> values(tensor == nullptr ? 0 : tensor->bytes.size() / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), tensor->bytes.data(), tensor->bytes.size());
  return values;
}

std::vector<float> LayerOf(const PromptKv& kv, const std::vector<float>& all, int64_t layer) {
  const int64_t size = static_cast<int64_t>(all.size()) / kv.num_layers;
  return {all.begin() + layer * size, all.begin() + (layer + 1) * size};
}

bool HasKernels(const ModelConfig& config) {
  return config.head_dim == 64 || config.head_dim == 96 || config.head_dim == 128 || config.head_dim == 256;
}

TEST_F(EngineOnCuda, DenseOnOneRankEqualsTransformersInBFloat16) {
  const std::vector<std::string> folders = GoldenModels();
  int compared = 0;
  for (const std::string& folder : folders) {
    SCOPED_TRACE(folder);
    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(folder));
    if (!HasKernels(config)) continue;
    ++compared;
    LF_ASSERT_OK_AND_ASSIGN(const auto golden, SafetensorsFile::Open(folder + "/golden.safetensors"));
    const SafetensorsTensor* positions = golden->Find("positions");
    ASSERT_NE(positions, nullptr);
    const std::string tokens = ReadText(folder + "/tokens.i32");
    PrefillRequest request = MakeRequest("golden", std::vector<int32_t>(tokens.size() / 4), "dense");
    std::memcpy(request.token_ids.data(), tokens.data(), tokens.size());
    request.logits_positions.resize(positions->bytes.size() / 8);
    std::memcpy(request.logits_positions.data(), positions->bytes.data(), positions->bytes.size());
    Recorder recorder;
    WithEngine(Options(folder, {1, 1}), recorder, [&](PrefillEngine& engine) {
      EXPECT_EQ(engine.compute_dtype(), DType::kBFloat16);
      LF_ASSERT_OK_AND_ASSIGN(const PrefillResult result, Prefill(engine, recorder, request));
      ExpectNear(result.logits, Floats(*golden, "logits"), kLogitsTolerance, "logits");
      const PromptKv kv = recorder.Join("golden");
      for (int64_t layer = 0; layer < kv.num_layers; ++layer) {
        ExpectNear(LayerOf(kv, kv.key, layer), Floats(*golden, absl::StrCat("layer.", layer, ".key")),
                   kKvTolerance, "key");
        ExpectNear(LayerOf(kv, kv.value, layer), Floats(*golden, absl::StrCat("layer.", layer, ".value")),
                   kKvTolerance, "value");
      }
      for (const int owners : kv.owners) ASSERT_EQ(owners, 1);
      const PrefillFigures& figures = result.figures;
      EXPECT_LE(figures.peak_device_bytes, figures.planned_device_bytes);
      EXPECT_GE(static_cast<double>(figures.peak_device_bytes),
                0.97 * static_cast<double>(figures.planned_device_bytes));
      EXPECT_EQ(figures.compute_dtype, DType::kBFloat16);
      EXPECT_THAT(figures.device, HasSubstr("sm_"));
    });
  }
  EXPECT_GE(compared, 10);
}

TEST_F(EngineOnCuda, HeadDimWithoutKernelsIsRefusedAtTheStart) {
  const auto world = CreateSingleCommunicator();
  EXPECT_THAT(PrefillEngine::Create(
                  {.model_dir = GoldenModel("llama-gqa4"), .device = {.kind = DeviceKind::kCuda}}, *world),
              StatusIs(absl::StatusCode::kUnimplemented, AllOf(HasSubstr("head_dim"), HasSubstr("32"))));
}

TEST_F(EngineOnCuda, OrdinalThatIsNotThereIsNamed) {
  const auto world = CreateSingleCommunicator();
  EXPECT_THAT(PrefillEngine::Create({.model_dir = GoldenModel("llama-gqa7-tied"),
                                     .device = {.kind = DeviceKind::kCuda, .ordinal = 99}},
                                    *world),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("99")));
}

// Every mesh gives what the first one, of one rank, gives. Rows of a GEMM may round otherwise in another
// number of rows, and a selection at its cut with them.
void ExpectEqualMeshes(GroupOptions options, const std::vector<Mesh>& meshes,
                       const std::string& communicator) {
  const std::string& model = options.model_dir;
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(model));
  const int64_t num_tokens = std::min<int64_t>(config.max_position_embeddings, 500);
  for (const char* attention :
       {"dense", "a-shape:7,70", "vertical-slash:40,120", "block-sparse:3", "block-share:3,0.1"}) {
    std::vector<float> logits;
    PromptKv kv;
    for (const Mesh& mesh : meshes) {
      SCOPED_TRACE(absl::StrCat(attention, ", ", ToString(mesh)));
      Recorder recorder;
      options.mesh = mesh;
      const auto served = WithEngine(options, recorder, [&](PrefillEngine& engine) {
        PrefillRequest request =
            MakeRequest("shared", RandomIds(num_tokens, config.vocab_size, 3), attention);
        request.logits_positions = {num_tokens - 1, 0, num_tokens / 2};
        std::vector<int64_t> layers;
        PrefillCallbacks callbacks;
        callbacks.on_progress = [&](const PrefillProgress& progress) {
          layers.push_back(progress.layers_done);
        };
        LF_ASSERT_OK_AND_ASSIGN(const PrefillResult result, Prefill(engine, recorder, request, callbacks));
        EXPECT_EQ(static_cast<int64_t>(layers.size()), config.num_layers);
        const PromptKv got = recorder.Join("shared");
        if (mesh.size() == 1) {
          logits = result.logits;
          kv = got;
          return;
        }
        EXPECT_EQ(result.figures.communicator, communicator);
        ExpectNear(result.logits, logits, kLogitsTolerance, "logits");
        for (int64_t layer = 0; layer < kv.num_layers; ++layer) {
          ExpectNear(LayerOf(got, got.key, layer), LayerOf(kv, kv.key, layer), kKvTolerance, "key");
          ExpectNear(LayerOf(got, got.value, layer), LayerOf(kv, kv.value, layer), kKvTolerance, "value");
        }
        for (const int owners : got.owners) ASSERT_EQ(owners, 1);
      });
      for (const absl::Status& status : served) LF_EXPECT_OK(status);
    }
  }
}

TEST_F(EngineOnCuda, RanksThatShareTheGpuGiveWhatOneRankGives) {
  ExpectEqualMeshes(Options(GoldenModel("llama-gqa7-tied"), {}), {{1, 1}, {2, 1}, {1, 2}},
                    "staged in-process");
}

TEST_F(EngineOnCuda, RanksWithAGpuEachGiveWhatOneRankGivesOverNccl) {
  if (const absl::Status status = CheckNcclRanks(2); !status.ok()) GTEST_SKIP() << status.message();
  GroupOptions options = Options(GoldenModel("llama-gqa7-tied"), {});
  options.ordinal = -1;
  options.communicator = {.kind = CommunicatorKind::kNccl, .nccl = NcclTestOptions()};
  std::vector<Mesh> meshes{{1, 1}, {2, 1}, {1, 2}};
  for (int ranks = 4; CheckNcclRanks(ranks).ok() && ranks <= 8; ranks *= 2) {
    meshes.insert(meshes.end(), {{ranks, 1}, {1, ranks}, {2, ranks / 2}});
  }
  ExpectEqualMeshes(options, meshes, "nccl");
}

TEST_F(EngineOnCuda, NcclIsRefusedForRanksThatShareAGpu) {
  const auto hosts = CreateInProcessCommunicators(2, {.timeout = std::chrono::seconds(60)});
  const auto create = [&](int rank) {
    EXPECT_THAT(
        PrefillEngine::Create({.model_dir = GoldenModel("llama-gqa7-tied"),
                               .mesh = {2, 1},
                               .device = {.kind = DeviceKind::kCuda, .ordinal = 0, .ranks_on_host = 2},
                               .communicator = {.kind = CommunicatorKind::kNccl}},
                              *hosts[rank]),
        StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("NCCL cannot be used")));
  };
  std::thread other(create, 1);
  create(0);
  other.join();
}

// A sink that fails or stops does so from the exporter's thread, and the engine goes on to the next prompt.
TEST_F(EngineOnCuda, SinkThatFailsEndsTheRequestOnAllRanksAndNoMore) {
  const std::string model = GoldenModel("llama-gqa7-tied");
  Recorder recorder;
  const auto served = WithEngine(Options(model, {2, 1}), recorder, [&](PrefillEngine& engine) {
    for (int rank = 0; rank < 2; ++rank) {
      const auto request = [&](const std::string& id) {
        return MakeRequest(id, RandomIds(400, engine.config().vocab_size, 4), "vertical-slash:40,120");
      };
      EXPECT_THAT(Prefill(engine, recorder, request(absl::StrCat("append fails on ", rank))),
                  StatusIs(absl::StatusCode::kResourceExhausted,
                           AllOf(HasSubstr("the sink is full"), HasSubstr(absl::StrCat("rank ", rank)))));
      EXPECT_TRUE(engine.healthy());
      LF_EXPECT_OK(Prefill(engine, recorder, request(absl::StrCat("good after ", rank))).status());
    }
  });
  for (const absl::Status& status : served) LF_EXPECT_OK(status);
}

// What was copied out is what a file would hold.
TEST_F(EngineOnCuda, DiscardedKvHasTheSameChecksumEachTime) {
  const auto world = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(const auto engine,
                          PrefillEngine::Create({.model_dir = GoldenModel("llama-gqa7-tied"),
                                                 .device = {.kind = DeviceKind::kCuda},
                                                 .kv_export = {.num_buffers = 2, .buffer_bytes = 10000}},
                                                *world));
  const PrefillRequest request = MakeRequest("r", RandomIds(500, engine->config().vocab_size, 3), "dense");
  LF_ASSERT_OK_AND_ASSIGN(const PrefillResult first,
                          engine->Prefill(request, MakeKvDiscardSinkFactory(), {}));
  LF_ASSERT_OK_AND_ASSIGN(const PrefillResult again,
                          engine->Prefill(request, MakeKvDiscardSinkFactory(), {}));
  ASSERT_EQ(first.figures.rank_kv_checksums.size(), 1u);
  EXPECT_NE(first.figures.rank_kv_checksums[0], 0u);
  EXPECT_EQ(again.figures.rank_kv_checksums, first.figures.rank_kv_checksums);
  EXPECT_EQ(again.logits, first.logits);
}

TEST_F(EngineOnCuda, PromptBeyondTheLimitIsRefusedAndTheNextOneRuns) {
  GroupOptions options = Options(GoldenModel("llama-gqa7-tied"), {1, 1});
  options.memory_limit_bytes = 1;  // less than the context alone
  Recorder recorder;
  WithEngine(options, recorder, [&](PrefillEngine& engine) {
    EXPECT_THAT(engine.Validate(MakeRequest("r", RandomIds(300, 97, 1), "dense")),
                StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("GPU memory")));
  });
}

}  // namespace
}  // namespace longfill
