// The KV hand-off over loopback gRPC: pages, leases, readers that leave, and servers that lie.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <future>
#include <sstream>

#include "models/safetensors.h"
#include "runtime/client/convert.h"
#include "runtime/client/endpoint.h"
#include "runtime/client/kv_fetch.h"
#include "runtime/kv/crc32c.h"
#include "runtime/serving/signal_watch.h"
#include "tests/unit/runtime/service_cluster.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

// Prefills without reading anything and leaves the transfer open on every rank.
std::string OpenTransfer(Cluster& cluster, int64_t num_tokens) {
  const auto stub = cluster.PrefillStub();
  grpc::ClientContext context;
  const auto stream = stub->Prefill(&context);
  v1::PrefillRequest message;
  message.mutable_header()->set_num_tokens(num_tokens);
  stream->Write(message);
  for (const int32_t id : Ids(num_tokens)) message.mutable_tokens()->add_ids(id);
  stream->Write(message);
  stream->WritesDone();
  std::string transfer;
  v1::PrefillEvent event;
  while (stream->Read(&event)) {
    if (event.has_accepted()) transfer = event.accepted().manifest().transfer_id();
  }
  EXPECT_TRUE(stream->Finish().ok());
  return transfer;
}

struct ReadResult {
  absl::Status status;
  std::vector<v1::KvPage> pages;
  int num_ends = 0;
  v1::ReadEnd end;
};

ReadResult ReadPages(Cluster& cluster, size_t rank, const v1::ReadPagesRequest& request) {
  const auto stub = cluster.KvStub(rank);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  const auto stream = stub->ReadPages(&context, request);
  ReadResult result;
  v1::ReadPagesResponse response;
  while (stream->Read(&response)) {
    EXPECT_EQ(result.num_ends, 0) << "a message after the last one";
    result.pages.insert(result.pages.end(), response.pages().begin(), response.pages().end());
    if (response.has_end()) {
      ++result.num_ends;
      result.end = response.end();
    }
  }
  result.status = FromGrpc(stream->Finish());
  return result;
}

v1::ReadPagesRequest Request(const std::string& transfer) {
  v1::ReadPagesRequest request;
  request.set_transfer_id(transfer);
  return request;
}

void EndEverywhere(Cluster& cluster, const std::string& transfer) {
  for (size_t rank = 0; rank < cluster.servers.size(); ++rank) {
    const auto stub = cluster.KvStub(rank);
    grpc::ClientContext context;
    v1::EndTransferRequest request;
    request.set_transfer_id(transfer);
    request.set_outcome(v1::TRANSFER_STATE_COMPLETE);
    v1::EndTransferResponse response;
    EXPECT_TRUE(stub->EndTransfer(&context, request, &response).ok());
    EXPECT_EQ(response.state(), v1::TRANSFER_STATE_COMPLETE);
  }
}

TEST(KvService, GivesTheAskedPartInTheAskedLayoutAndMessageSize) {
  Cluster cluster;
  const int64_t num_tokens = 2500;
  const std::string transfer = OpenTransfer(cluster, num_tokens);
  for (const v1::KvLayout layout : {v1::KV_LAYOUT_HND, v1::KV_LAYOUT_NHD}) {
    v1::ReadPagesRequest request = Request(transfer);
    request.set_layout(layout);
    request.set_layer_begin(1);
    request.set_head_begin(1);
    request.set_token_begin(100);
    request.set_token_end(2400);
    request.set_max_message_bytes(1);  // clamped to 16 KiB: 512 tokens of one head
    std::set<std::pair<int64_t, int64_t>> seen;
    for (size_t rank = 0; rank < 4; ++rank) {
      const ReadResult got = ReadPages(cluster, rank, request);
      LF_ASSERT_OK(got.status);
      EXPECT_EQ(got.num_ends, 1);
      EXPECT_TRUE(got.end.complete());
      EXPECT_EQ(got.end.state(), v1::TRANSFER_STATE_OPEN);
      EXPECT_EQ(got.end.num_pages(), static_cast<int64_t>(got.pages.size()));
      int64_t bytes = 0;
      for (const v1::KvPage& page : got.pages) {
        EXPECT_EQ(page.head_begin(), 1);
        EXPECT_EQ(page.num_heads(), 1);
        EXPECT_EQ(page.key_crc32c(), Crc32c(page.key().data(), static_cast<int64_t>(page.key().size())));
        EXPECT_EQ(page.value_crc32c(),
                  Crc32c(page.value().data(), static_cast<int64_t>(page.value().size())));
        bytes += static_cast<int64_t>(page.key().size() + page.value().size());
        for (int64_t token = 0; token < page.num_tokens(); ++token) {
          float got_value;
          std::memcpy(&got_value, page.value().data() + (token * 4 + 3) * 4, 4);
          EXPECT_EQ(got_value, FakeKvElement(false, page.layer(), 1, page.token_begin() + token, 3));
          EXPECT_TRUE(seen.insert({page.layer(), page.token_begin() + token}).second);
        }
      }
      EXPECT_EQ(got.end.num_bytes(), bytes);
    }
    EXPECT_EQ(seen.size(), 2u * 2300u);
  }
  v1::ReadPagesRequest request = Request(transfer);
  request.set_layout(v1::KV_LAYOUT_NHD);
  const ReadResult both = ReadPages(cluster, 0, request);
  LF_ASSERT_OK(both.status);
  float element;
  std::memcpy(&element, both.pages[0].key().data() + ((5 * 2 + 1) * 4 + 2) * 4, 4);
  EXPECT_EQ(element, FakeKvElement(true, 0, 1, 5, 2));
  EndEverywhere(cluster, transfer);
}

TEST(KvService, RefusesBadReadsByName) {
  Cluster cluster;
  const std::string transfer = OpenTransfer(cluster, 200);
  v1::ReadPagesRequest request = Request(transfer);
  request.set_layer_end(4);
  EXPECT_THAT(ReadPages(cluster, 1, request).status,
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("layer range [0, 4)")));
  request = Request(transfer);
  request.set_token_begin(200);
  EXPECT_THAT(ReadPages(cluster, 1, request).status,
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token")));
  request = Request(transfer);
  request.set_layout(static_cast<v1::KvLayout>(7));
  EXPECT_THAT(ReadPages(cluster, 1, request).status,
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("layout 7")));
  request = Request(transfer);
  request.set_max_message_bytes(-1);
  EXPECT_THAT(ReadPages(cluster, 1, request).status,
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("negative")));
  const ReadResult unknown = ReadPages(cluster, 1, Request("guess"));
  EXPECT_THAT(unknown.status, StatusIs(absl::StatusCode::kNotFound, HasSubstr("no such transfer")));
  EXPECT_FALSE(unknown.end.complete());
  EndEverywhere(cluster, transfer);
  const ReadResult ended = ReadPages(cluster, 1, Request(transfer));
  EXPECT_THAT(ended.status, StatusIs(absl::StatusCode::kNotFound, HasSubstr("complete")));
  EXPECT_EQ(ended.num_ends, 1);
  EXPECT_EQ(ended.end.state(), v1::TRANSFER_STATE_COMPLETE);
}

TEST(KvService, ManifestComesFromRankZero) {
  Cluster cluster;
  const std::string transfer = OpenTransfer(cluster, 300);
  v1::GetManifestRequest request;
  request.set_transfer_id(transfer);
  v1::KvManifest manifest;
  grpc::ClientContext first, second, third;
  EXPECT_TRUE(cluster.KvStub(0)->GetManifest(&first, request, &manifest).ok());
  EXPECT_EQ(manifest.transfer_id(), transfer);
  EXPECT_EQ(manifest.lease_ms(), 30000);
  EXPECT_THAT(FromGrpc(cluster.KvStub(1)->GetManifest(&second, request, &manifest)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(cluster.endpoints[0])));
  CheckingConsumer consumer;
  LF_EXPECT_OK(cluster.Client()->FetchKv(transfer, &consumer));
  consumer.ExpectEverythingOnce(3, 300);
  cluster.ExpectStoresEmpty();
  EXPECT_THAT(FromGrpc(cluster.KvStub(0)->GetManifest(&third, request, &manifest)),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("complete")));
}

TEST(KvService, ReaderGoneInMidLayerEndsOnlyItsStream) {
  Cluster cluster;
  cluster.group.HoldBeforeLayer(1);
  CheckingConsumer consumer;
  std::string transfer;
  PrefillEvents events;
  std::atomic<bool> accepted = false;
  events.on_accepted = [&](const AcceptedPrefill& a) {
    transfer = a.manifest.transfer_id;
    accepted = true;
  };
  auto prefill = std::async(std::launch::async,
                            [&] { return cluster.Client()->Prefill(Ids(900), {}, &consumer, events); });
  ASSERT_TRUE(Cluster::Soon([&] { return accepted.load(); }));
  KvStore& store = cluster.servers[1]->store();
  {
    const auto stub = cluster.KvStub(1);
    grpc::ClientContext context;
    const auto stream = stub->ReadPages(&context, Request(transfer));
    v1::ReadPagesResponse response;
    EXPECT_TRUE(stream->Read(&response));
    EXPECT_TRUE(
        Cluster::Soon([&] { return store.GetStatus(transfer)->active_readers == 2; }));  // and the client's
    context.TryCancel();
  }
  EXPECT_TRUE(Cluster::Soon([&] { return store.GetStatus(transfer)->active_readers == 1; }));
  cluster.group.Release();
  LF_EXPECT_OK(prefill.get());
  consumer.ExpectEverythingOnce(3, 900);
}

TEST(KvService, AbortReachesAWaitingReader) {
  Cluster cluster;
  cluster.group.HoldBeforeLayer(1);
  Cancellation cancellation;
  CheckingConsumer consumer;
  std::string transfer;
  std::atomic<bool> accepted = false;
  PrefillEvents events;
  events.on_accepted = [&](const AcceptedPrefill& a) {
    transfer = a.manifest.transfer_id;
    accepted = true;
  };
  auto prefill = std::async(std::launch::async, [&] {
    return cluster.Client()->Prefill(Ids(900), {}, &consumer, events, &cancellation);
  });
  ASSERT_TRUE(Cluster::Soon([&] { return accepted.load(); }));
  auto reader = std::async(std::launch::async, [&] { return ReadPages(cluster, 2, Request(transfer)); });
  EXPECT_TRUE(
      Cluster::Soon([&] { return cluster.servers[2]->store().GetStatus(transfer)->active_readers == 2; }));
  v1::ReadPagesRequest impatient = Request(transfer);
  impatient.set_max_wait_ms(60);
  EXPECT_THAT(
      ReadPages(cluster, 2, impatient).status,
      StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("layer 1 did not come within max_wait_ms 60")));
  cancellation.Cancel();
  const ReadResult got = reader.get();
  EXPECT_THAT(got.status, StatusIs(absl::StatusCode::kAborted, HasSubstr("aborted")));
  EXPECT_EQ(got.num_ends, 1);
  EXPECT_EQ(got.end.state(), v1::TRANSFER_STATE_ABORTED);
  EXPECT_THAT(prefill.get(), StatusIs(absl::StatusCode::kCancelled, HasSubstr("")));
  EXPECT_TRUE(cluster.StoresEmptySoon());
}

TEST(KvService, LeaseRunsOutWithoutASignOfLifeAndNotWithOne) {
  Cluster::Options options = Cluster::Defaults();
  options.mesh = {2, 1};
  options.server.store.lease = milliseconds(300);
  Cluster cluster(options);
  const std::string transfer = OpenTransfer(cluster, 300);
  const auto stub = cluster.KvStub(1);
  v1::RenewLeaseRequest beat;
  beat.set_transfer_id(transfer);
  v1::RenewLeaseResponse answer;
  for (int i = 0; i < 12; ++i) {  // longer than two leases
    grpc::ClientContext context;
    ASSERT_TRUE(stub->RenewLease(&context, beat, &answer).ok());
    EXPECT_EQ(answer.state(), v1::TRANSFER_STATE_OPEN);
    EXPECT_EQ(answer.lease_ms(), 300);
    std::this_thread::sleep_for(milliseconds(100));
  }
  EXPECT_EQ(cluster.servers[0]->store().GetStatus(transfer)->state,
            TransferState::kExpired);  // nobody renewed it there
  EXPECT_TRUE(cluster.StoresEmptySoon());
  grpc::ClientContext context, state_context;
  EXPECT_TRUE(stub->RenewLease(&context, beat, &answer).ok());
  EXPECT_EQ(answer.state(), v1::TRANSFER_STATE_EXPIRED);
  v1::GetTransferStateRequest request;
  request.set_transfer_id(transfer);
  v1::GetTransferStateResponse state;
  EXPECT_TRUE(stub->GetTransferState(&state_context, request, &state).ok());
  EXPECT_EQ(state.state(), v1::TRANSFER_STATE_EXPIRED);
  EXPECT_EQ(state.bytes_held(), 0);
  EXPECT_THAT(state.reason(), HasSubstr("no sign of life for 300 ms"));
  EXPECT_THAT(ReadPages(cluster, 1, Request(transfer)).status,
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("expired")));
}

TEST(KvService, ClientKeepsLeasesAliveWhileItsConsumerIsSlow) {
  class SlowConsumer final : public KvConsumer {
   public:
    absl::Status OnManifest(const KvManifest&) override { return absl::OkStatus(); }
    absl::Status OnPage(const KvPageView& page) override {
      if (page.rank == 0 && page.layer == 2) std::this_thread::sleep_for(milliseconds(1200));
      return absl::OkStatus();
    }
  } consumer;
  Cluster::Options options = Cluster::Defaults();
  options.mesh = {2, 1};
  options.server.store.lease = milliseconds(300);
  Cluster cluster(options);
  std::string transfer;
  PrefillEvents events;
  events.on_accepted = [&](const AcceptedPrefill& a) { transfer = a.manifest.transfer_id; };
  LF_EXPECT_OK(cluster.Client()->Prefill(Ids(200), {}, &consumer, events));
  EXPECT_EQ(cluster.servers[1]->store().GetStatus(transfer)->state,
            TransferState::kComplete);  // read at once
}

TEST(KvService, ReaderThatTakesNothingIsCancelled) {
  Cluster::Options options = Cluster::Defaults();
  options.mesh = {1, 1};
  options.num_kv_heads = 4;
  options.head_dim = 64;
  options.server.kv.stall_limit = milliseconds(200);
  Cluster cluster(options);
  const std::string transfer = OpenTransfer(cluster, 20000);  // 120 MB: more than flow control lets out
  const auto stub = cluster.KvStub();
  grpc::ClientContext context;
  const auto stream = stub->ReadPages(&context, Request(transfer));
  KvStore& store = cluster.servers[0]->store();
  EXPECT_TRUE(Cluster::Soon([&] { return store.GetStatus(transfer)->active_readers == 1; }));
  EXPECT_TRUE(Cluster::Soon([&] { return store.GetStatus(transfer)->active_readers == 0; },
                            std::chrono::seconds(30)));
  v1::ReadPagesResponse response;
  while (stream->Read(&response)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EndEverywhere(cluster, transfer);
}

TEST(KvService, StreamsAreBounded) {
  Cluster::Options options = Cluster::Defaults();
  options.mesh = {1, 1};
  options.server.kv.max_streams = 1;
  Cluster cluster(options);
  cluster.group.HoldBeforeLayer(0);
  CheckingConsumer consumer;
  std::string transfer;
  std::atomic<bool> accepted = false;
  PrefillEvents events;
  events.on_accepted = [&](const AcceptedPrefill& a) {
    transfer = a.manifest.transfer_id;
    accepted = true;
  };
  auto prefill = std::async(std::launch::async,
                            [&] { return cluster.Client()->Prefill(Ids(9), {}, &consumer, events); });
  ASSERT_TRUE(Cluster::Soon([&] { return accepted.load(); }));
  ASSERT_TRUE(
      Cluster::Soon([&] { return cluster.servers[0]->store().GetStatus(transfer)->active_readers == 1; }));
  EXPECT_THAT(ReadPages(cluster, 0, Request(transfer)).status,
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("limit is 1")));
  cluster.group.Release();
  LF_EXPECT_OK(prefill.get());
}

// A rank that lies.
class LyingService final : public v1::KvService::Service {
 public:
  std::vector<v1::ReadPagesResponse> responses;
  grpc::Status status;
  std::vector<v1::TransferState> ends;

  grpc::Status ReadPages(grpc::ServerContext*, const v1::ReadPagesRequest*,
                         grpc::ServerWriter<v1::ReadPagesResponse>* writer) override {
    for (const auto& response : responses) writer->Write(response);
    return status;
  }
  grpc::Status EndTransfer(grpc::ServerContext*, const v1::EndTransferRequest* request,
                           v1::EndTransferResponse*) override {
    ends.push_back(request->outcome());
    return grpc::Status::OK;
  }
};

v1::KvPage Page(int64_t layer, int64_t token, int64_t num_tokens) {
  v1::KvPage page;
  page.set_layer(layer);
  page.set_num_heads(1);
  page.set_token_begin(token);
  page.set_num_tokens(num_tokens);
  page.set_key(std::string(static_cast<size_t>(num_tokens) * 8, 'k'));
  page.set_value(std::string(static_cast<size_t>(num_tokens) * 8, 'v'));
  page.set_key_crc32c(Crc32c(page.key().data(), static_cast<int64_t>(page.key().size())));
  page.set_value_crc32c(Crc32c(page.value().data(), static_cast<int64_t>(page.value().size())));
  return page;
}

TEST(KvFetchChecks, EveryLieOfARankIsDataLoss) {
  using Pages = std::vector<v1::KvPage>;
  const auto broken = [](auto change) {
    v1::KvPage page = Page(0, 0, 10);
    change(page);
    return page;
  };
  const struct {
    Pages pages;
    bool end;
    const char* message;  // empty: no error
  } cases[] = {
      {{Page(0, 0, 10), Page(0, 20, 5), Page(1, 0, 4), Page(1, 4, 6), Page(1, 20, 5)}, true, ""},
      {{Page(0, 0, 10), Page(0, 20, 5), Page(1, 0, 10)}, true, "the stream ended before layer 1, token 20"},
      {{Page(0, 0, 10), Page(0, 20, 5), Page(1, 0, 10), Page(1, 20, 5)}, false, "the stream ended before"},
      {{Page(0, 0, 10), Page(0, 0, 10)}, true, "out of order: token 20 of layer 0"},
      {{Page(0, 5, 5)}, true, "out of order: token 0 of layer 0"},
      {{Page(1, 0, 10)}, true, "out of order"},
      {{Page(0, 0, 11)}, true, "has 11 tokens, the range ends at 10"},
      {{Page(0, 0, 0)}, true, "has 0 tokens"},
      {{broken([](v1::KvPage& p) { p.mutable_key()->pop_back(); })}, true, "79 and 80 bytes instead of 80"},
      {{broken([](v1::KvPage& p) { (*p.mutable_key())[3] ^= 1; })}, true, "keys that do not match"},
      {{broken([](v1::KvPage& p) { (*p.mutable_value())[79] ^= 64; })}, true, "values that do not match"},
      {{broken([](v1::KvPage& p) { p.set_num_heads(2); })}, true, "out of order"},
      {{Page(0, 0, 10), Page(0, 20, 5), Page(1, 0, 10), Page(1, 20, 5), Page(1, 20, 5)},
       true,
       "after the last one"},
  };
  for (const auto& c : cases) {
    LyingService service;
    for (const v1::KvPage& page : c.pages) *service.responses.emplace_back().add_pages() = page;
    if (c.end) service.responses.emplace_back().mutable_end()->set_complete(true);
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service);
    const auto server = builder.BuildAndStart();
    KvManifest manifest{
        .transfer_id = "t", .num_tokens = 25, .num_layers = 2, .num_kv_heads = 1, .head_dim = 2};
    manifest.shards.push_back(
        {.rank = 0, .endpoint = absl::StrCat("127.0.0.1:", port), .token_ranges = {{0, 10}, {20, 25}}});
    class Nothing final : public KvConsumer {
     public:
      absl::Status OnManifest(const KvManifest&) override { return absl::OkStatus(); }
      absl::Status OnPage(const KvPageView&) override { return absl::OkStatus(); }
    } consumer;
    std::atomic<int> num_errors = 0;
    LF_ASSERT_OK_AND_ASSIGN(const auto fetch,
                            KvFetch::Start(manifest, "127.0.0.1:1", {}, &consumer, [&] { ++num_errors; }));
    const absl::Status status = fetch->Wait();
    if (*c.message == 0) {
      LF_EXPECT_OK(status);
    } else {
      EXPECT_THAT(status, StatusIs(absl::StatusCode::kDataLoss, HasSubstr(c.message)));
    }
    EXPECT_TRUE(Cluster::Soon([&] { return num_errors == (*c.message == 0 ? 0 : 1); }));
    LF_EXPECT_OK(fetch->End(status.ok() ? TransferState::kComplete : TransferState::kAborted, "test"));
    EXPECT_EQ(service.ends, std::vector<v1::TransferState>{status.ok() ? v1::TRANSFER_STATE_COMPLETE
                                                                       : v1::TRANSFER_STATE_ABORTED});
    server->Shutdown();
  }
}

TEST(KvFetchChecks, ManifestsThatContradictThemselvesAreDataLoss) {
  KvManifest good{.num_tokens = 25, .num_layers = 2, .num_kv_heads = 1, .head_dim = 2};
  good.shards = {{.rank = 0, .token_ranges = {{0, 10}, {20, 25}}}, {.rank = 1, .token_ranges = {{10, 20}}}};
  LF_EXPECT_OK(FromProto(ToProto(good, 1)));
  const auto with = [&](auto change) {
    KvManifest manifest = good;
    change(manifest);
    return FromProto(ToProto(manifest, 1));
  };
  EXPECT_THAT(with([](KvManifest& m) { m.shards[1].token_ranges[0].begin = 11; }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("token 10")));
  EXPECT_THAT(with([](KvManifest& m) { m.shards[1].token_ranges[0].end = 21; }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("token 21")));
  EXPECT_THAT(with([](KvManifest& m) { m.num_tokens = 26; }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("25 tokens of 26")));
  EXPECT_THAT(
      with([](KvManifest& m) { std::swap(m.shards[0].token_ranges[0], m.shards[0].token_ranges[1]); }),
      StatusIs(absl::StatusCode::kDataLoss, HasSubstr("out of order")));
  EXPECT_THAT(with([](KvManifest& m) { m.head_dim = 0; }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("size")));
}

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = testing::TempDir() + "longfill-XXXXXX";
    path = mkdtemp(name.data());
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path); }
  int64_t NumFiles() const {
    return std::distance(std::filesystem::directory_iterator(path), std::filesystem::directory_iterator());
  }
  std::string path;
};

TEST(Download, WritesWhatTheBatchJobWrites) {
  TemporaryDirectory out;
  Cluster cluster;
  const int64_t num_tokens = 300;
  LF_ASSERT_OK(
      DownloadToDirectory(*cluster.Client(), Ids(num_tokens), {.logits_positions = {7, 299}}, out.path));
  std::ifstream file(out.path + "/manifest.json");
  std::stringstream text;
  text << file.rdbuf();
  LF_ASSERT_OK_AND_ASSIGN(const KvManifest manifest, KvManifest::FromJson(text.str()));
  const ShardPlan plan({2, 2}, num_tokens);
  const std::vector<KvFile> want = BatchFiles(plan, 3, 2);
  ASSERT_EQ(manifest.files.size(), want.size());
  EXPECT_EQ(out.NumFiles(), static_cast<int64_t>(want.size()) + 2);
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(manifest.files[i].name, want[i].name);
    EXPECT_EQ(manifest.files[i].token_ranges, want[i].token_ranges);
    EXPECT_EQ(manifest.files[i].layer_begin, want[i].layer_begin);
    EXPECT_EQ(manifest.files[i].head_end, want[i].head_end);
    LF_ASSERT_OK_AND_ASSIGN(const auto tensors, SafetensorsFile::Open(out.path + "/" + want[i].name));
    const SafetensorsTensor* value = tensors->Find("value");
    ASSERT_NE(value, nullptr);
    const int64_t rows = plan.NumTokens(want[i].rank);
    EXPECT_EQ(value->shape, (std::vector<int64_t>{2, rows, 4}));
    float element;
    const int64_t row = rows - 1;
    std::memcpy(&element, value->bytes.data() + ((1 * rows + row) * 4 + 2) * 4, 4);
    EXPECT_EQ(element, FakeKvElement(false, want[i].layer_begin, 1,
                                     plan.TokenPositions(want[i].rank).Position(row), 2));
  }
  for (const KvShard& shard : manifest.shards) EXPECT_EQ(shard.endpoint, "");
  LF_ASSERT_OK_AND_ASSIGN(const auto logits, SafetensorsFile::Open(out.path + "/logits.safetensors"));
  EXPECT_EQ(logits->Find("logits")->shape, (std::vector<int64_t>{2, 32}));
  EXPECT_EQ(logits->Find("positions")->shape, (std::vector<int64_t>{2}));
}

TEST(Download, RemovesItsFilesAfterAnError) {
  TemporaryDirectory out;
  Cluster cluster;
  std::atomic<bool> wait_for_files = true;
  cluster.group.fail_layer = [&](int64_t layer) {
    if (layer < 2) return absl::OkStatus();
    const auto written = [&] { return out.NumFiles() >= 4 || !wait_for_files; };  // layer 0
    EXPECT_TRUE(Cluster::Soon(written));
    return absl::InternalError("layer 2 went wrong");
  };
  EXPECT_THAT(DownloadToDirectory(*cluster.Client(), Ids(600), {}, out.path),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("layer 2")));
  EXPECT_EQ(out.NumFiles(), 0);
  wait_for_files = false;
  EXPECT_THAT(DownloadToDirectory(*cluster.Client(), Ids(600), {}, out.path + "/missing"),
              testing::Not(IsOk()));
  EXPECT_TRUE(cluster.StoresEmptySoon());
}

TEST(Endpoints, WildcardsTakeTheTargetsHostAndForeignLoopbackIsRefused) {
  const struct {
    const char* endpoint;
    const char* target;
    const char* want;
  } cases[] = {{"0.0.0.0:5", "node7:1", "node7:5"},     {"[::]:5", "node7:1", "node7:5"},
               {":5", "[fe80::1]:1", "[fe80::1]:5"},    {"127.0.0.1:5", "localhost:1", "127.0.0.1:5"},
               {"10.0.0.2:5", "node7:1", "10.0.0.2:5"}, {"0.0.0.0:5", "127.0.0.1:1", "127.0.0.1:5"}};
  for (const auto& c : cases) {
    LF_ASSERT_OK_AND_ASSIGN(const std::string got, ResolveEndpoint(c.endpoint, c.target));
    EXPECT_EQ(got, c.want);
  }
  EXPECT_THAT(ResolveEndpoint("127.0.0.1:5", "node7:1"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("loopback of node7")));
  for (const char* text :
       {"", "host", "host:", "host:x", "host:70000", "a:b:1", "host:-1", "http://host:1"}) {
    EXPECT_THAT(ParseHostPort(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("HOST:PORT")))
        << text;
  }
}

TEST(Client, NobodyThereIsUnavailableWithinTheTimeout) {
  EXPECT_THAT(PrefillClient::Connect("127.0.0.1:9", {.connect_timeout = milliseconds(200)}),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("127.0.0.1:9")));
}

bool IsBlockedHere(int signal) {
  sigset_t mask;
  pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  return sigismember(&mask, signal) == 1;
}

// A handler in the middle of a product of oneDNN breaks the heap.
TEST(SignalWatching, SignalsBecomeCallsOnNoThreadThatComputesAndHandlersComeBack) {
  std::atomic<int> num_calls = 0;
  {
    LF_ASSERT_OK_AND_ASSIGN(const auto watch, SignalWatch::Start({SIGUSR1}, [&](int signal) {
                              EXPECT_EQ(signal, SIGUSR1);
                              ++num_calls;
                            }));
    EXPECT_THAT(SignalWatch::Start({SIGUSR2}, [](int) {}),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("already")));
    kill(getpid(), SIGUSR1);
    EXPECT_TRUE(Cluster::Soon([&] { return num_calls == 1; }));
    kill(getpid(), SIGUSR1);
    EXPECT_TRUE(Cluster::Soon([&] { return num_calls == 2; }));
    EXPECT_TRUE(IsBlockedHere(SIGUSR1));
    std::thread([] { EXPECT_TRUE(IsBlockedHere(SIGUSR1)); }).join();
  }
  struct sigaction after {};
  sigaction(SIGUSR1, nullptr, &after);
  EXPECT_EQ(after.sa_handler, SIG_DFL);
  EXPECT_FALSE(IsBlockedHere(SIGUSR1));
}

TEST(Logging, LinesAreJsonWhateverTheTextIs) {
  ConfigureLog(LogLevel::kInfo, 3);
  testing::internal::CaptureStderr();
  Log(LogLevel::kDebug, "hidden");
  Log(LogLevel::kWarning, "odd_text", {{"text", "a\"b\n\xff{}"}, {"count", 7}, {"share", 0.5}, {"ok", true}});
  const std::string line = testing::internal::GetCapturedStderr();
  ConfigureLog(LogLevel::kOff, 0);
  EXPECT_EQ(std::count(line.begin(), line.end(), '\n'), 1);
  EXPECT_THAT(line, HasSubstr(R"("level":"warning","rank":3,"event":"odd_text","text":"a\"b\n)"));
  EXPECT_THAT(line, HasSubstr(R"("count":7,"share":0.5,"ok":true})"));
}

}  // namespace
}  // namespace longfill
