// Whole engines over the ranks of the harness, on every kind of backend: as threads, and as processes under
// mpirun, that share a GPU and exchange through pinned host memory or have one each and use NCCL. Every mesh
// gives what one rank gives.

#include <array>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "runtime/engine/prefill_engine.h"
#include "runtime/kv/kv_discard_sink.h"
#include "tests/multirank/engine_group.h"
#include "tests/multirank/nccl_ranks.h"
#include "tests/multirank/rank_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

constexpr int64_t kTokens = 400;
// Of bfloat16 on a GPU: rows of a product may round otherwise in another number of rows, and a selection at
// its cut with them.
constexpr double kTolerance = 1e-4, kGpuTolerance = 0.041;
constexpr const char* kAttentions[] = {"dense",          "a-shape:7,70",      "vertical-slash:40,120",
                                       "block-sparse:3", "block-share:3,0.1", "block-share:3,0.05,8"};

class EngineMesh : public RankBackendTest {
 protected:
  // What the name of the communicator of activations starts with.
  std::string ExchangedOver() const {
    if (over_nccl()) return "nccl";
    return on_cpu() ? "" : "staged ";
  }
};

constexpr std::array<int64_t, 3> kPositions = {kTokens - 1, 0, kTokens / 2};

// Ends the prompt in its second layer.
absl::Status RunAndCancel(PrefillEngine& engine, PrefillRequest request) {
  int64_t layers_done = 0;
  request.request_id += " cancelled";
  return engine
      .Prefill(request, MakeKvDiscardSinkFactory(),
               {.on_progress = [&](const PrefillProgress& progress) { layers_done = progress.layers_done; },
                .should_stop =
                    [&] { return layers_done == 0 ? absl::OkStatus() : absl::CancelledError("enough"); }})
      .status();
}

// The results of all patterns on rank 0, nothing elsewhere. Before the second one a prompt is cancelled.
std::vector<PrefillResult> RunAll(const std::string& backend_name, const Mesh& mesh, Communicator& world,
                                  WeightPlacement weights = WeightPlacement::kReplicated) {
  std::vector<PrefillResult> results;
  const auto backend = RankBackend(backend_name, world.rank());
  EXPECT_THAT(backend, IsOk());
  if (!backend.ok()) return results;
  EngineOptions options = {.model_dir = GoldenModel("llama-gqa7-tied"),
                           .mesh = mesh,
                           .weights = weights,
                           .device = {.kind = (*backend)->kernels().device(),
                                      .ranks_on_host = world.size(),
                                      .local_rank = world.rank()},
                           .kv_export = {.num_buffers = 2, .buffer_bytes = 64 << 10}};
  if (backend_name == "nccl" && mesh.size() > 1)
    options.communicator = {.kind = CommunicatorKind::kNccl, .nccl = NcclTestOptions()};
  const auto engine = PrefillEngine::Create(options, world, *backend);
  EXPECT_THAT(engine, IsOk());
  if (!engine.ok()) return results;
  if (world.rank() != 0) {
    EXPECT_THAT((*engine)->Serve(MakeKvDiscardSinkFactory(), {}, {}), IsOk());
    return results;
  }
  for (const char* attention : kAttentions) {
    PrefillRequest request =
        MakeRequest(attention, RandomIds(kTokens, (*engine)->config().vocab_size, 3), attention);
    request.logits_positions.assign(kPositions.begin(), kPositions.end());
    if (results.size() == 1) {
      EXPECT_THAT(RunAndCancel(**engine, request),
                  StatusIs(absl::StatusCode::kCancelled, testing::HasSubstr("enough")));
    }
    auto result = (*engine)->Prefill(request, MakeKvDiscardSinkFactory(), {});
    EXPECT_THAT(result, IsOk()) << attention;
    results.push_back(result.ok() ? *std::move(result) : PrefillResult{});
  }
  EXPECT_THAT((*engine)->Shutdown(), IsOk());
  return results;
}

TEST_P(EngineMesh, GivesWhatOneRankGives) {
  for (const int size : Sizes()) {
    if (size < 2 || size > 4) continue;
    for (const Mesh& mesh : Factorisations(size)) {
      OnEveryRank(size, [&](Communicator& world) {
        const std::vector<PrefillResult> got = RunAll(GetParam(), mesh, world);
        if (world.rank() != 0) return;
        const auto alone = CreateSingleCommunicator();
        const std::vector<PrefillResult> expected = RunAll(GetParam(), {1, 1}, *alone);
        ASSERT_EQ(got.size(), std::size(kAttentions));
        ASSERT_EQ(expected.size(), got.size());
        for (size_t i = 0; i < got.size(); ++i) {
          SCOPED_TRACE(absl::StrCat(kAttentions[i], ", ", ToString(mesh)));
          ExpectNear(got[i].logits, expected[i].logits, on_gpu() ? kGpuTolerance : kTolerance, "logits");
          EXPECT_EQ(got[i].figures.ranks, size);
          EXPECT_THAT(got[i].figures.communicator, testing::StartsWith(ExchangedOver()));
          EXPECT_EQ(got[i].figures.kv_bytes, expected[i].figures.kv_bytes);
          EXPECT_EQ(static_cast<int>(got[i].figures.rank_kv_checksums.size()), size);
        }
      });
    }
  }
}

// To the bit: the same kernels run on the same weights.
TEST_P(EngineMesh, ShardedWeightsGiveWhatReplicatedOnesGive) {
  for (const int size : Sizes()) {
    if (size > (on_cpu() ? 4 : 2)) continue;
    OnEveryRank(size, [&](Communicator& world) {
      const Mesh mesh = {size, 1};
      const auto expected = RunAll(GetParam(), mesh, world);
      const auto got = RunAll(GetParam(), mesh, world, WeightPlacement::kSharded);
      if (world.rank() != 0) return;
      ASSERT_EQ(got.size(), std::size(kAttentions));
      ASSERT_EQ(expected.size(), got.size());
      for (size_t i = 0; i < got.size(); ++i) {
        SCOPED_TRACE(absl::StrCat(kAttentions[i], ", ", size, " ranks"));
        EXPECT_FALSE(got[i].logits.empty());
        EXPECT_EQ(got[i].logits, expected[i].logits);
        EXPECT_EQ(got[i].figures.rank_kv_checksums, expected[i].figures.rank_kv_checksums);
        EXPECT_GE(got[i].figures.communication_seconds, got[i].figures.exposed_communication_seconds);
      }
    });
  }
}

LF_INSTANTIATE_RANK_BACKENDS(EngineMesh);

}  // namespace
}  // namespace longfill
