#ifndef LONGFILL_RUNTIME_SERVING_PREFILL_SERVICE_H_
#define LONGFILL_RUNTIME_SERVING_PREFILL_SERVICE_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "longfill/v1/prefill.grpc.pb.h"
#include "runtime/kv/kv_store.h"
#include "runtime/serving/prefill_backend.h"
#include "runtime/serving/scheduler.h"

namespace longfill {

class PrefillCall;

// What all ranks agreed on when the service started.
struct GroupInfo {
  int rank = 0;
  std::string instance_epoch;
  std::vector<std::string> kv_endpoints;  // of ranks 0, 1, ...
  std::string server_version;
};

struct PrefillServiceOptions {
  int max_calls = 0;  // uploading, waiting and computing together; 0: the queue and 16 more
  std::chrono::milliseconds upload_idle_limit{60000};  // between two messages of a prompt
  RecallOptions recall;                                // of requests that say nothing of it
};

// longfill.v1.PrefillService on rank 0. A call is a PrefillCall, which reacts to gRPC and to the scheduler;
// no thread waits for a client. Until Begin, and after Refuse, calls end with that status.
class PrefillServiceImpl final
    : public v1::PrefillService::WithCallbackMethod_Prefill<v1::PrefillService::Service> {
 public:
  PrefillServiceImpl(PrefillServiceOptions options, KvStore* store);
  ~PrefillServiceImpl() override;

  // Pointers outlive the last call.
  void Begin(const PrefillBackend* backend, PrefillScheduler* scheduler, GroupInfo group);
  // From now on new calls and those that still upload end with `reason`. Those that wait or compute are the
  // scheduler's.
  void Refuse(const absl::Status& reason);
  // Ends uploads that stand still and forgets manifests of ended transfers. Call about once a second.
  void Tick();

  // NotFound for an unknown or ended transfer.
  absl::StatusOr<std::shared_ptr<const v1::KvManifest>> FindManifest(const std::string& transfer_id) const;

  grpc::ServerBidiReactor<v1::PrefillRequest, v1::PrefillEvent>* Prefill(
      grpc::CallbackServerContext* context) override;
  grpc::Status GetModelInfo(grpc::ServerContext* context, const v1::GetModelInfoRequest* request,
                            v1::ModelInfo* response) override;

 private:
  friend class PrefillCall;
  std::vector<std::shared_ptr<PrefillCall>> Calls() const;
  void Forget(PrefillCall* call);
  // Builds and remembers the manifest of an accepted request.
  std::shared_ptr<const v1::KvManifest> AddManifest(const PrefillRequest& request,
                                                    const std::vector<std::string>& token_hashes);

  const PrefillServiceOptions options_;
  KvStore* const store_;
  mutable std::mutex mutex_;  // no call, scheduler or backend is called under it
  absl::Status refuse_;
  const PrefillBackend* backend_ = nullptr;  // set once by Begin, before refuse_ becomes OK
  PrefillScheduler* scheduler_ = nullptr;
  GroupInfo group_;
  std::map<PrefillCall*, std::shared_ptr<PrefillCall>> calls_;
  std::map<std::string, std::shared_ptr<const v1::KvManifest>> manifests_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SERVING_PREFILL_SERVICE_H_
