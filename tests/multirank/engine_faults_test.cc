// An error on one rank is the same error on all and leaves the engine usable; a broken group says so.

#include <atomic>
#include <limits>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/multirank/engine_group.h"
#include "tests/multirank/ranks.h"
#include "tests/testing/guarded_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr int64_t kVocab = 97;
constexpr int64_t kMaxTokens = 512;

GroupOptions Options(const Mesh& mesh) { return {.model_dir = GoldenModel("llama-gqa4"), .mesh = mesh}; }

PrefillRequest Request(const std::string& id) {
  return MakeRequest(id, RandomIds(500, kVocab, 4), "vertical-slash:40,120");
}

// Runs a request that asks for a fault on each rank in turn, a good one after each.
void ExpectSameErrorOnAllRanks(const std::string& fault, absl::StatusCode code, const std::string& message,
                               bool faulty_rank_has_sink) {
  const Mesh mesh{2, 2};
  Recorder recorder;
  const auto served = WithEngine(Options(mesh), recorder, [&](PrefillEngine& engine) {
    for (int rank = 0; rank < mesh.size(); ++rank) {
      const std::string id = absl::StrCat(fault, " on ", rank);
      EXPECT_THAT(Prefill(engine, recorder, Request(id)),
                  StatusIs(code, AllOf(HasSubstr(message), HasSubstr(absl::StrCat("rank ", rank)))));
      EXPECT_TRUE(engine.healthy());
      LF_EXPECT_OK(Prefill(engine, recorder, Request(absl::StrCat("good after ", rank))).status());
    }
  });
  for (const absl::Status& status : served) LF_EXPECT_OK(status);
  for (int rank = 1; rank < mesh.size(); ++rank) {
    const std::vector<absl::Status> outcomes = recorder.Outcomes(rank);
    ASSERT_EQ(outcomes.size(), 8u);
    for (int failed = 0; failed < mesh.size(); ++failed) {
      EXPECT_THAT(outcomes[2 * failed],
                  StatusIs(code, AllOf(HasSubstr(message), HasSubstr(absl::StrCat("rank ", failed)))));
      LF_EXPECT_OK(outcomes[2 * failed + 1]);
    }
  }
  for (int failed = 0; failed < mesh.size(); ++failed) {
    for (int rank = 0; rank < mesh.size(); ++rank) {
      const std::vector<absl::Status> ends = recorder.Finished(absl::StrCat(fault, " on ", failed), rank);
      if (rank == failed && !faulty_rank_has_sink) {
        EXPECT_TRUE(ends.empty());
      } else if (fault == "finish fails") {
        EXPECT_THAT(ends, ElementsAre(IsOk()));
      } else {
        EXPECT_THAT(ends, ElementsAre(StatusIs(code, HasSubstr(message)))) << "rank " << rank;
      }
      EXPECT_THAT(recorder.Finished(absl::StrCat("good after ", failed), rank), ElementsAre(IsOk()));
    }
  }
}

TEST(EngineFaults, SinkThatCannotOpenIsTheSameErrorOnAllRanks) {
  ExpectSameErrorOnAllRanks("factory fails", absl::StatusCode::kResourceExhausted, "no room for the sink",
                            false);
}

TEST(EngineFaults, SinkThatFailsInALayerIsTheSameErrorOnAllRanks) {
  ExpectSameErrorOnAllRanks("append fails", absl::StatusCode::kResourceExhausted, "the sink is full", true);
}

TEST(EngineFaults, SinkThatCannotEndIsTheSameErrorOnAllRanks) {
  ExpectSameErrorOnAllRanks("finish fails", absl::StatusCode::kDataLoss, "the sink cannot end", true);
}

// `stops` fails once a layer is done, after so many polls more.
class StopInLayerOne {
 public:
  explicit StopInLayerOne(int polls) : polls_(polls) {}
  void LayerDone() { armed_ = true; }
  absl::Status Poll() {
    if (!armed_ || polls_-- > 0) return absl::OkStatus();
    return absl::CancelledError("the client is gone");
  }

 private:
  std::atomic<bool> armed_{false};
  std::atomic<int> polls_;
};

TEST(EngineFaults, CancelledOnRankZeroIsCancelledOnAllWhereverItComes) {
  for (const Mesh& mesh : {Mesh{1, 1}, Mesh{4, 1}, Mesh{1, 4}, Mesh{2, 2}}) {
    Recorder recorder;
    std::vector<std::string> cancelled;
    const auto served = WithEngine(Options(mesh), recorder, [&](PrefillEngine& engine) {
      for (int polls = 0; polls < 40; ++polls) {
        StopInLayerOne stop(polls);
        PrefillCallbacks callbacks;
        callbacks.should_stop = [&] { return stop.Poll(); };
        callbacks.on_progress = [&](const PrefillProgress&) { stop.LayerDone(); };
        const std::string id = absl::StrCat("stopped ", polls);
        const auto result = Prefill(engine, recorder, Request(id), callbacks);
        EXPECT_TRUE(engine.healthy());
        if (result.ok()) break;  // fewer polls than that
        EXPECT_THAT(result, StatusIs(absl::StatusCode::kCancelled, HasSubstr("the client is gone")));
        cancelled.push_back(id);
      }
      LF_EXPECT_OK(Prefill(engine, recorder, Request("after")).status());
    });
    for (const absl::Status& status : served) LF_EXPECT_OK(status);
    EXPECT_GE(cancelled.size(), 3u);  // linear layers, attention, linear layers
    for (int rank = 0; rank < mesh.size(); ++rank) {
      for (const std::string& id : cancelled) {
        EXPECT_THAT(recorder.Finished(id, rank),
                    ElementsAre(StatusIs(absl::StatusCode::kCancelled, HasSubstr("client"))));
      }
    }
    for (int rank = 1; rank < mesh.size(); ++rank) {
      const std::vector<absl::Status> outcomes = recorder.Outcomes(rank);
      for (size_t i = 0; i < cancelled.size(); ++i) {
        EXPECT_THAT(outcomes.at(i), StatusIs(absl::StatusCode::kCancelled, HasSubstr("client")));
      }
      LF_EXPECT_OK(outcomes.back());
    }
  }
}

TEST(EngineFaults, StopOnAnotherRankEndsTheRequestOnAll) {
  Recorder recorder;
  std::atomic<bool> stop{true};
  GroupOptions options = Options({3, 1});
  options.should_stop = [&](int rank, Communicator&) {
    return rank == 2 && stop ? absl::DeadlineExceededError("too late") : absl::OkStatus();
  };
  WithEngine(options, recorder, [&](PrefillEngine& engine) {
    EXPECT_THAT(Prefill(engine, recorder, Request("late")),
                StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("rank 2: too late")));
    EXPECT_TRUE(engine.healthy());
    stop = false;
    LF_EXPECT_OK(Prefill(engine, recorder, Request("good")).status());
  });
  EXPECT_THAT(recorder.Finished("late", 1),
              ElementsAre(StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("too late"))));
}

TEST(EngineFaults, MeshThatDoesNotMatchTheRanksIsRefusedOnAll) {
  OnEveryRank(3, [](Communicator& world) {
    const auto engine =
        PrefillEngine::Create({.model_dir = GoldenModel("llama-gqa4"), .mesh = {2, 2}}, world);
    EXPECT_THAT(engine, StatusIs(absl::StatusCode::kInvalidArgument,
                                 AllOf(HasSubstr("sequence=2,head=2"), HasSubstr("has 4 ranks, but 3"))));
    LF_EXPECT_OK(
        PrefillEngine::Create({.model_dir = GoldenModel("llama-gqa4"), .mesh = {3, 1}}, world).status());
  });
}

TEST(EngineFaults, ModelThatOneRankLacksIsTheSameErrorOnAll) {
  OnEveryRank(3, [](Communicator& world) {
    const auto create = [&](const std::string& name) {
      return PrefillEngine::Create(
          {.model_dir = GoldenModel(world.rank() == 1 ? name : "llama-gqa4"), .mesh = {3, 1}}, world);
    };
    EXPECT_THAT(create("not-there"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("rank 1")));
    EXPECT_THAT(create("llama-gqa7-tied"),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("rank 1 has another model")));
    LF_EXPECT_OK(create("llama-gqa4").status());
  });
}

TEST(EngineFaults, BadRequestsAreRefusedBeforeAnyWork) {
  Recorder recorder;
  GroupOptions options = Options({2, 1});
  options.memory_limit_bytes = 1500 << 10;
  const auto served = WithEngine(options, recorder, [&](PrefillEngine& engine) {
    const auto expect = [&](const PrefillRequest& request, absl::StatusCode code, const std::string& text) {
      EXPECT_THAT(engine.Validate(request), StatusIs(code, HasSubstr(text)));
      EXPECT_THAT(Prefill(engine, recorder, request), StatusIs(code, HasSubstr(text)));
      EXPECT_TRUE(engine.healthy());
    };
    constexpr auto kBad = absl::StatusCode::kInvalidArgument;
    const PrefillRequest good = MakeRequest("good", RandomIds(100, kVocab, 4), "dense");
    LF_EXPECT_OK(engine.Validate(good));

    expect(MakeRequest("bad", {}, "dense"), kBad, "prompt is empty");
    expect(MakeRequest("bad", RandomIds(kMaxTokens + 1, kVocab, 1), "dense"), kBad,
           "the prompt has 513 tokens, the model takes at most 512");
    for (const int32_t id :
         {-1, 97, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()}) {
      PrefillRequest bad = good;
      bad.token_ids[42] = id;
      expect(bad, kBad, absl::StrCat("token id ", id, " at position 42 is outside the vocabulary of 97"));
    }
    for (const int64_t position : {int64_t{-1}, int64_t{100}, std::numeric_limits<int64_t>::max()}) {
      PrefillRequest bad = good;
      bad.logits_positions = {5, position};
      expect(bad, kBad, absl::StrCat("logits position ", position, " is outside the prompt of 100 tokens"));
    }
    for (const char* attention : {"sparse", "vertical-slash:-1,5", "a-shape:1,0", "block-sparse:0", ""}) {
      PrefillRequest bad = good;
      bad.attention.text = attention;
      EXPECT_THAT(engine.Validate(bad), StatusIs(kBad, testing::Not(testing::IsEmpty()))) << attention;
      EXPECT_THAT(Prefill(engine, recorder, bad), StatusIs(kBad, testing::Not(testing::IsEmpty())));
    }
    PrefillRequest bad = good;
    bad.attention = {"three.json", "[{}, {}, {}]"};  // the model has two layers
    expect(bad, kBad, "three.json");
    bad = good;
    bad.kv_dtype = DType::kInt32;
    expect(bad, kBad, "int32");
    expect(MakeRequest("bad", RandomIds(kMaxTokens, kVocab, 1), "dense"),
           absl::StatusCode::kResourceExhausted, "tokens would fit");

    LF_EXPECT_OK(Prefill(engine, recorder, good).status());
  });
  LF_EXPECT_OK(served[0]);
  EXPECT_THAT(recorder.Outcomes(1), ElementsAre(IsOk()));  // the others never heard of the bad ones
}

TEST(EngineFaults, AbortOfOneRankBreaksTheGroupOnAll) {
  for (const int aborting : {0, 1, 3}) {
    Recorder recorder;
    const auto served = WithEngine(Options({2, 2}), recorder, [&](PrefillEngine& engine) {
      const std::string id = absl::StrCat("append aborts on ", aborting);
      EXPECT_FALSE(Prefill(engine, recorder, Request(id)).ok());
      EXPECT_FALSE(engine.healthy());
      EXPECT_THAT(Prefill(engine, recorder, Request("after")),
                  StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("broken")));
      LF_EXPECT_OK(engine.Shutdown());
    });
    for (const absl::Status& status : served) EXPECT_FALSE(status.ok());
    for (int rank = 0; rank < 4; ++rank) {
      const auto ends = recorder.Finished(absl::StrCat("append aborts on ", aborting), rank);
      ASSERT_EQ(ends.size(), 1u) << "rank " << rank;
      EXPECT_FALSE(ends[0].ok());
    }
  }
}

// The abort comes at every place where rank 2 asks whether to stop, so also while its peers are in the
// exchanges of the index and of attention, whose errors no agreement sees.
TEST(EngineFaults, AbortAnywhereInALayerBreaksTheGroupOnAll) {
  int aborts = 0;
  for (int polls = 0; polls < 60; ++polls) {
    Recorder recorder;
    std::atomic<int> left{polls};
    std::atomic<bool> aborted{false};
    GroupOptions options = Options({2, 2});
    options.should_stop = [&](int rank, Communicator& world) {
      if (rank == 2 && left-- == 0) {
        aborted = true;
        world.Abort(absl::UnavailableError("this rank gives up"));
      }
      return absl::OkStatus();
    };
    WithEngine(options, recorder, [&](PrefillEngine& engine) {
      const auto result = Prefill(engine, recorder, Request("aborted"));
      EXPECT_EQ(result.ok(), !aborted) << result.status() << " after " << polls << " polls";
      EXPECT_EQ(engine.healthy(), !aborted) << result.status() << " after " << polls << " polls";
    });
    if (!aborted) break;
    ++aborts;
  }
  EXPECT_GE(aborts, 6);
}

TEST(EngineFaults, RankThatHangsEndsTheGroupAtTheDeadline) {
  Recorder recorder;
  GroupOptions options = Options({2, 1});
  options.timeout = std::chrono::milliseconds(500);
  const auto served = WithEngine(options, recorder, [&](PrefillEngine& engine) {
    const auto start = std::chrono::steady_clock::now();
    const auto result = Prefill(engine, recorder, Request("append hangs on 1"));
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
    EXPECT_THAT(result, StatusIs(absl::StatusCode::kDeadlineExceeded, testing::Not(testing::IsEmpty())));
    EXPECT_FALSE(engine.healthy());
    recorder.Release();
  });
  EXPECT_FALSE(served[0].ok());
}

// A CPU whose device can be lost.
class LosableBackend final : public Backend {
 public:
  const DeviceFacts& facts() const override { return cpu_->facts(); }
  KernelSet& kernels() override { return cpu_->kernels(); }
  MemoryResource& memory() override { return cpu_->memory(); }
  MemoryResource& host_memory() override { return cpu_->host_memory(); }
  Stream& stream() override { return cpu_->stream(); }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override { return cpu_->NewStream(); }
  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override { return cpu_->NewEvent(); }
  absl::StatusOr<int64_t> FreeMemoryBytes() override { return cpu_->FreeMemoryBytes(); }
  absl::Status Health() override {
    return lost ? absl::UnavailableError("it has fallen off the bus") : absl::OkStatus();
  }
  std::atomic<bool> lost = false;

 private:
  const std::unique_ptr<Backend> cpu_ = CreateCpuBackend(1);
};

// An error finds out that the device is gone; the group ends with it, on the other rank too.
TEST(EngineFaults, LostDeviceBreaksTheGroup) {
  Recorder recorder;
  OnEveryRank(2, [&](Communicator& world) {
    const auto backend = std::make_shared<LosableBackend>();
    LF_ASSERT_OK_AND_ASSIGN(
        const auto engine,
        PrefillEngine::Create({.model_dir = GoldenModel("llama-gqa4"), .mesh = {2, 1}}, world, backend));
    EXPECT_EQ(&engine->backend(), backend.get());
    if (world.rank() == 1) {
      EXPECT_FALSE(
          engine
              ->Serve(
                  recorder.Factory(world), [] { return absl::OkStatus(); }, [](const absl::Status&) {})
              .ok());
      EXPECT_FALSE(engine->healthy());
      return;
    }
    LF_EXPECT_OK(Prefill(*engine, recorder, Request("good")).status());
    backend->lost = true;
    EXPECT_THAT(Prefill(*engine, recorder, Request("append fails on 0")),
                StatusIs(absl::StatusCode::kUnavailable,
                         AllOf(HasSubstr("device is lost"), HasSubstr("fallen off the bus"))));
    EXPECT_FALSE(engine->healthy());
  });
}

TEST(EngineFaults, MemoryThatIsNotThereEndsTheRequestAndNoMore) {
  Recorder recorder;
  const auto world = CreateSingleCommunicator();
  const std::shared_ptr<Backend> backend = CreateLimitedCpuBackend(2 << 20);
  LF_ASSERT_OK_AND_ASSIGN(
      const auto engine,
      PrefillEngine::Create({.model_dir = GoldenModel("llama-gqa4"), .mesh = {1, 1}}, *world, backend));
  const PrefillRequest small = MakeRequest("small", RandomIds(50, kVocab, 1), "vertical-slash:40,120");
  LF_EXPECT_OK(Prefill(*engine, recorder, small).status());
  const int64_t idle_bytes = backend->memory().bytes_in_use();
  EXPECT_THAT(Prefill(*engine, recorder, Request("large")),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("no memory for")));
  EXPECT_TRUE(engine->healthy());
  EXPECT_EQ(backend->memory().bytes_in_use(), idle_bytes);
  PrefillRequest again = small;
  again.request_id = "again";
  LF_EXPECT_OK(Prefill(*engine, recorder, again).status());
}

TEST(EngineFaults, KeepAliveHoldsAnIdleGroupTogetherUntilShutdown) {
  Recorder recorder;
  GroupOptions options = Options({3, 1});
  options.timeout = std::chrono::milliseconds(1500);
  const auto served = WithEngine(options, recorder, [&](PrefillEngine& engine) {
    for (int i = 0; i < 12; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      LF_ASSERT_OK(engine.KeepAlive());
    }
    LF_EXPECT_OK(Prefill(engine, recorder, Request("good")).status());
    LF_EXPECT_OK(engine.Shutdown());
    LF_EXPECT_OK(engine.Shutdown());
    EXPECT_TRUE(engine.healthy());
  });
  for (const absl::Status& status : served) LF_EXPECT_OK(status);
  EXPECT_THAT(recorder.Outcomes(2), ElementsAre(IsOk()));
}

TEST(EngineFaults, IdleGroupWithoutKeepAliveEndsAtTheDeadline) {
  Recorder recorder;
  GroupOptions options = Options({2, 1});
  options.timeout = std::chrono::milliseconds(300);
  const auto served = WithEngine(options, recorder, [&](PrefillEngine& engine) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    EXPECT_FALSE(engine.KeepAlive().ok());
    EXPECT_FALSE(engine.healthy());
  });
  EXPECT_FALSE(served[0].ok());
}

}  // namespace
}  // namespace longfill
