#ifndef LONGFILL_RUNTIME_SERVING_SERVER_H_
#define LONGFILL_RUNTIME_SERVING_SERVER_H_

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "kernels/base/status.h"
#include "runtime/kv/kv_store.h"
#include "runtime/serving/kv_service.h"
#include "runtime/serving/prefill_backend.h"
#include "runtime/serving/prefill_service.h"
#include "runtime/serving/scheduler.h"

namespace grpc {
class Server;
}

namespace longfill {

// Exit status of a rank whose group broke (a peer died or stopped): start the whole group anew.
inline constexpr int kExitPeerLost = 3;

struct ServerOptions {
  int rank = 0;
  // HOST:PORT of this rank's services; port 0: any free one. On rank 0 clients send prompts here.
  std::string listen = "127.0.0.1:0";
  std::string
      kv_listen;  // rank 0: a second address for KV pages, which the manifest then names; empty: `listen`
  // Host that the manifest names for this rank instead of the one listened at: needed where that is a
  // wildcard and ranks are on several hosts. Empty: as it is; clients put the host of rank 0 in place of a
  // wildcard.
  std::string advertise_host;
  SchedulerOptions scheduler;
  PrefillServiceOptions prefill;
  KvServiceOptions kv;
  KvStoreOptions store;
  std::chrono::milliseconds drain_grace{600000};    // for the prompt that computes
  std::chrono::milliseconds transfer_grace{60000};  // then for consumers of open transfers
};

// One rank of the service, in the order of its life:
//   Start        listens; health NOT_SERVING, prompts refused with UNAVAILABLE
//   Begin        the engine is there on all ranks and every rank's endpoint is known: SERVING
//   RequestDrain (SIGTERM) NOT_SERVING, new and waiting prompts UNAVAILABLE, the running one is finished,
//   then the other
//                ranks are released, then open transfers are waited for; a second call cuts all waits short
//   OnPeerLost   every client in flight gets UNAVAILABLE naming the rank, transfers fail, the group is
//   aborted Wait         returns when it is over
// Thread-safe but for the order Start, Begin, Wait.
class Server {
 public:
  // InvalidArgument: an address that cannot be listened at, naming it. Ports are never shared with another
  // process. `tier` is that of the KV store and outlives the server.
  static absl::StatusOr<std::unique_ptr<Server>> Start(ServerOptions options, KvTier* tier);
  // Only after Wait, and not when it returned Unavailable: then the engine may still hang in a collective,
  // and the process leaves by _exit(kExitPeerLost).
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  const std::string& listen_endpoint() const { return listen_endpoint_; }  // HOST:PORT bound
  const std::string& kv_endpoint() const { return kv_endpoint_; }  // as others should reach this rank's pages
  KvStore& store() { return store_; }

  // `backend` outlives the server. Rank 0 takes prompts from now on; other ranks take part in them.
  void Begin(PrefillBackend* backend, GroupInfo group);

  void RequestDrain();
  // `rank` is the lost one, -1 if it is not known. Never blocks for long; the first reason wins.
  void OnPeerLost(int rank, const absl::Status& reason);

  // Blocks until the service has ended and stopped listening: OK after a drain, Unavailable when the group
  // broke or a second request cut this rank off before rank 0 had released it.
  absl::Status Wait();

 private:
  class AdminService;
  enum class Phase { kLoading, kServing, kDraining, kBroken };

  Server(ServerOptions options, KvTier* tier);
  absl::Status Listen();
  void SetHealth(bool serving);
  void KeepHouse();
  void ServePeer();       // ranks other than 0
  void DrainScheduler();  // rank 0
  void WaitForRelease();  // ranks other than 0
  void WaitForTransfers();
  bool CutShort() const;
  void StopListening();

  const ServerOptions options_;
  KvStore store_;
  PrefillServiceImpl prefill_service_;
  KvServiceImpl kv_service_;
  std::unique_ptr<AdminService> admin_service_;
  std::string listen_endpoint_;
  std::string kv_endpoint_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();

  mutable std::mutex mutex_;  // before those of the services, the scheduler and the store
  std::condition_variable changed_;
  Phase phase_ = Phase::kLoading;
  int drain_requests_ = 0;
  bool group_ended_ = false;  // rank 0 has released this rank
  bool closing_ = false;
  absl::Status broken_;
  GroupInfo group_;
  PrefillBackend* backend_ = nullptr;
  std::unique_ptr<PrefillScheduler> scheduler_;  // rank 0, from Begin on
  std::unique_ptr<grpc::Server> grpc_server_;
  std::thread housekeeper_;
  std::thread peer_thread_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SERVING_SERVER_H_
