#ifndef LONGFILL_TESTS_UNIT_RUNTIME_SERVICE_CLUSTER_H_
#define LONGFILL_TESTS_UNIT_RUNTIME_SERVICE_CLUSTER_H_

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/memory.h"
#include "longfill/v1/admin.grpc.pb.h"
#include "longfill/v1/kv.grpc.pb.h"
#include "longfill/v1/prefill.grpc.pb.h"
#include "runtime/client/channel.h"
#include "runtime/client/prefill_client.h"
#include "runtime/observe/log.h"
#include "runtime/serving/server.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/runtime/fake_backend.h"

namespace longfill {

inline std::vector<int32_t> Ids(int64_t count) {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 7 % 32);
  return ids;
}

// A service of several ranks in this process over a fake group, each with its own server on loopback.
class Cluster {
 public:
  struct Options {
    Mesh mesh{2, 2};
    int64_t num_layers = 3;
    int64_t num_kv_heads = 2;
    int64_t head_dim = 4;
    int64_t max_tokens = 1 << 21;
    int64_t vocab_size = 32;
    DType compute_dtype = DType::kFloat32;
    ServerOptions server;
    int64_t ring_bytes = 0;  // of a reader tier; 0: pages stay in memory
    bool begin = true;
  };
  static Options Defaults() {
    Options options;
    options.server.transfer_grace = std::chrono::milliseconds(5000);
    options.server.drain_grace = std::chrono::milliseconds(10000);
    return options;
  }

  explicit Cluster(const Options& options = Defaults())
      : group({.architecture = "FakeForCausalLM",
               .model_fingerprint = "f00d",
               .num_layers = options.num_layers,
               .num_q_heads = options.num_kv_heads * 2,
               .num_kv_heads = options.num_kv_heads,
               .head_dim = options.head_dim,
               .vocab_size = options.vocab_size,
               .max_position_embeddings = options.max_tokens,
               .compute_dtype = options.compute_dtype,
               .mesh = options.mesh,
               .default_attention = "dense"}) {
    ConfigureLog(LogLevel::kOff, 0);
    for (int rank = 0; rank < options.mesh.size(); ++rank) {
      ServerOptions server_options = options.server;
      server_options.rank = rank;
      memory.push_back(std::make_unique<CpuMemoryResource>());
      tiers.push_back(options.ring_bytes > 0 ? MakeReaderTier(memory.back().get(), options.ring_bytes)
                                             : MakeMemoryTier(memory.back().get()));
      auto server = Server::Start(server_options, tiers.back().get());
      EXPECT_THAT(server, IsOk());
      if (!server.ok()) std::abort();
      endpoints.push_back((*server)->kv_endpoint());
      servers.push_back(*std::move(server));
    }
    if (options.begin) Begin();
  }

  void Begin() {
    for (size_t rank = 0; rank < servers.size(); ++rank) {
      servers[rank]->Begin(group.rank(static_cast<int>(rank)), {.rank = static_cast<int>(rank),
                                                                .instance_epoch = "epoch-1",
                                                                .kv_endpoints = endpoints,
                                                                .server_version = "test"});
    }
    begun_ = true;
  }

  // Drains and waits for all ranks; every store must be empty.
  absl::Status End() {
    ended_ = true;
    group.Release();
    servers[0]->RequestDrain();
    if (!begun_) {
      for (size_t rank = 1; rank < servers.size(); ++rank) {
        servers[rank]->RequestDrain();
        servers[rank]->RequestDrain();
      }
    }
    absl::Status first;
    for (const auto& server : servers) {
      if (const absl::Status status = server->Wait(); first.ok()) first = status;
    }
    ExpectStoresEmpty();
    return first;
  }

  ~Cluster() {
    if (!ended_) {
      EXPECT_THAT(End(), IsOk());
    }
    group.ignore_stop = false;
    group.Release();
  }

  void ExpectStoresEmpty() {
    for (size_t rank = 0; rank < servers.size(); ++rank) {
      const KvStoreUsage usage = servers[rank]->store().usage();
      EXPECT_EQ(usage.open_transfers, 0) << "rank " << rank;
      EXPECT_EQ(usage.bytes_open + usage.bytes_lingering, 0) << "rank " << rank;
      EXPECT_EQ(memory[rank]->bytes_in_use(), 0) << "rank " << rank;
    }
  }
  // The same, soon: cancellation travels in its own time.
  bool StoresEmptySoon() {
    return Soon([&] {
      for (size_t rank = 0; rank < servers.size(); ++rank) {
        if (memory[rank]->bytes_in_use() > 0 || servers[rank]->store().usage().open_transfers > 0)
          return false;
      }
      return true;
    });
  }

  static bool Soon(const std::function<bool()>& condition,
                   std::chrono::milliseconds limit = std::chrono::seconds(5)) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (!condition()) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return true;
  }

  const std::string& target() const { return servers[0]->listen_endpoint(); }
  std::unique_ptr<PrefillClient> Client(const ClientOptions& options = {}) {
    auto client = PrefillClient::Connect(target(), options);
    EXPECT_THAT(client, IsOk());
    return *std::move(client);
  }
  std::unique_ptr<v1::PrefillService::Stub> PrefillStub() {
    return v1::PrefillService::NewStub(MakeChannel(target()));
  }
  std::unique_ptr<v1::KvService::Stub> KvStub(size_t rank = 0) {
    return v1::KvService::NewStub(MakeChannel(endpoints[rank]));
  }
  v1::ServerStatus Status() {
    v1::ServerStatus status;
    grpc::ClientContext context;
    EXPECT_TRUE(
        v1::AdminService::NewStub(MakeChannel(target()))->GetServerStatus(&context, {}, &status).ok());
    return status;
  }

  FakeGroup group;
  std::vector<std::unique_ptr<CpuMemoryResource>> memory;
  std::vector<std::unique_ptr<KvTier>> tiers;
  std::vector<std::unique_ptr<Server>> servers;
  std::vector<std::string> endpoints;

 private:
  bool begun_ = false;
  bool ended_ = false;
};

// Checks every element against FakeKvElement and counts (layer, token).
class CheckingConsumer : public KvConsumer {
 public:
  absl::Status OnManifest(const KvManifest& manifest) override {
    manifest_ = manifest;
    return absl::OkStatus();
  }
  absl::Status OnPage(const KvPageView& page) override {
    const int64_t dim = manifest_.head_dim;
    for (const bool key : {true, false}) {
      std::vector<float> got(static_cast<size_t>(page.num_heads * page.num_tokens * dim));
      WidenToFloat((key ? page.key : page.value).data(), manifest_.dtype, static_cast<int64_t>(got.size()),
                   got.data());
      size_t next = 0;
      for (int64_t head = 0; head < page.num_heads; ++head) {
        for (int64_t token = 0; token < page.num_tokens; ++token) {
          for (int64_t i = 0; i < dim; ++i, ++next) {
            const float want = FakeKvElement(key, page.layer, head, page.token_begin + token, i);
            const float limit = manifest_.dtype == DType::kFloat32 ? 0 : want / 128;
            if (std::abs(got[next] - want) > limit) {
              return absl::DataLossError(
                  absl::StrCat("wrong at layer ", page.layer, " token ", page.token_begin + token));
            }
          }
        }
      }
    }
    std::lock_guard lock(mutex_);
    for (int64_t token = 0; token < page.num_tokens; ++token) ++seen_[{page.layer, page.token_begin + token}];
    tokens_of_layer_[page.layer] += page.num_tokens;
    return absl::OkStatus();
  }
  int64_t TokensOfLayer(int64_t layer) {
    std::lock_guard lock(mutex_);
    return tokens_of_layer_[layer];
  }
  void ExpectEverythingOnce(int64_t num_layers, int64_t num_tokens) {
    EXPECT_EQ(static_cast<int64_t>(seen_.size()), num_layers * num_tokens);
    for (const auto& [place, count] : seen_) {
      EXPECT_EQ(count, 1) << "layer " << place.first << " token " << place.second;
    }
  }

 private:
  KvManifest manifest_;
  std::mutex mutex_;
  std::map<std::pair<int64_t, int64_t>, int> seen_;
  std::map<int64_t, int64_t> tokens_of_layer_;
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_UNIT_RUNTIME_SERVICE_CLUSTER_H_
