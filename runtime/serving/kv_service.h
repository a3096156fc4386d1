#ifndef LONGFILL_RUNTIME_SERVING_KV_SERVICE_H_
#define LONGFILL_RUNTIME_SERVING_KV_SERVICE_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "longfill/v1/kv.grpc.pb.h"
#include "runtime/kv/kv_page.h"
#include "runtime/kv/kv_store.h"

namespace longfill {

struct KvServiceOptions {
  int max_streams = 64;                          // ReadPages at once
  std::chrono::milliseconds stall_limit{60000};  // a reader that takes no message for so long is cancelled
};

// longfill.v1.KvService of one rank, over its store. A stream has a thread of gRPC, copies one message at a
// time out of the store and holds none of the store's memory while it waits for its reader; HTTP/2 flow
// control is the back-pressure.
class KvServiceImpl final : public v1::KvService::Service {
 public:
  using FindManifest =
      std::function<absl::StatusOr<std::shared_ptr<const v1::KvManifest>>(const std::string&)>;

  // `store` outlives the service.
  KvServiceImpl(KvServiceOptions options, KvStore* store);

  // Rank 0 gives where manifests are; the others leave it empty and name rank 0's endpoint.
  void Begin(FindManifest find_manifest, std::string rank0_endpoint);
  // Cancels streams whose reader stalls. Call about once a second.
  void Tick();
  // Ends all streams: the process is about to go.
  void CancelStreams();
  int active_streams() const { return active_streams_; }

  grpc::Status GetManifest(grpc::ServerContext* context, const v1::GetManifestRequest* request,
                           v1::KvManifest* response) override;
  grpc::Status ReadPages(grpc::ServerContext* context, const v1::ReadPagesRequest* request,
                         grpc::ServerWriter<v1::ReadPagesResponse>* writer) override;
  grpc::Status RenewLease(grpc::ServerContext* context, const v1::RenewLeaseRequest* request,
                          v1::RenewLeaseResponse* response) override;
  grpc::Status EndTransfer(grpc::ServerContext* context, const v1::EndTransferRequest* request,
                           v1::EndTransferResponse* response) override;
  grpc::Status GetTransferState(grpc::ServerContext* context, const v1::GetTransferStateRequest* request,
                                v1::GetTransferStateResponse* response) override;

 private:
  class PageStream;

  const KvServiceOptions options_;
  KvStore* const store_;
  std::atomic<int> active_streams_ = 0;
  mutable std::mutex mutex_;
  FindManifest find_manifest_;
  std::string rank0_endpoint_;
  std::set<PageStream*> streams_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SERVING_KV_SERVICE_H_
