// The service over loopback gRPC with a scripted group of ranks: what clients see, and that nothing stays
// behind.
#include <atomic>
#include <chrono>
#include <future>

#include "runtime/client/convert.h"
#include "tests/unit/runtime/service_cluster.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using testing::HasSubstr;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

TEST(Service, GivesEveryKvElementOnceOnEveryMeshAndDtype) {
  for (const Mesh mesh : {Mesh{1, 1}, Mesh{3, 1}, Mesh{2, 2}}) {
    Cluster::Options options = Cluster::Defaults();
    options.mesh = mesh;
    Cluster cluster(options);
    const auto client = cluster.Client();
    for (const int64_t num_tokens : {1, 127, 128, 129, 1031}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        CheckingConsumer consumer;
        SubmitOptions submit;
        submit.kv_dtype = dtype;
        submit.logits_positions = {num_tokens - 1, 0};
        LF_ASSERT_OK_AND_ASSIGN(const Prefilled got, client->Prefill(Ids(num_tokens), submit, &consumer));
        consumer.ExpectEverythingOnce(3, num_tokens);
        EXPECT_EQ(got.kv_bytes_received, 2 * 3 * 2 * 4 * num_tokens * DTypeBytes(dtype));
        EXPECT_EQ(got.positions, submit.logits_positions);
        ASSERT_EQ(got.logits.size(), 64u);
        EXPECT_EQ(got.logits[5], FakeLogit(num_tokens - 1, 5));
        EXPECT_EQ(got.logits[32 + 6], FakeLogit(0, 6));
        cluster.ExpectStoresEmpty();  // the client has ended the transfer on every rank
      }
    }
  }
}

TEST(Service, TellsManifestPlanProgressAndFigures) {
  Cluster cluster;
  const auto client = cluster.Client();
  CheckingConsumer consumer;
  SubmitOptions submit;
  submit.request_id = "mine:1";
  submit.attention.text = "dense";
  std::vector<PrefillProgress> progress;
  std::vector<AcceptedPrefill> accepted;
  PrefillEvents events;
  events.on_accepted = [&](const AcceptedPrefill& a) { accepted.push_back(a); };
  events.on_progress = [&](const PrefillProgress& p) { progress.push_back(p); };
  LF_ASSERT_OK_AND_ASSIGN(const Prefilled got, client->Prefill(Ids(300), submit, &consumer, events));
  ASSERT_EQ(accepted.size(), 1u);
  const KvManifest& manifest = accepted[0].manifest;
  EXPECT_EQ(manifest.request_id, "mine:1");
  EXPECT_EQ(manifest.transfer_id.size(), 48u);
  EXPECT_EQ(manifest.instance_epoch, "epoch-1");
  EXPECT_EQ(manifest.architecture, "FakeForCausalLM");
  EXPECT_EQ(manifest.token_hashes, std::vector<std::string>(3, std::string(64, 'a')));
  EXPECT_EQ(manifest.num_tokens, 300);
  EXPECT_EQ(manifest.num_layers, 3);
  EXPECT_EQ(manifest.num_kv_heads, 2);
  EXPECT_EQ(manifest.head_dim, 4);
  ASSERT_EQ(manifest.shards.size(), 4u);
  for (int rank = 0; rank < 4; ++rank) {
    const KvShard& shard = manifest.shards[static_cast<size_t>(rank)];
    EXPECT_EQ(shard.endpoint, cluster.endpoints[static_cast<size_t>(rank)]);
    EXPECT_EQ(shard.token_ranges, ShardPlan({2, 2}, 300).TokenRanges(rank));
  }
  EXPECT_EQ(accepted[0].attention, "dense (fake)");
  EXPECT_EQ(accepted[0].memory_plan.weights_bytes, 7);
  EXPECT_EQ(accepted[0].memory_plan.kv_store_bytes, 5);
  EXPECT_EQ(accepted[0].memory_plan.DeviceBytes(), 7 + 1 + 2 + 3 + 4 + 6);
  EXPECT_EQ(accepted[0].memory_plan.HostBytes(), 8 + 9 + 10 + 5);
  ASSERT_FALSE(progress.empty());
  EXPECT_EQ(progress.back().total_tokens, 300);
  EXPECT_EQ(progress.back().processed_tokens, 300);
  EXPECT_EQ(progress.back().layers_done, 3);
  EXPECT_EQ(got.figures.mesh, (Mesh{2, 2}));
  EXPECT_EQ(got.figures.rank_covered_pairs, (std::vector<int64_t>{5, 6}));
  EXPECT_EQ(got.figures.density, 0.25);
  EXPECT_EQ(got.figures.gemm_seconds, 1.5);
  EXPECT_EQ(got.figures.other_seconds, 2.5);
  EXPECT_EQ(got.figures.exposed_copy_seconds, 3.5);
  EXPECT_EQ(got.figures.peak_device_bytes, 14);
  EXPECT_EQ(got.figures.planned_device_bytes, 15);
  EXPECT_EQ(got.figures.outside_device_bytes, 16);
  EXPECT_EQ(got.figures.device, "fake device");
  EXPECT_EQ(got.figures.communicator, "fake communicator");
  EXPECT_EQ(got.figures.exposed_communication_seconds, 0.25);
  EXPECT_EQ(got.figures.compute_dtype, DType::kFloat32);
  LF_ASSERT_OK_AND_ASSIGN(const ModelFacts facts, client->GetModelInfo());
  EXPECT_EQ(facts.architecture, "FakeForCausalLM");
  EXPECT_EQ(facts.mesh, (Mesh{2, 2}));
  EXPECT_EQ(facts.instance_epoch, "epoch-1");
  EXPECT_EQ(cluster.Status().prompts_done(), 1);
}

TEST(Service, KvIsOfTheComputeDtypeWhereNoneIsAskedFor) {
  Cluster::Options options = Cluster::Defaults();
  options.compute_dtype = DType::kBFloat16;
  Cluster cluster(options);
  for (const std::optional<DType> asked : {std::optional<DType>(), std::optional(DType::kFloat32)}) {
    SubmitOptions submit;
    submit.kv_dtype = asked;
    LF_ASSERT_OK_AND_ASSIGN(const Prefilled got, cluster.Client()->Prefill(Ids(10), submit, nullptr));
    EXPECT_EQ(got.manifest.dtype, asked.value_or(DType::kBFloat16));
    EXPECT_EQ(got.figures.compute_dtype, DType::kBFloat16);
  }
}

// What the server was started with holds for requests that say nothing; figures come as they are.
TEST(Service, RecallIsWatchedAsAskedOrAsTheServerWasStarted) {
  Cluster::Options options = Cluster::Defaults();
  options.server.prefill.recall = {.monitor = true, .min_recall = 0.5};
  Cluster cluster(options);
  const auto client = cluster.Client();
  for (const auto& [asked, min_recall] :
       {std::pair(std::optional<RecallOptions>(), 0.5), std::pair(std::optional(RecallOptions{true, 0}), 0.0),
        std::pair(std::optional(RecallOptions{false, 0.9375}), 0.9375)}) {
    SubmitOptions submit;
    submit.recall = asked;
    LF_ASSERT_OK_AND_ASSIGN(const Prefilled got, client->Prefill(Ids(10), submit, nullptr));
    const RecallFigures& recall = got.figures.recall;
    EXPECT_EQ(recall.rows, 16);
    EXPECT_EQ(recall.min_recall, min_recall);
    EXPECT_EQ(recall.mean, 0.75);
    EXPECT_EQ(recall.min, 0.5);
    EXPECT_EQ(recall.min_layer, 1);
    EXPECT_EQ(recall.min_head, 2);
    EXPECT_EQ(recall.recomputed, 1);
    EXPECT_EQ(recall.seconds, 4.5);
    EXPECT_EQ(recall.pair_share, 0.125);
    ASSERT_EQ(recall.layers.size(), 2u);
    EXPECT_FALSE(recall.layers[0].watched);
    EXPECT_TRUE(recall.layers[1].watched);
    EXPECT_EQ(recall.layers[1].heads, (std::vector<double>{1, 0.5}));
    ASSERT_EQ(recall.layers[1].recomputed.size(), 1u);
    const RecomputedHead& head = recall.layers[1].recomputed[0];
    EXPECT_EQ(head.head, 1);
    EXPECT_EQ(head.pattern, HeadPattern(VerticalSlash{60, 100}));
    EXPECT_EQ(head.recall_before, 0.25);
    EXPECT_EQ(head.recall, 0.5);
    EXPECT_EQ(head.density, 0.0625);
  }
  LF_ASSERT_OK_AND_ASSIGN(const Prefilled off,
                          client->Prefill(Ids(10), {.recall = RecallOptions{}}, nullptr));
  EXPECT_EQ(off.figures.recall.rows, 0);
  EXPECT_THAT(client->Prefill(Ids(10), {.recall = RecallOptions{false, -0.5}}, nullptr),
              StatusIs(kInvalid, HasSubstr("min_recall -0.5 is not in (0, 1]")));
}

TEST(Service, PagesOfALayerArriveWhileLaterLayersCompute) {
  Cluster cluster;
  cluster.group.HoldBeforeLayer(1);
  CheckingConsumer consumer;
  auto result =
      std::async(std::launch::async, [&] { return cluster.Client()->Prefill(Ids(700), {}, &consumer); });
  EXPECT_TRUE(Cluster::Soon([&] { return consumer.TokensOfLayer(0) == 700; }));
  EXPECT_EQ(consumer.TokensOfLayer(1), 0);
  EXPECT_TRUE(cluster.group.WaitUntilHeld());
  cluster.group.Release();
  LF_EXPECT_OK(result.get());
  consumer.ExpectEverythingOnce(3, 700);
}

TEST(Service, TakesAMillionTokensAndManyLogits) {
  Cluster::Options options = Cluster::Defaults();
  options.num_layers = 1;
  options.num_kv_heads = 1;
  options.head_dim = 2;
  options.vocab_size = 2048;
  Cluster cluster(options);
  class CountingConsumer final : public KvConsumer {
   public:
    absl::Status OnManifest(const KvManifest&) override { return absl::OkStatus(); }
    absl::Status OnPage(const KvPageView& page) override {
      tokens += page.num_tokens;
      return absl::OkStatus();
    }
    std::atomic<int64_t> tokens = 0;
  } consumer;
  SubmitOptions submit;
  for (int64_t i = 0; i < 1000; ++i)
    submit.logits_positions.push_back(i * 1000);  // 8 MB, more than one message holds
  LF_ASSERT_OK_AND_ASSIGN(const Prefilled got, cluster.Client()->Prefill(Ids(1 << 20), submit, &consumer));
  EXPECT_EQ(consumer.tokens, 1 << 20);
  EXPECT_EQ(got.manifest.token_hashes.size(), 8192u);
  EXPECT_EQ(got.logits[2048 * 999 + 3], FakeLogit(999000, 3));
}

TEST(Service, RefusesBadRequestsBeforeWorkAndStaysUsable) {
  Cluster::Options options = Cluster::Defaults();
  options.max_tokens = 1000;
  Cluster cluster(options);
  const auto client = cluster.Client();
  PrefillRefusal refusal;
  EXPECT_THAT(client->Prefill({}, {}, nullptr), StatusIs(kInvalid, HasSubstr("empty")));
  EXPECT_THAT(client->Prefill(Ids(1001), {}, nullptr, {}, nullptr, &refusal),
              StatusIs(kInvalid, HasSubstr("1001 tokens, the model takes at most 1000")));
  EXPECT_EQ(refusal.max_tokens, 1000);
  EXPECT_THAT(client->Prefill(std::vector<int32_t>{1, -5}, {}, nullptr),
              StatusIs(kInvalid, HasSubstr("token id -5")));
  EXPECT_THAT(client->Prefill(std::vector<int32_t>{1, 32}, {}, nullptr),
              StatusIs(kInvalid, HasSubstr("token id 32")));
  EXPECT_THAT(client->Prefill(Ids(5), {.logits_positions = {5}}, nullptr),
              StatusIs(kInvalid, HasSubstr("position 5")));
  EXPECT_THAT(client->Prefill(Ids(1), {.logits_positions = std::vector<int64_t>((1 << 20) + 1)}, nullptr),
              StatusIs(kInvalid, HasSubstr("1048577 logits positions")));
  EXPECT_THAT(client->Prefill(Ids(5), {.request_id = "a b"}, nullptr),
              StatusIs(kInvalid, HasSubstr("request_id")));
  EXPECT_THAT(client->Prefill(Ids(5), {.request_id = std::string(129, 'a')}, nullptr),
              StatusIs(kInvalid, HasSubstr("129 characters")));
  EXPECT_THAT(client->Prefill(Ids(5), {.attention = {.text = std::string(300, 'x')}}, nullptr),
              StatusIs(kInvalid, HasSubstr("300 characters")));
  EXPECT_THAT(client->Prefill(Ids(5), {.attention = {.text = "p", .pattern_json = std::string(3 << 20, 'x')}},
                              nullptr),
              StatusIs(kInvalid, HasSubstr("pattern_json")));
  EXPECT_THAT(client->Prefill(Ids(5), {.attention = {.text = "too-large"}}, nullptr, {}, nullptr, &refusal),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("memory")));
  EXPECT_EQ(refusal.max_tokens, 77);
  LF_EXPECT_OK(client->Prefill(Ids(5), {}, nullptr));
}

// Sends messages as they are and returns the status.
grpc::Status SendRaw(Cluster& cluster, const std::vector<v1::PrefillRequest>& messages) {
  const auto stub = cluster.PrefillStub();
  grpc::ClientContext context;
  const auto stream = stub->Prefill(&context);
  for (const v1::PrefillRequest& message : messages) {
    if (!stream->Write(message)) break;
  }
  stream->WritesDone();
  v1::PrefillEvent event;
  while (stream->Read(&event)) {
  }
  return stream->Finish();
}

v1::PrefillRequest Header(int64_t num_tokens) {
  v1::PrefillRequest message;
  message.mutable_header()->set_num_tokens(num_tokens);
  return message;
}

v1::PrefillRequest Tokens(int count) {
  v1::PrefillRequest message;
  message.mutable_tokens();
  for (int i = 0; i < count; ++i) message.mutable_tokens()->add_ids(1);
  return message;
}

TEST(Service, RefusesStreamsThatBreakTheProtocol) {
  Cluster cluster;
  v1::PrefillRequest odd_dtype = Header(1);
  odd_dtype.mutable_header()->set_kv_dtype(static_cast<v1::DataType>(9));
  v1::PrefillRequest odd_coverage = Header(1);
  odd_coverage.mutable_header()->set_coverage(static_cast<v1::Coverage>(9));
  const struct {
    std::vector<v1::PrefillRequest> messages;
    const char* message;
  } cases[] = {
      {{}, "without a header"},
      {{Tokens(3)}, "before the header"},
      {{Header(3), Header(3)}, "came twice"},
      {{Header(3), Tokens(2)}, "after 2 tokens, the header announced 3"},
      {{Header(3), Tokens(4)}, "at least 4 tokens came, the header announced 3"},
      {{Header(3), Tokens(3), Tokens(1)}, "at least 4 tokens"},
      {{Header(-1)}, "num_tokens is -1"},
      {{Header(1 << 20), Tokens(262145)}, "262145 ids in one message"},
      {{v1::PrefillRequest()}, "neither header nor tokens"},
      {{odd_dtype, Tokens(1)}, "dtype 9"},
      {{odd_coverage, Tokens(1)}, "coverage 9"},
  };
  for (const auto& c : cases) {
    EXPECT_THAT(FromGrpc(SendRaw(cluster, c.messages)), StatusIs(kInvalid, HasSubstr(c.message)));
  }
  EXPECT_TRUE(SendRaw(cluster, {Header(3), Tokens(1), Tokens(0), Tokens(2)}).ok());
  // The raw client left its transfer open on every rank.
  for (const auto& server : cluster.servers) server->store().FailAll(absl::UnavailableError("end of test"));
}

TEST(Service, FullQueueIsRefusedWithARetryHint) {
  Cluster::Options options = Cluster::Defaults();
  options.server.scheduler.queue_capacity = 2;
  Cluster cluster(options);
  cluster.group.HoldBeforeLayer(0);
  const auto client = cluster.Client();
  std::vector<std::future<absl::StatusOr<Prefilled>>> running;
  std::atomic<int> last_position = -1;
  for (int i = 0; i < 3; ++i) {
    PrefillEvents events;
    if (i == 2) events.on_queued = [&](int position) { last_position = position; };
    running.push_back(std::async(
        std::launch::async, [&client, events] { return client->Prefill(Ids(50), {}, nullptr, events); }));
    ASSERT_TRUE(i == 0 ? cluster.group.WaitUntilHeld()
                       : Cluster::Soon([&] { return cluster.Status().queue_length() == i; }));
  }
  EXPECT_TRUE(Cluster::Soon([&] { return last_position == 1; }));
  PrefillRefusal refusal;
  EXPECT_THAT(client->Prefill(Ids(50), {}, nullptr, {}, nullptr, &refusal),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("2 prompts wait")));
  EXPECT_GE(refusal.retry_after, milliseconds(1000));
  {
    grpc::ClientContext context;
    const auto stub = cluster.PrefillStub();
    const auto stream = stub->Prefill(&context);
    stream->Write(Header(1));
    stream->Write(Tokens(1));
    stream->WritesDone();
    v1::PrefillEvent event;
    while (stream->Read(&event)) {
    }
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_EQ(context.GetServerTrailingMetadata().count("grpc-retry-pushback-ms"), 1u);
  }
  cluster.group.Release();
  for (auto& result : running) LF_EXPECT_OK(result.get());
}

TEST(Service, WithoutAQueueOnePromptAtATimeIsTaken) {
  Cluster::Options options = Cluster::Defaults();
  options.server.scheduler.queue_capacity = 0;
  Cluster cluster(options);
  cluster.group.HoldBeforeLayer(0);
  const auto client = cluster.Client();
  auto running = std::async(std::launch::async, [&] { return client->Prefill(Ids(5), {}, nullptr); });
  ASSERT_TRUE(cluster.group.WaitUntilHeld());
  EXPECT_THAT(client->Prefill(Ids(5), {}, nullptr),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("the limit is 0")));
  cluster.group.Release();
  LF_EXPECT_OK(running.get());
  LF_EXPECT_OK(client->Prefill(Ids(5), {}, nullptr));
}

TEST(Service, CancelWorksWhileQueuedAndWhileComputing) {
  Cluster cluster;
  cluster.group.HoldBeforeLayer(1);
  const auto client = cluster.Client();
  Cancellation first_cancel, second_cancel;
  CheckingConsumer consumer;
  auto first = std::async(std::launch::async,
                          [&] { return client->Prefill(Ids(300), {}, &consumer, {}, &first_cancel); });
  ASSERT_TRUE(cluster.group.WaitUntilHeld());
  auto second = std::async(std::launch::async,
                           [&] { return client->Prefill(Ids(300), {}, nullptr, {}, &second_cancel); });
  ASSERT_TRUE(Cluster::Soon([&] { return cluster.Status().queue_length() == 1; }));
  second_cancel.Cancel();
  EXPECT_THAT(second.get(), StatusIs(absl::StatusCode::kCancelled, HasSubstr("")));
  EXPECT_TRUE(Cluster::Soon([&] { return cluster.Status().queue_length() == 0; }));
  EXPECT_EQ(cluster.Status().running().num_tokens(), 300);
  first_cancel.Cancel();
  EXPECT_THAT(first.get(), StatusIs(absl::StatusCode::kCancelled, HasSubstr("")));
  EXPECT_TRUE(Cluster::Soon([&] { return !cluster.Status().has_running(); }));
  EXPECT_TRUE(cluster.StoresEmptySoon());
  cluster.group.Release();
  LF_EXPECT_OK(client->Prefill(Ids(10), {}, nullptr));
}

TEST(Service, DeadlineEndsPromptsThatWaitAndThatCompute) {
  Cluster cluster;
  cluster.group.HoldBeforeLayer(2);
  const auto client = cluster.Client();
  CheckingConsumer consumer;
  auto first = std::async(std::launch::async, [&] {
    return client->Prefill(Ids(300), {.timeout = milliseconds(600)}, &consumer);
  });
  ASSERT_TRUE(cluster.group.WaitUntilHeld());
  EXPECT_THAT(client->Prefill(Ids(300), {.timeout = milliseconds(100)}, nullptr),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("")));
  EXPECT_TRUE(Cluster::Soon([&] { return cluster.Status().queue_length() == 0; }));
  EXPECT_THAT(first.get(), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("")));
  EXPECT_TRUE(cluster.StoresEmptySoon());
}

TEST(Service, ClientGoneInMidPromptLeavesNothing) {
  Cluster cluster;
  {
    auto stub = cluster.PrefillStub();
    grpc::ClientContext context;
    auto stream = stub->Prefill(&context);
    stream->Write(Header(100000));
    stream->Write(Tokens(1000));
    context.TryCancel();
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  LF_EXPECT_OK(cluster.Client()->Prefill(Ids(10), {}, nullptr));
  EXPECT_EQ(cluster.Status().prompts_done(), 1);
  EXPECT_EQ(cluster.Status().prompts_failed(), 0);
}

TEST(Service, UploadThatStandsStillIsEnded) {
  Cluster::Options options = Cluster::Defaults();
  options.server.prefill.upload_idle_limit = milliseconds(100);
  options.server.prefill.max_calls = 1;
  Cluster cluster(options);
  const auto stub = cluster.PrefillStub();
  grpc::ClientContext context;
  const auto stream = stub->Prefill(&context);
  stream->Write(Header(100));
  EXPECT_THAT(cluster.Client()->Prefill(Ids(10), {}, nullptr),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("too many calls")));
  v1::PrefillEvent event;
  while (stream->Read(&event)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(Cluster::Soon([&] { return cluster.Client()->Prefill(Ids(10), {}, nullptr).ok(); }));
}

TEST(Service, SlowClientNeverStallsThePrefill) {
  Cluster cluster;
  cluster.group.progress_per_layer = 100000;
  const auto stub = cluster.PrefillStub();
  grpc::ClientContext context;
  const auto stream = stub->Prefill(&context);
  stream->Write(Header(3));
  stream->Write(Tokens(3));
  stream->WritesDone();
  EXPECT_TRUE(Cluster::Soon([&] { return cluster.Status().prompts_done() == 1; }, std::chrono::seconds(30)));
  v1::PrefillEvent event;
  int64_t num_events = 0;
  bool has_result = false;
  std::string transfer;
  while (stream->Read(&event)) {
    ++num_events;
    has_result = has_result || event.has_result();
    if (event.has_accepted()) transfer = event.accepted().manifest().transfer_id();
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_TRUE(has_result);
  EXPECT_LT(num_events, 100000);  // only the latest progress was kept while nobody read
  for (size_t rank = 0; rank < cluster.servers.size(); ++rank) {
    LF_EXPECT_OK(cluster.servers[rank]->store().End(transfer, TransferState::kComplete, absl::OkStatus()));
  }
}

TEST(Service, FailureOfThePrefillReachesClientAndReaders) {
  Cluster cluster;
  cluster.group.fail_layer = [](int64_t layer) {
    return layer == 1 ? absl::InternalError("layer 1 went wrong") : absl::OkStatus();
  };
  CheckingConsumer consumer;
  // The prefill's own words, although its readers hear of it too.
  EXPECT_THAT(cluster.Client()->Prefill(Ids(300), {}, &consumer),
              StatusIs(absl::StatusCode::kInternal, testing::Eq("layer 1 went wrong")));
  cluster.ExpectStoresEmpty();
  EXPECT_EQ(cluster.Status().prompts_failed(), 1);
}

TEST(Service, ConsumerErrorAbortsTransferAndPrefill) {
  class FullDisk final : public KvConsumer {
   public:
    absl::Status OnManifest(const KvManifest&) override { return absl::OkStatus(); }
    absl::Status OnPage(const KvPageView& page) override {
      return page.rank == 1 ? absl::ResourceExhaustedError("disk is full") : absl::OkStatus();
    }
  } consumer;
  Cluster cluster;
  cluster.group.HoldBeforeLayer(1);  // would hang if the error did not cancel the prefill
  EXPECT_THAT(cluster.Client()->Prefill(Ids(600), {}, &consumer),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("KV of rank 1")));
  EXPECT_TRUE(cluster.StoresEmptySoon());
}

TEST(Service, DrainFinishesTheRunningPromptAndRefusesOthers) {
  Cluster cluster;
  cluster.group.HoldBeforeLayer(1);
  const auto client = cluster.Client();
  CheckingConsumer consumer;
  auto running = std::async(std::launch::async, [&] { return client->Prefill(Ids(300), {}, &consumer); });
  ASSERT_TRUE(cluster.group.WaitUntilHeld());
  auto waiting = std::async(std::launch::async, [&] { return client->Prefill(Ids(300), {}, nullptr); });
  ASSERT_TRUE(Cluster::Soon([&] { return cluster.Status().queue_length() == 1; }));
  cluster.servers[0]->RequestDrain();
  auto ended = std::async(std::launch::async, [&] { return cluster.servers[0]->Wait(); });
  EXPECT_THAT(waiting.get(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("draining")));
  EXPECT_THAT(client->Prefill(Ids(300), {}, nullptr),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("draining")));
  EXPECT_EQ(cluster.Status().phase(), v1::SERVER_PHASE_DRAINING);
  EXPECT_EQ(ended.wait_for(milliseconds(100)), std::future_status::timeout);
  cluster.group.Release();
  LF_EXPECT_OK(running.get());
  consumer.ExpectEverythingOnce(3, 300);
  LF_EXPECT_OK(ended.get());
  EXPECT_EQ(cluster.group.shutdowns, 1);
  LF_EXPECT_OK(cluster.End());
}

TEST(Service, DrainWaitsForOpenTransfersAndASecondSignalDoesNot) {
  for (const bool hard : {false, true}) {
    Cluster cluster;
    std::string transfer;
    const auto stub = cluster.PrefillStub();
    grpc::ClientContext context;
    const auto stream = stub->Prefill(&context);
    stream->Write(Header(3));
    stream->Write(Tokens(3));
    stream->WritesDone();
    v1::PrefillEvent event;
    while (stream->Read(&event)) {
      if (event.has_accepted()) transfer = event.accepted().manifest().transfer_id();
    }
    ASSERT_TRUE(stream->Finish().ok());
    cluster.servers[0]->RequestDrain();
    auto ended = std::async(std::launch::async, [&] { return cluster.servers[0]->Wait(); });
    EXPECT_EQ(ended.wait_for(milliseconds(300)), std::future_status::timeout);
    if (hard) {
      for (const auto& server : cluster.servers) {
        server->RequestDrain();
        server->RequestDrain();
      }
    } else {
      for (const auto& server : cluster.servers) {
        LF_EXPECT_OK(server->store().End(transfer, TransferState::kComplete, absl::OkStatus()));
      }
    }
    LF_EXPECT_OK(ended.get());
    LF_EXPECT_OK(cluster.End());
  }
}

TEST(Service, LostRankReachesEveryClientWithinHalfASecond) {
  Cluster cluster;
  cluster.group.HoldBeforeLayer(1);
  cluster.group.ignore_stop = true;  // the engine hangs in a collective
  const auto client = cluster.Client();
  const auto lost = steady_clock::time_point::max();
  std::atomic<steady_clock::time_point> lost_at{lost};
  const auto timed = [&](KvConsumer* consumer) {
    const auto result = client->Prefill(Ids(300), {}, consumer);
    EXPECT_THAT(result, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("rank 2")));
    return std::chrono::duration_cast<milliseconds>(steady_clock::now() - lost_at.load());
  };
  auto running = std::async(std::launch::async, timed, nullptr);
  ASSERT_TRUE(cluster.group.WaitUntilHeld());
  auto waiting = std::async(std::launch::async, timed, nullptr);
  ASSERT_TRUE(Cluster::Soon([&] { return cluster.Status().queue_length() == 1; }));
  const auto stub = cluster.PrefillStub();
  grpc::ClientContext context;
  const auto uploading = stub->Prefill(&context);
  uploading->Write(Header(100));
  std::this_thread::sleep_for(milliseconds(50));

  lost_at = steady_clock::now();
  for (const auto& server : cluster.servers) {
    server->OnPeerLost(2, absl::UnavailableError("rank 2 on host h was lost: connection closed"));
  }
  v1::PrefillEvent event;
  std::string lost_rank;
  while (uploading->Read(&event)) lost_rank = event.error().lost_rank();
  const grpc::Status status = uploading->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("rank 2"));
  EXPECT_EQ(lost_rank, "2");
  EXPECT_LT(running.get(), milliseconds(500));
  EXPECT_LT(waiting.get(), milliseconds(500));
  for (const auto& server : cluster.servers) {
    EXPECT_THAT(server->Wait(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("rank 2")));
  }
  cluster.group.ignore_stop = false;
  EXPECT_THAT(cluster.End(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("rank 2")));
}

// One message to a method whose C++ code we do not have; the first answer's bytes.
std::string CallRaw(const std::string& target, const std::string& method, const std::string& bytes) {
  grpc::GenericStub stub(MakeChannel(target));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  grpc::CompletionQueue queue;
  void* tag;
  bool ok = false;
  const auto next = [&] { return queue.Next(&tag, &ok) && ok; };
  auto call = stub.PrepareCall(&context, method, &queue);
  call->StartCall(nullptr);
  if (!next()) return "no call";
  const grpc::Slice slice(bytes);
  call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
  if (!next()) return "no write";
  call->WritesDone(nullptr);
  next();
  grpc::ByteBuffer answer;
  call->Read(&answer, nullptr);
  std::string text;
  if (next()) {
    grpc::Slice all;
    EXPECT_TRUE(answer.DumpToSingleSlice(&all).ok());
    text.assign(reinterpret_cast<const char*>(all.begin()), all.size());
  }
  context.TryCancel();
  grpc::Status status;
  call->Finish(&status, nullptr);
  next();
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
  return text;
}

// grpc.health.v1: HealthCheckRequest{service = 1}, HealthCheckResponse{status = 1}; 1 SERVING, 2 NOT_SERVING.
int Health(const std::string& target, const std::string& service) {
  std::string request;
  if (!service.empty()) request = std::string("\x0a") + static_cast<char>(service.size()) + service;
  const std::string answer = CallRaw(target, "/grpc.health.v1.Health/Check", request);
  return answer.size() == 2 && answer[0] == 8 ? answer[1] : -1;
}

TEST(Service, HealthFollowsLoadingServingAndDraining) {
  Cluster::Options options = Cluster::Defaults();
  options.mesh = {2, 1};
  options.begin = false;
  Cluster cluster(options);
  const std::string rank1 = cluster.servers[1]->listen_endpoint();
  const auto expect = [&](int status) {
    for (const char* service :
         {"", "longfill.v1.PrefillService", "longfill.v1.KvService", "longfill.v1.AdminService"}) {
      EXPECT_EQ(Health(cluster.target(), service), status) << service;
    }
    EXPECT_EQ(Health(rank1, "longfill.v1.KvService"), status);
    EXPECT_EQ(Health(rank1, ""), status);
  };
  expect(2);
  EXPECT_EQ(cluster.Status().phase(), v1::SERVER_PHASE_LOADING);
  EXPECT_THAT(cluster.Client()->Prefill(Ids(1), {}, nullptr),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("loading")));
  EXPECT_THAT(cluster.Client()->GetModelInfo(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("loading")));
  cluster.Begin();
  expect(1);
  EXPECT_EQ(Health(rank1, "longfill.v1.PrefillService"), -1);  // not served there
  cluster.group.HoldBeforeLayer(0);
  auto running =
      std::async(std::launch::async, [&] { return cluster.Client()->Prefill(Ids(1), {}, nullptr); });
  ASSERT_TRUE(cluster.group.WaitUntilHeld());
  std::vector<std::future<absl::Status>> ended;
  for (const auto& server : cluster.servers) {
    server->RequestDrain();
    ended.push_back(std::async(std::launch::async, [&server] { return server->Wait(); }));
  }
  EXPECT_TRUE(Cluster::Soon([&] { return Health(cluster.target(), "") == 2 && Health(rank1, "") == 2; }));
  expect(2);
  cluster.group.Release();
  LF_EXPECT_OK(running.get());
  for (auto& end : ended) LF_EXPECT_OK(end.get());
  LF_EXPECT_OK(cluster.End());
}

TEST(Service, ReflectionListsTheServices) {
  Cluster cluster;
  // ServerReflectionRequest{list_services = 7: "*"}
  const std::string answer =
      CallRaw(cluster.target(), "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
              std::string("\x3a\x01*"));
  for (const char* service : {"longfill.v1.PrefillService", "longfill.v1.KvService",
                              "longfill.v1.AdminService", "grpc.health.v1.Health"}) {
    EXPECT_THAT(answer, HasSubstr(service));
  }
}

TEST(Service, PortInUseIsRefusedByName) {
  Cluster cluster;
  ServerOptions options;
  options.listen = cluster.target();
  CpuMemoryResource memory;
  const std::unique_ptr<KvTier> tier = MakeMemoryTier(&memory);
  EXPECT_THAT(Server::Start(options, tier.get()), StatusIs(kInvalid, HasSubstr(cluster.target())));
  options.listen = "nowhere";
  EXPECT_THAT(Server::Start(options, tier.get()),
              StatusIs(kInvalid, HasSubstr("\"nowhere\" is not HOST:PORT")));
}

TEST(Service, IdleRanksAreKeptAlive) {
  Cluster::Options options = Cluster::Defaults();
  options.server.scheduler.keep_alive_interval = milliseconds(10);
  Cluster cluster(options);
  EXPECT_TRUE(Cluster::Soon([&] { return cluster.group.keep_alives >= 3; }));
}

}  // namespace
}  // namespace longfill
