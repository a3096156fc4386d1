// Ranks that run alone call what ranks of a real group call, and are timed.

#include "runtime/scaling/rank_recording.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <thread>

#include "models/device_weights.h"
#include "models/transformer.h"
#include "parallel/index_storage.h"
#include "runtime/scaling/scaling_figures.h"
#include "tests/testing/guarded_backend.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kNumTokens = 508;  // blocks of 128, the last not whole
constexpr Coverage kCoverage = Coverage::kTiles;

struct CountedCall {
  std::vector<int> members;
  ExchangeCall call;
};

// Another communicator, whose calls are counted together with those of the groups split from it.
class CountingCommunicator final : public Communicator {
 public:
  CountingCommunicator(Communicator& real, std::vector<int> members, std::vector<CountedCall>& calls,
                       std::unique_ptr<Communicator> owned = nullptr)
      : owned_(std::move(owned)), real_(real), members_(std::move(members)), calls_(calls) {}

  int rank() const override { return real_.rank(); }
  int size() const override { return real_.size(); }
  std::string_view name() const override { return real_.name(); }
  absl::Status AllGather(const void* send, void* recv, std::span<const int64_t> counts,
                         Stream& stream) override {
    Count({.kind = ExchangeKind::kAllGather, .sent = {counts.begin(), counts.end()}});
    return real_.AllGather(send, recv, counts, stream);
  }
  absl::Status AllReduce(void* data, int64_t count, ReduceType type, ReduceOp op, Stream& stream) override {
    const int64_t element = type == ReduceType::kFloat32 ? 4 : 8;
    Count({.kind = ExchangeKind::kAllReduce, .bytes = count * element});
    return real_.AllReduce(data, count, type, op, stream);
  }
  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& stream) override {
    Count({.kind = ExchangeKind::kBroadcast, .bytes = bytes});
    return real_.Broadcast(data, bytes, root, stream);
  }
  absl::Status AllToAll(const void* send, std::span<const int64_t> sent, void* recv,
                        std::span<const int64_t> received, Stream& stream) override {
    Count({.kind = ExchangeKind::kAllToAll,
           .sent = {sent.begin(), sent.end()},
           .received = {received.begin(), received.end()}});
    return real_.AllToAll(send, sent, recv, received, stream);
  }
  absl::Status Barrier(Stream& stream) override {
    Count({.kind = ExchangeKind::kBarrier});
    return real_.Barrier(stream);
  }
  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    LF_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, real_.Split(color, key));
    std::vector<int> members(static_cast<size_t>(part->size()));
    const std::vector<int64_t> counts(members.size(), sizeof(int));
    CpuStream host;
    const int me = members_[static_cast<size_t>(rank())];
    LF_RETURN_IF_ERROR(part->AllGather(&me, members.data(), counts, host));
    Communicator& real = *part;
    return std::make_unique<CountingCommunicator>(real, std::move(members), calls_, std::move(part));
  }
  void Abort(const absl::Status& reason) override { real_.Abort(reason); }
  absl::Status Health() override { return real_.Health(); }
  int64_t bytes_sent() const override { return real_.bytes_sent(); }
  double seconds() const override { return real_.seconds(); }

 private:
  void Count(ExchangeCall call) { calls_.push_back({members_, std::move(call)}); }

  const std::unique_ptr<Communicator> owned_;
  Communicator& real_;
  const std::vector<int> members_;
  std::vector<CountedCall>& calls_;
};

// What was built, with pair counts that need no peer.
class CountsOfDense final : public IndexReplacement {
 public:
  int64_t PlanBytes(int64_t) const override { return 0; }
  absl::Status Begin(Backend&, int64_t) override { return absl::OkStatus(); }
  absl::Status Replace(int64_t, LayerIndex* index) override {
    for (PairCounts& pairs : index->pairs) pairs.covered = kNumTokens * (kNumTokens + 1) / 2;
    return absl::OkStatus();
  }
  void End() override {}
};

class RankRecordings : public testing::Test {
 protected:
  void SetUp() override {
    LF_ASSERT_OK_AND_ASSIGN(
        config_, LoadModelConfig(std::string(LONGFILL_SOURCE_DIR) + "/tests/golden/data/llama-gqa4"));
    device_ = CreateCpuBackend(1);
    LF_ASSERT_OK_AND_ASSIGN(weights_, RandomWeights(config_, *device_, 7));
    for (int64_t i = 0; i < kNumTokens; ++i)
      ids_.push_back(static_cast<int32_t>(i * 31 % config_.vocab_size));
    patterns_ =
        PatternSet::Uniform(AShape{.n_init = 64, .n_local = 128}, config_.num_layers, config_.num_q_heads);
  }

  RecordingJob Job() {
    std::vector<int64_t> layers(static_cast<size_t>(config_.num_layers));
    std::iota(layers.begin(), layers.end(), 0);
    return {.config = config_,
            .weights = *weights_,
            .patterns = patterns_,
            .coverage = kCoverage,
            .token_ids = ids_,
            .replacement = &replacement_,
            .layers = std::move(layers),
            .should_stop = [] { return absl::OkStatus(); }};
  }

  absl::StatusOr<std::vector<RankRecording>> Record(const Mesh& mesh, MeshGroups& groups) {
    return RecordRanks(Job(), mesh, groups, *device_, nullptr);
  }

  // The calls of a rank of a real group in all layers.
  absl::Status RunRank(const Mesh& mesh, Communicator& real, std::vector<CountedCall>* calls) {
    const std::unique_ptr<Backend> backend = CreateCpuBackend(1);
    const ShardPlan plan(mesh, kNumTokens);
    std::vector<int> everybody(static_cast<size_t>(mesh.size()));
    std::iota(everybody.begin(), everybody.end(), 0);
    CountingCommunicator world(real, everybody, *calls);
    LF_ASSIGN_OR_RETURN(const auto transformer,
                        Transformer::Create(config_, *weights_, *backend, plan, real.rank()));
    LF_ASSIGN_OR_RETURN(SparseIndexBuilder builder,
                        SparseIndexBuilder::Create(*backend, world, GeometryOf(config_), kCoverage));
    LF_ASSIGN_OR_RETURN(const auto attention,
                        ParallelAttention::Create(*backend, world, mesh, GeometryOf(config_)));
    std::vector<int32_t> own;
    const PositionMap positions = plan.TokenPositions(real.rank());
    for (int64_t row = 0; row < plan.NumTokens(real.rank()); ++row) {
      own.push_back(ids_[static_cast<size_t>(positions.Position(row))]);
    }
    LF_RETURN_IF_ERROR(transformer->Embed(own));
    CpuStream host;
    CountsOfDense counts;
    const LayerParallelism parallel{.index_builder = &builder,
                                    .attention = attention.get(),
                                    .replace_index = [&counts](int64_t layer, LayerIndex* index) {
                                      return counts.Replace(layer, index);
                                    }};
    const LayerCallbacks callbacks{
        .on_kv = [](int64_t, int64_t, HeadsView<const void>,
                    HeadsView<const void>) { return absl::OkStatus(); },
        .should_stop = [] { return absl::OkStatus(); },
        .agree = [&](const absl::Status& mine) { return AgreeOnStatus(world, mine, host); }};
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
      LF_RETURN_IF_ERROR(transformer->RunLayer(layer, patterns_.layer(layer), parallel, callbacks));
    }
    return absl::OkStatus();
  }

  std::vector<std::vector<CountedCall>> RunRealGroup(const Mesh& mesh) {
    const auto worlds = CreateInProcessCommunicators(mesh.size(), {});
    std::vector<std::vector<CountedCall>> calls(worlds.size());
    std::vector<std::thread> ranks;
    for (size_t rank = 0; rank < worlds.size(); ++rank) {
      ranks.emplace_back([&, rank] { LF_EXPECT_OK(RunRank(mesh, *worlds[rank], &calls[rank])); });
    }
    for (std::thread& rank : ranks) rank.join();
    return calls;
  }

  // How many digits of the scores have to be looked at depends on the scores.
  bool IsHistogram(const ExchangeCall& call) const {
    return call.kind == ExchangeKind::kAllReduce &&
           call.bytes == 2 * config_.num_q_heads * kSelectionBins * static_cast<int64_t>(sizeof(uint64_t));
  }

  void ExpectSameCalls(const Mesh& mesh) {
    MeshGroups groups(mesh);
    LF_ASSERT_OK_AND_ASSIGN(const std::vector<RankRecording> recordings, Record(mesh, groups));
    const std::vector<std::vector<CountedCall>> real = RunRealGroup(mesh);
    for (size_t rank = 0; rank < real.size(); ++rank) {
      std::vector<CountedCall> recorded;
      for (const RecordedSteps& layer : recordings[rank].layers) {
        for (const ScheduledExchange& exchange : layer.schedule.exchanges) {
          if (IsHistogram(exchange.call)) continue;
          recorded.push_back({groups.members()[static_cast<size_t>(exchange.group)], exchange.call});
        }
      }
      std::vector<CountedCall> expected;
      std::ranges::copy_if(real[rank], std::back_inserter(expected),
                           [this](const CountedCall& counted) { return !IsHistogram(counted.call); });
      ASSERT_EQ(recorded.size(), expected.size()) << ToString(mesh) << ", rank " << rank;
      for (size_t i = 0; i < recorded.size(); ++i) {
        SCOPED_TRACE(testing::Message() << ToString(mesh) << ", rank " << rank << ", call " << i);
        EXPECT_EQ(recorded[i].members, expected[i].members);
        EXPECT_EQ(recorded[i].call.kind, expected[i].call.kind);
        EXPECT_EQ(recorded[i].call.bytes, expected[i].call.bytes);
        EXPECT_EQ(recorded[i].call.sent, expected[i].call.sent);
        EXPECT_EQ(recorded[i].call.received, expected[i].call.received);
      }
    }
  }

  ModelConfig config_;
  std::unique_ptr<Backend> device_;
  std::unique_ptr<const ModelWeights> weights_;
  std::vector<int32_t> ids_;
  PatternSet patterns_;
  CountsOfDense replacement_;
};

TEST_F(RankRecordings, CallWhatRanksOfARealGroupCall) {
  for (const Mesh& mesh : {Mesh{2, 1}, Mesh{1, 2}, Mesh{2, 2}, Mesh{3, 1}, Mesh{1, 8}}) {
    ExpectSameCalls(mesh);
  }
}

TEST_F(RankRecordings, SelectAsRanksOfARealGroupDo) {
  patterns_ = PatternSet::Uniform(VerticalSlash{.vertical = 40, .slash = 60}, config_.num_layers,
                                  config_.num_q_heads);
  for (const Mesh& mesh : {Mesh{2, 1}, Mesh{1, 2}, Mesh{2, 2}}) ExpectSameCalls(mesh);
}

// As on a GPU: nothing touches its memory but its kernels, and what is copied out comes late.
TEST_F(RankRecordings, RunOnADeviceBesideCopies) {
  patterns_ = PatternSet::Uniform(VerticalSlash{.vertical = 40, .slash = 60}, config_.num_layers,
                                  config_.num_q_heads);
  weights_.reset();
  device_ = CreateGuardedBackend();
  LF_ASSERT_OK_AND_ASSIGN(weights_, RandomWeights(config_, *device_, 7));
  const LinkRates links;
  LF_ASSERT_OK_AND_ASSIGN(const auto traffic, LinkTraffic::Create(CreateGuardedBackend(), links));
  for (const Mesh& mesh : {Mesh{2, 1}, Mesh{1, 4}, Mesh{2, 2}}) {
    MeshGroups groups(mesh);
    LF_ASSERT_OK_AND_ASSIGN(const std::vector<RankRecording> recordings,
                            RecordRanks(Job(), mesh, groups, *device_, traffic.get()));
    LF_ASSERT_OK_AND_ASSIGN(
        const ScalingFigures figures,
        ComputeScalingFigures(recordings, ChooseLayers(patterns_, 1, 0), groups.members(), links));
    EXPECT_GT(figures.seconds, 0);
    EXPECT_GE(figures.imbalance, 1);
  }
  EXPECT_GT(traffic->figures().bytes, 0);
}

TEST_F(RankRecordings, MoveTheBytesThatTheMeshSays) {
  // By sequence each of two receives K and V of the other's tokens, fp32: slots have blocks 0, 2 and 1, 3.
  const Mesh mesh{2, 1};
  MeshGroups groups(mesh);
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<RankRecording> recordings, Record(mesh, groups));
  LF_ASSERT_OK_AND_ASSIGN(
      const ScalingFigures figures,
      ComputeScalingFigures(recordings, ChooseLayers(patterns_, 0, 0), groups.members(), {}));
  const int64_t most_of_others = 2 * 256 * config_.num_kv_heads * config_.head_dim * 4;
  const auto agreements = [&](size_t rank) {
    int64_t bytes = 0;
    for (const RecordedSteps& layer : recordings[rank].layers) {
      for (const ScheduledExchange& exchange : layer.schedule.exchanges) {
        if (exchange.call.kind == ExchangeKind::kAllReduce) bytes += exchange.call.bytes;
      }
    }
    return bytes;  // 2 (n - 1) / n of them
  };
  EXPECT_EQ(figures.bytes.node, static_cast<double>(config_.num_layers * most_of_others + agreements(1)));
  EXPECT_EQ(figures.bytes.network, 0);
}

TEST_F(RankRecordings, ReadFromPeersTheBytesThatTheMeshSays) {
  RecordingJob job = Job();
  job.peer_copies = true;
  for (const Mesh& mesh : {Mesh{2, 1}, Mesh{3, 1}, Mesh{2, 2}}) {
    MeshGroups groups(mesh);
    LF_ASSERT_OK_AND_ASSIGN(const std::vector<RankRecording> recordings,
                            RecordRanks(job, mesh, groups, *device_, nullptr));
    const ShardPlan plan(mesh, kNumTokens);
    for (int rank = 0; rank < mesh.size(); ++rank) {
      for (const RecordedSteps& layer : recordings[static_cast<size_t>(rank)].layers) {
        int64_t read = 0, gathered = 0, waits = 0;
        for (const ScheduleStep& step : layer.schedule.steps) {
          if (step.kind == ScheduleStep::Kind::kPeerCopy) read += step.bytes;
        }
        for (const ScheduledExchange& exchange : layer.schedule.exchanges) {
          gathered += exchange.call.kind == ExchangeKind::kAllGather && exchange.group != 0;
          waits += exchange.call.kind == ExchangeKind::kAllReduce && exchange.group != 0;
        }
        const int64_t of_others =
            2 * (kNumTokens - plan.NumTokens(rank)) * config_.num_kv_heads * config_.head_dim * 4;
        EXPECT_EQ(read, mesh.head == 1 ? of_others : 0) << ToString(mesh) << ", rank " << rank;
        EXPECT_EQ(gathered > 0, mesh.head > 1) << ToString(mesh);
        EXPECT_EQ(waits, mesh.head == 1 ? 2 : 0) << ToString(mesh) << ": before it reads, and after";
      }
    }
  }
}

TEST_F(RankRecordings, RelayWhatOtherHostsHave) {
  RecordingJob job = Job();
  job.peer_copies = true;
  job.hosts = PeerHosts({0, 0, 1, 1});
  const Mesh mesh{4, 1};
  MeshGroups groups(mesh, job.hosts);
  EXPECT_THAT(groups.members(), testing::IsSupersetOf({std::vector<int>{0, 2}, std::vector<int>{1, 3}}));
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<RankRecording> recordings,
                          RecordRanks(job, mesh, groups, *device_, nullptr));
  const ShardPlan plan(mesh, kNumTokens);
  const auto bytes = [&](int rank) {
    return plan.NumTokens(rank) * config_.num_kv_heads * config_.head_dim * int64_t{4};
  };
  for (int rank = 0; rank < mesh.size(); ++rank) {
    const int neighbour = rank ^ 1, other = rank ^ 2;
    for (const RecordedSteps& layer : recordings[static_cast<size_t>(rank)].layers) {
      int64_t read = 0;
      for (const ScheduleStep& step : layer.schedule.steps) {
        if (step.kind == ScheduleStep::Kind::kPeerCopy) read += step.bytes;
      }
      EXPECT_EQ(read, 2 * (bytes(neighbour) + bytes(neighbour ^ 2))) << "rank " << rank;
      int relays = 0;
      for (const ScheduledExchange& exchange : layer.schedule.exchanges) {
        if (exchange.call.kind != ExchangeKind::kAllGather || exchange.call.sent.size() != 2) continue;
        ++relays;
        EXPECT_THAT(exchange.call.sent, testing::UnorderedElementsAre(bytes(rank), bytes(other)));
      }
      EXPECT_EQ(relays, 2) << "keys and values";
    }
  }
}

TEST_F(RankRecordings, OfOneRankTakeNoLongerThanItTook) {
  MeshGroups groups(Mesh{1, 1});
  const auto begin = std::chrono::steady_clock::now();
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<RankRecording> recordings, Record({1, 1}, groups));
  const double wall = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  LF_ASSERT_OK_AND_ASSIGN(
      const ScalingFigures figures,
      ComputeScalingFigures(recordings, ChooseLayers(patterns_, 0, 0), groups.members(), {}));
  const double parts = std::accumulate(figures.mean_seconds.begin(), figures.mean_seconds.end(), 0.0);
  EXPECT_LE(figures.seconds, wall);
  EXPECT_GE(figures.seconds, parts - 1e-9);  // of one stream
  EXPECT_GT(figures.mean_seconds[static_cast<size_t>(WorkPart::kAttention)], 0);
  EXPECT_GT(figures.mean_seconds[static_cast<size_t>(WorkPart::kGemm)], 0);
  EXPECT_EQ(figures.imbalance, 1);
  EXPECT_EQ(figures.exposed_communication_seconds, 0);
}

TEST_F(RankRecordings, EndWhenTheyAreTold) {
  RecordingJob job = Job();
  job.should_stop = [] { return absl::CancelledError("enough"); };
  MeshGroups groups(Mesh{2, 1});
  EXPECT_THAT(RecordRanks(job, {2, 1}, groups, *device_, nullptr),
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("enough")));
}

TEST_F(RankRecordings, OfWhatNeedsPeersAreRefused) {
  const auto check = [this](const HeadPattern& pattern, bool replaced, Mesh mesh = {2, 1}) {
    const PatternSet patterns = PatternSet::Uniform(pattern, config_.num_layers, config_.num_q_heads);
    return CheckRunsAlone(config_, patterns, ShardPlan(mesh, kNumTokens), replaced);
  };
  LF_EXPECT_OK(check(Dense{}, false));
  LF_EXPECT_OK(check(AShape{.n_init = 1, .n_local = 1}, false));
  LF_EXPECT_OK(check(VerticalSlash{.vertical = 252, .slash = 252}, true));
  EXPECT_THAT(check(VerticalSlash{.vertical = 256, .slash = 256}, false),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("layer 0, head 0"), HasSubstr("recorded indices"))));
  EXPECT_THAT(check(VerticalSlash{.vertical = 30, .slash = 253}, true),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("253"), HasSubstr("252 tokens"))));
  EXPECT_THAT(check(VerticalSlash{.vertical = 30, .slash = 200}, true, {2, 2}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sequence=2,head=2")));
  EXPECT_THAT(check(BlockSparse{.num_blocks = 3}, true),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("key blocks")));
}

}  // namespace
}  // namespace longfill
