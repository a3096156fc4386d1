#ifndef LONGFILL_RUNTIME_CLIENT_KV_FETCH_H_
#define LONGFILL_RUNTIME_CLIENT_KV_FETCH_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/status.h"
#include "runtime/client/kv_consumer.h"
#include "runtime/kv/transfer_state.h"

namespace longfill {

struct KvFetchOptions {
  int64_t message_bytes = int64_t{512} << 10;
  std::chrono::milliseconds lease{30000};  // as the manifest's message says
  // A prefill that fails ends its transfer, and a reader may hear of it before the prefill's own client, who
  // learns more: on_error waits so long after an error that a rank sent.
  std::chrono::milliseconds error_grace{2000};
  std::chrono::milliseconds end_timeout{5000};  // of EndTransfer on one rank
  // DeadlineExceeded for what has not come by then.
  std::chrono::system_clock::time_point deadline = std::chrono::system_clock::time_point::max();
};

// Reads a whole KV cache from all ranks at once, a thread and a connection for each, and keeps its leases
// alive. Every page is checked: CRC-32C, place, size, order; nothing twice, nothing missing. Create, Wait,
// End, in this order.
class KvFetch {
 public:
  // FailedPrecondition: an endpoint that cannot be reached from here by rule (endpoint.h); errors of
  // OnManifest. `on_error` is called once, from some thread, after the first error. `consumer` outlives the
  // fetch.
  static absl::StatusOr<std::unique_ptr<KvFetch>> Start(const KvManifest& manifest, const std::string& target,
                                                        const KvFetchOptions& options, KvConsumer* consumer,
                                                        std::function<void()> on_error);
  // Cancels what runs. If End was not called the leases run out by themselves.
  ~KvFetch();
  KvFetch(const KvFetch&) = delete;
  KvFetch& operator=(const KvFetch&) = delete;

  // Ends the streams early; Wait then returns `reason` unless an error was first. Thread-safe, does not
  // block.
  void Cancel(const absl::Status& reason);
  // Blocks until every stream has ended: OK if everything came and was taken.
  absl::Status Wait();
  // Ends the transfer on every rank (kComplete or kAborted). The error of the first rank that could not be
  // told; its lease runs out by itself.
  absl::Status End(TransferState outcome, const std::string& reason);

  int64_t bytes_received() const { return bytes_received_.load(); }

 private:
  struct Peer;
  KvFetch(const KvManifest& manifest, const KvFetchOptions& options, KvConsumer* consumer,
          std::function<void()> on_error);
  void ReadPeer(Peer& peer);
  // `remote`: whether the error is the rank's word, not found here.
  absl::Status ReadAll(Peer& peer, bool* remote);
  void Heartbeat();
  void RenewLeases(std::chrono::milliseconds timeout);
  void RecordError(const absl::Status& status, bool remote);

  const KvManifest manifest_;
  const KvFetchOptions options_;
  KvConsumer* const consumer_;
  const std::function<void()> on_error_;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::atomic<int64_t> bytes_received_ = 0;

  std::mutex mutex_;  // a leaf; on_error_ is called without it
  std::condition_variable changed_;
  absl::Status error_;
  std::chrono::steady_clock::time_point report_at_ = std::chrono::steady_clock::time_point::max();
  bool closing_ = false;
  std::thread heartbeat_;  // renews leases, reports errors
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_CLIENT_KV_FETCH_H_
