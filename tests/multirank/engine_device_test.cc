// What an engine asks of its device between and before prompts: ranks that share one, memory that is not
// there, a device that is lost while nothing runs.

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "models/device_weights.h"
#include "tests/multirank/engine_group.h"
#include "tests/multirank/ranks.h"
#include "tests/testing/guarded_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kVocab = 97;
constexpr int64_t kMiB = int64_t{1} << 20;
constexpr KvExportOptions kSmallRing = {.num_buffers = 2, .buffer_bytes = 64 << 10};

std::shared_ptr<SharedDevice> Device(int64_t bytes) { return std::make_shared<SharedDevice>(bytes); }

EngineOptions Options(const Mesh& mesh) {
  return {.model_dir = GoldenModel("llama-gqa4"), .mesh = mesh, .kv_export = kSmallRing};
}

PrefillRequest Request(const std::string& id, const char* attention = "dense") {
  return MakeRequest(id, RandomIds(200, kVocab, 4), attention);
}

absl::Status ServeUntilTheEnd(PrefillEngine& engine) {
  return engine.Serve([](const KvTransferSpec&) { return nullptr; }, [] { return absl::OkStatus(); },
                      [](const absl::Status&) {});
}

absl::Status RunPrompt(PrefillEngine& engine, const PrefillRequest& request) {
  return engine.Prefill(request, [](const KvTransferSpec&) { return nullptr; }, {}).status();
}

// Makes a prompt of a small model as large as one of a large model.
class Ballast final : public IndexReplacement {
 public:
  explicit Ballast(const std::atomic<int64_t>& bytes) : bytes_(bytes) {}
  int64_t PlanBytes(int64_t) const override { return bytes_; }
  absl::Status Begin(Backend& backend, int64_t) override {
    LF_ASSIGN_OR_RETURN(buffer_, backend.memory().Allocate(bytes_, "ballast"));
    return absl::OkStatus();
  }
  absl::Status Replace(int64_t, LayerIndex*) override { return absl::OkStatus(); }
  void End() override { buffer_ = Buffer(); }

 private:
  const std::atomic<int64_t>& bytes_;
  Buffer buffer_;
};

// Engines of two ranks on devices[rank]; the outcomes of prompts with so much ballast, one after the other.
std::vector<absl::Status> RunWithBallast(const std::vector<std::shared_ptr<SharedDevice>>& devices,
                                         const std::vector<int64_t>& ballast_bytes) {
  std::atomic<int64_t> bytes{0};
  std::vector<absl::Status> outcomes;
  OnEveryRank(2, [&](Communicator& world) {
    EngineOptions options = Options({2, 1});
    options.index_replacement = std::make_shared<Ballast>(bytes);
    LF_ASSERT_OK_AND_ASSIGN(
        const auto engine,
        PrefillEngine::Create(options, world, CreateGuardedBackend({.device = devices[world.rank()]})));
    if (world.rank() != 0) {
      LF_EXPECT_OK(ServeUntilTheEnd(*engine));
      return;
    }
    for (const int64_t some : ballast_bytes) {
      bytes = some;
      outcomes.push_back(RunPrompt(*engine, Request("r")));
      if (devices[0] != devices[1]) continue;
      EXPECT_LT(devices[0]->held_bytes, 10 * kMiB);  // the weights, twice
    }
    EXPECT_TRUE(engine->healthy());
    LF_EXPECT_OK(engine->Shutdown());
  });
  return outcomes;
}

// What a rank keeps of a prompt is missing in the next one of the other rank.
TEST(EngineDevice, RanksThatShareADeviceLeaveItToEachOtherAfterEachPrompt) {
  const auto device = Device(400 * kMiB);
  const auto outcomes = RunWithBallast({device, device}, {60 * kMiB, 60 * kMiB, 65 * kMiB, 110 * kMiB});
  ASSERT_EQ(outcomes.size(), 4u);
  LF_EXPECT_OK(outcomes[0]);
  LF_EXPECT_OK(outcomes[1]);
  LF_EXPECT_OK(outcomes[2]);
  EXPECT_THAT(outcomes[3], StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("GPU memory")));
}

TEST(EngineDevice, RanksWithADeviceOfTheirOwnPlanWithAllOfIt) {
  for (const absl::Status& outcome : RunWithBallast({Device(400 * kMiB), Device(400 * kMiB)}, {110 * kMiB})) {
    LF_EXPECT_OK(outcome);
  }
}

// A service that runs beside `longfill inspect` is none of its driver and libraries.
TEST(EngineDevice, ForecastOfWhatIsOutsideLeavesOthersOut) {
  const auto device = Device(400 * kMiB);
  const auto other = CreateGuardedBackend({.device = device});
  LF_ASSERT_OK_AND_ASSIGN(const Buffer theirs, other->memory().Allocate(100 * kMiB, "a service"));
  const auto backend = CreateGuardedBackend({.device = device});
  LF_ASSERT_OK_AND_ASSIGN(const Buffer ours, backend->memory().Allocate(10 * kMiB, "of this process"));
  LF_ASSERT_OK_AND_ASSIGN(const int64_t used, OutsideBytesInUse(*backend, 1));
  EXPECT_EQ(used, 100 * kMiB);
  LF_ASSERT_OK_AND_ASSIGN(const int64_t measured, MeasureOutsideBytes(*backend, 1));
  LF_ASSERT_OK_AND_ASSIGN(const int64_t forecast, ForecastOutsideBytes(*backend));
  EXPECT_EQ(measured - forecast, 100 * kMiB);
}

TEST(EngineDevice, MemoryLimitDoesNotHideWhatIsThere) {
  const auto world = CreateSingleCommunicator();
  EngineOptions options = Options({1, 1});
  options.memory_limit_bytes = int64_t{1} << 40;
  std::atomic<int64_t> bytes{200 * kMiB};
  options.index_replacement = std::make_shared<Ballast>(bytes);
  LF_ASSERT_OK_AND_ASSIGN(
      const auto engine,
      PrefillEngine::Create(options, *world, CreateGuardedBackend({.device = Device(300 * kMiB)})));
  EXPECT_THAT(engine->Validate(Request("r")),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("GPU memory")));
  bytes = 100 * kMiB;
  LF_EXPECT_OK(RunPrompt(*engine, Request("r")));
}

TEST(EngineDevice, WeightsThatDoNotFitAreRefusedBeforeTheyAreLoaded) {
  const auto world = CreateSingleCommunicator();
  const auto device = Device(128 * kMiB + 5000);
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(GoldenModel("llama-gqa4")));
  const int64_t needed = DeviceWeightsBytes(config, DType::kFloat32);
  EXPECT_THAT(
      PrefillEngine::Create(Options({1, 1}), *world, CreateGuardedBackend({.device = device})),
      StatusIs(absl::StatusCode::kResourceExhausted,
               AllOf(HasSubstr(absl::StrCat("the weights need ", needed)), HasSubstr("5000 are available"))));
}

// A request that cannot be checked finds it out; where there is none, the next sign of life.
TEST(EngineDevice, DeviceLostWhileIdleBreaksTheGroup) {
  for (const bool request_comes : {true, false}) {
    const auto world = CreateSingleCommunicator();
    const auto device = Device(int64_t{1} << 40);
    LF_ASSERT_OK_AND_ASSIGN(
        const auto engine,
        PrefillEngine::Create(Options({1, 1}), *world, CreateGuardedBackend({.device = device})));
    LF_EXPECT_OK(engine->KeepAlive());
    LF_EXPECT_OK(RunPrompt(*engine, Request("good")));
    device->lost = true;
    EXPECT_FALSE(engine->Validate(Request("r")).ok());
    const absl::Status outcome = request_comes ? RunPrompt(*engine, Request("r")) : engine->KeepAlive();
    EXPECT_THAT(outcome, StatusIs(absl::StatusCode::kInternal, HasSubstr("the device is lost")));
    EXPECT_FALSE(engine->healthy());
    EXPECT_FALSE(engine->KeepAlive().ok());
  }
}

TEST(EngineDevice, DeviceOfAnotherRankLostWhileIdleBreaksTheGroup) {
  const std::vector<std::shared_ptr<SharedDevice>> devices = {Device(int64_t{1} << 40),
                                                              Device(int64_t{1} << 40)};
  OnEveryRank(2, [&](Communicator& world) {
    LF_ASSERT_OK_AND_ASSIGN(const auto engine,
                            PrefillEngine::Create(Options({2, 1}), world,
                                                  CreateGuardedBackend({.device = devices[world.rank()]})));
    if (world.rank() == 0) {
      LF_EXPECT_OK(engine->KeepAlive());
      devices[1]->lost = true;
      absl::Status status;
      for (int i = 0; i < 1000 && status.ok(); ++i) {  // rank 1 sees it when the next one arrives
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        status = engine->KeepAlive();
      }
      EXPECT_FALSE(status.ok());
    } else {
      EXPECT_THAT(ServeUntilTheEnd(*engine),
                  StatusIs(absl::StatusCode::kInternal, HasSubstr("the device is lost")));
    }
    EXPECT_FALSE(engine->healthy());
  });
}

// Memory that a launch lacks after the prompt was admitted.
TEST(EngineDevice, LaunchWithoutMemoryEndsTheRequestOfOneRankAndNoMore) {
  for (const char* call : {"Attention", "BuildIndex", "Gemm"}) {
    SCOPED_TRACE(call);
    const auto world = CreateSingleCommunicator();
    bool fails = false;
    const auto fault = [&](std::string_view kernel) {
      return fails && kernel == call ? absl::ResourceExhaustedError("no memory for a launch")
                                     : absl::OkStatus();
    };
    LF_ASSERT_OK_AND_ASSIGN(const auto engine, PrefillEngine::Create(Options({1, 1}), *world,
                                                                     CreateGuardedBackend({.fault = fault})));
    fails = true;
    EXPECT_THAT(RunPrompt(*engine, Request("r", "vertical-slash:40,120")),
                StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("no memory for a launch")));
    EXPECT_TRUE(engine->healthy());
    fails = false;
    LF_EXPECT_OK(RunPrompt(*engine, Request("again", "vertical-slash:40,120")));
  }
}

// So that no prompt of a client is the first to load its kernels.
TEST(EngineDevice, EveryKindOfIndexIsWarmedUp) {
  const auto world = CreateSingleCommunicator();
  std::mutex mutex;  // K and V are copied out by a thread of their own
  std::map<std::string, int64_t> calls;
  const auto fault = [&](std::string_view kernel) {
    const std::lock_guard lock(mutex);
    ++calls[std::string(kernel)];
    return absl::OkStatus();
  };
  LF_ASSERT_OK_AND_ASSIGN(const auto engine, PrefillEngine::Create(Options({1, 1}), *world,
                                                                   CreateGuardedBackend({.fault = fault})));
  const int64_t num_layers = engine->config().num_layers;
  const std::lock_guard lock(mutex);
  EXPECT_EQ(calls["BuildIndex"], 2 * num_layers);  // tiles and parity
  EXPECT_GE(calls["SelectBlocks"], num_layers);    // block-sparse
  EXPECT_GE(calls["SelectByShare"], num_layers);   // block-share
  EXPECT_EQ(calls["BuildBlockLists"], calls["SelectByShare"]);
  EXPECT_GE(calls["Attention"], 5 * num_layers);
}

}  // namespace
}  // namespace longfill
