#include "runtime/serving/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "longfill/v1/admin.grpc.pb.h"
#include "runtime/client/convert.h"
#include "runtime/client/endpoint.h"
#include "runtime/observe/log.h"

namespace longfill {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kTick{500};
constexpr milliseconds kSlice{100};
constexpr milliseconds kFlushGrace{1000};  // for terminal events that are on their way
constexpr int kMaxThreads = 256;
constexpr int kMaxMessageBytes = 4 << 20;
constexpr const char* kServiceNames[] = {"", "longfill.v1.PrefillService", "longfill.v1.KvService",
                                         "longfill.v1.AdminService"};

// Process-wide switches of gRPC, before the first server.
void EnableGrpcPlugins() {
  static const bool done = [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    return true;
  }();
  (void)done;
}

}  // namespace

class Server::AdminService final : public v1::AdminService::Service {
 public:
  explicit AdminService(const Server* server) : server_(server) {}

  grpc::Status GetServerStatus(grpc::ServerContext*, const v1::GetServerStatusRequest*,
                               v1::ServerStatus* response) override {
    {
      std::lock_guard lock(server_->mutex_);
      response->set_phase(static_cast<v1::ServerPhase>(static_cast<int>(server_->phase_) + 1));
      response->set_instance_epoch(server_->group_.instance_epoch);
      response->set_server_version(server_->group_.server_version);
      for (size_t rank = 0; rank < server_->group_.kv_endpoints.size(); ++rank) {
        v1::RankStatus* to = response->add_ranks();
        to->set_rank(static_cast<int>(rank));
        to->set_kv_endpoint(server_->group_.kv_endpoints[rank]);
      }
      if (server_->scheduler_ != nullptr) FillQueue(server_->scheduler_->status(), response);
    }
    response->set_uptime_seconds(
        std::chrono::duration<double>(steady_clock::now() - server_->started_).count());
    response->set_queue_capacity(server_->options_.scheduler.queue_capacity);
    const KvStoreUsage usage = server_->store_.usage();
    response->set_open_transfers(static_cast<int>(usage.open_transfers));
    response->set_kv_bytes_held(usage.bytes_open);
    response->set_kv_bytes_lingering(usage.bytes_lingering);
    return grpc::Status::OK;
  }

 private:
  static void FillQueue(const SchedulerStatus& status, v1::ServerStatus* response) {
    response->set_queue_length(status.queue_length);
    response->set_prompts_done(status.prompts_done);
    response->set_prompts_failed(status.prompts_failed);
    if (status.running_request_id.empty()) return;
    v1::RunningRequest* running = response->mutable_running();
    running->set_request_id(status.running_request_id);
    running->set_num_tokens(status.progress.total_tokens);
    running->set_processed_tokens(status.progress.processed_tokens);
    running->set_seconds(status.progress.seconds);
  }

  const Server* const server_;
};

namespace {

ServerOptions WithDefaults(ServerOptions options) {
  if (options.prefill.max_calls == 0) options.prefill.max_calls = options.scheduler.queue_capacity + 16;
  return options;
}

}  // namespace

Server::Server(ServerOptions options, KvTier* tier)
    : options_(WithDefaults(std::move(options))),
      store_(options_.store, tier),
      prefill_service_(options_.prefill, &store_),
      kv_service_(options_.kv, &store_),
      admin_service_(std::make_unique<AdminService>(this)) {}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(ServerOptions options, KvTier* tier) {
  std::unique_ptr<Server> server(new Server(std::move(options), tier));
  LF_RETURN_IF_ERROR(server->Listen());
  server->SetHealth(false);
  server->housekeeper_ = std::thread([raw = server.get()] { raw->KeepHouse(); });
  return server;
}

absl::Status Server::Listen() {
  EnableGrpcPlugins();
  LF_ASSIGN_OR_RETURN(const HostPort at, ParseHostPort(options_.listen));
  grpc::ServerBuilder builder;
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // two servers on one port would share its clients
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10000);
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  grpc::ResourceQuota quota("longfill");
  builder.SetResourceQuota(quota.SetMaxThreads(kMaxThreads));
  int port = 0;
  int kv_port = 0;
  builder.AddListeningPort(options_.listen, grpc::InsecureServerCredentials(), &port);
  HostPort kv_at = at;
  const bool second = options_.rank == 0 && !options_.kv_listen.empty();
  if (second) {
    LF_ASSIGN_OR_RETURN(kv_at, ParseHostPort(options_.kv_listen));
    builder.AddListeningPort(options_.kv_listen, grpc::InsecureServerCredentials(), &kv_port);
  }
  builder.RegisterService(&kv_service_);
  if (options_.rank == 0) {
    builder.RegisterService(&prefill_service_);
    builder.RegisterService(admin_service_.get());
  }
  grpc_server_ = builder.BuildAndStart();
  if (grpc_server_ == nullptr || port == 0 || (second && kv_port == 0)) {
    return absl::InvalidArgumentError(absl::StrCat("cannot listen at ", options_.listen,
                                                   second ? absl::StrCat(" and ", options_.kv_listen) : "",
                                                   ": the address is in use or not of this host"));
  }
  listen_endpoint_ = absl::StrCat(at.host, ":", port);
  const std::string& kv_host = options_.advertise_host.empty() ? kv_at.host : options_.advertise_host;
  kv_endpoint_ = absl::StrCat(kv_host, ":", second ? kv_port : port);
  return absl::OkStatus();
}

Server::~Server() {
  StopListening();
  scheduler_.reset();
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  if (housekeeper_.joinable()) housekeeper_.join();
  if (peer_thread_.joinable()) peer_thread_.join();
}

void Server::SetHealth(bool serving) {
  grpc::HealthCheckServiceInterface* health = grpc_server_->GetHealthCheckService();
  for (const char* name : kServiceNames) {
    const bool here = options_.rank == 0 || std::string_view(name).empty() ||
                      std::string_view(name) == v1::KvService::service_full_name();
    if (here) health->SetServingStatus(name, serving);
  }
}

void Server::KeepHouse() {
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, kTick, [this] { return closing_; })) {
    lock.unlock();
    if (const int64_t expired = store_.ExpireLeases(); expired > 0) {
      Log(LogLevel::kWarning, "transfers_expired", {{"count", expired}});
    }
    prefill_service_.Tick();
    kv_service_.Tick();
    lock.lock();
  }
}

void Server::Begin(PrefillBackend* backend, GroupInfo group) {
  const std::string rank0 = group.kv_endpoints.empty() ? std::string() : group.kv_endpoints.front();
  Log(LogLevel::kInfo, "serving",
      {{"listen", listen_endpoint_}, {"kv", kv_endpoint_}, {"epoch", group.instance_epoch}});
  if (options_.rank != 0) {
    std::lock_guard lock(mutex_);
    if (!broken_.ok()) return;
    backend_ = backend;
    group_ = std::move(group);
    phase_ = Phase::kServing;
    kv_service_.Begin(nullptr, rank0);
    peer_thread_ = std::thread([this] { ServePeer(); });
  } else {
    auto scheduler =
        std::make_unique<PrefillScheduler>(backend, store_.MakeSinkFactory(), options_.scheduler,
                                           [this](const absl::Status& reason) { OnPeerLost(-1, reason); });
    PrefillScheduler* const raw = scheduler.get();
    {
      std::lock_guard lock(mutex_);
      backend_ = backend;
      scheduler_ = std::move(scheduler);
      group_ = group;
      if (!broken_.ok()) return;
      phase_ = Phase::kServing;
    }
    kv_service_.Begin([this](const std::string& id) { return prefill_service_.FindManifest(id); }, rank0);
    prefill_service_.Begin(backend, raw, std::move(group));
  }
  SetHealth(true);
}

void Server::ServePeer() {
  const auto should_stop = [this] {
    std::lock_guard lock(mutex_);
    return broken_;
  };
  const auto on_done = [](const absl::Status& outcome) {
    Log(outcome.ok() ? LogLevel::kDebug : LogLevel::kWarning, "prefill_part_done",
        {{"code", absl::StatusCodeToString(outcome.code())}, {"message", std::string(outcome.message())}});
  };
  const absl::Status status = backend_->Serve(store_.MakeSinkFactory(), should_stop, on_done);
  if (!status.ok()) {
    OnPeerLost(-1, absl::UnavailableError(absl::StrCat("the group of ranks is broken: ", status.message())));
  }
  {
    std::lock_guard lock(mutex_);
    group_ended_ = true;
  }
  changed_.notify_all();
}

void Server::RequestDrain() {
  {
    std::lock_guard lock(mutex_);
    ++drain_requests_;
  }
  changed_.notify_all();
}

// Called by threads that must not wait, the watchdog's and the scheduler's.
void Server::OnPeerLost(int rank, const absl::Status& status) {
  absl::Status reason = status;
  if (rank >= 0) reason.SetPayload(kLostRankPayload, absl::Cord(absl::StrCat(rank)));
  PrefillScheduler* scheduler;
  PrefillBackend* backend;
  {
    std::lock_guard lock(mutex_);
    if (!broken_.ok() || closing_) return;
    broken_ = reason;
    phase_ = Phase::kBroken;
    scheduler = scheduler_.get();
    backend = backend_;
  }
  // Clients first: they are promised an answer within half a second.
  if (scheduler != nullptr) scheduler->Break(reason);
  prefill_service_.Refuse(reason);
  store_.FailAll(reason);
  SetHealth(false);
  if (backend != nullptr) backend->Abort(reason);
  Log(LogLevel::kError, "group_broken", {{"message", std::string(reason.message())}});
  changed_.notify_all();
}

bool Server::CutShort() const {
  std::lock_guard lock(mutex_);
  return drain_requests_ > 1 || !broken_.ok();
}

void Server::DrainScheduler() {
  prefill_service_.Refuse(absl::UnavailableError("the server is draining; send the prompt to another one"));
  PrefillScheduler* scheduler;
  {
    std::lock_guard lock(mutex_);
    scheduler = scheduler_.get();
  }
  if (scheduler == nullptr) return;
  scheduler->Drain();
  const auto deadline = steady_clock::now() + options_.drain_grace;
  while (!scheduler->WaitIdle(steady_clock::now() + kSlice)) {
    if (CutShort() || steady_clock::now() >= deadline) break;
  }
  {
    std::lock_guard lock(mutex_);
    if (!broken_.ok()) return;
  }
  if (absl::Status status = scheduler->Stop(); !status.ok()) {
    Log(LogLevel::kError, "release_of_ranks_failed", {{"message", std::string(status.message())}});
  }
}

// A rank that rank 0 has not released still sits in the engine; leaving it breaks the group.
void Server::WaitForRelease() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return group_ended_ || drain_requests_ > 1 || !broken_.ok(); });
  if (backend_ == nullptr || changed_.wait_for(lock, kFlushGrace, [this] { return group_ended_; })) return;
  if (broken_.ok()) {
    broken_ = absl::UnavailableError("a second signal ended this rank before rank 0 released it");
    phase_ = Phase::kBroken;
  }
}

void Server::WaitForTransfers() {
  const auto deadline = steady_clock::now() + options_.transfer_grace;
  while (!CutShort() && steady_clock::now() < deadline) {
    if (store_.WaitUntilNoneOpen(std::min(steady_clock::now() + kSlice, deadline))) break;
  }
  store_.FailAll(absl::UnavailableError("the server has ended"));
}

absl::Status Server::Wait() {
  {
    std::unique_lock lock(mutex_);
    // Rank 0 decides when the group ends; a drain request of another rank only changes its health.
    changed_.wait(lock, [this] { return drain_requests_ > 0 || group_ended_ || !broken_.ok(); });
    if (broken_.ok()) phase_ = Phase::kDraining;
  }
  Log(LogLevel::kInfo, "draining");
  SetHealth(false);
  if (options_.rank == 0) {
    DrainScheduler();
  } else {
    WaitForRelease();
  }
  WaitForTransfers();
  StopListening();
  Log(LogLevel::kInfo, "ended");
  std::lock_guard lock(mutex_);
  return broken_;
}

void Server::StopListening() {
  if (grpc_server_ == nullptr) return;
  grpc_server_->Shutdown(std::chrono::system_clock::now() + kFlushGrace);
  grpc_server_->Wait();
}

}  // namespace longfill
