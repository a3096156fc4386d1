#ifndef LONGFILL_RUNTIME_CLIENT_PREFILL_CLIENT_H_
#define LONGFILL_RUNTIME_CLIENT_PREFILL_CLIENT_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "runtime/client/cancellation.h"
#include "runtime/client/kv_consumer.h"
#include "runtime/engine/attention_spec.h"
#include "runtime/engine/memory_plan.h"
#include "runtime/engine/prefill_engine.h"
#include "runtime/kv/kv_manifest.h"

namespace longfill {

struct ClientOptions {
  std::chrono::milliseconds connect_timeout{10000};
  int64_t ids_per_message = 16384;
  int64_t page_message_bytes = int64_t{512} << 10;
};

// What is asked of the service for one prompt.
struct SubmitOptions {
  std::string request_id;   // empty: the service chooses
  AttentionSpec attention;  // read here: the service opens no file for a client
  Coverage coverage = Coverage::kTiles;
  std::vector<int64_t> logits_positions;  // empty: the last
  std::optional<DType> kv_dtype;          // empty: what the service computes in
  std::optional<RecallOptions> recall;    // empty: what the service was started with
  std::chrono::milliseconds timeout{0};   // of the whole prefill; 0: none
};

struct AcceptedPrefill {
  KvManifest manifest;
  std::string attention;   // what was resolved
  MemoryPlan memory_plan;  // of the largest rank
  double queue_seconds = 0;
};

// Any may be empty. Called from the thread that called Prefill.
struct PrefillEvents {
  std::function<void(int position)> on_queued;  // 0: next
  std::function<void(const AcceptedPrefill&)> on_accepted;
  std::function<void(const PrefillProgress&)> on_progress;
};

struct Prefilled {
  KvManifest manifest;
  std::string attention;
  std::vector<int64_t> positions;
  int64_t vocab_size = 0;
  std::vector<float> logits;  // [positions.size(), vocab_size]
  PrefillFigures figures;
  int64_t kv_bytes_received = 0;
  double kv_seconds = 0;  // from the acceptance to the last page; under figures.seconds plus a little
};

// More than the status says, where the service said it.
struct PrefillRefusal {
  std::chrono::milliseconds retry_after{0};  // 0: repeating is no use
  int64_t max_tokens = 0;                    // 0: length is not the trouble
};

struct ModelFacts {
  std::string architecture;
  std::string model_fingerprint;
  int64_t num_layers = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_tokens = 0;
  Mesh mesh;
  std::string default_attention;
  std::string instance_epoch;
};

// A connection to rank 0 of a service. Thread-safe: prompts may be sent from several threads.
class PrefillClient {
 public:
  // HOST:PORT. InvalidArgument for another form, Unavailable if nobody answers within connect_timeout.
  static absl::StatusOr<std::unique_ptr<PrefillClient>> Connect(const std::string& target,
                                                                const ClientOptions& options = {});
  ~PrefillClient();

  absl::StatusOr<ModelFacts> GetModelInfo();

  // Sends the prompt and waits for the result. With a consumer the KV cache is fetched while it is computed,
  // straight from every rank; its transfer is ended as complete when the consumer has everything, as aborted
  // otherwise. Without one it is ended unread, at once. Errors are the service's, or the consumer's;
  // Cancelled after cancellation->Cancel(). `refusal`, if not null, is filled where the service said more.
  absl::StatusOr<Prefilled> Prefill(std::span<const int32_t> ids, const SubmitOptions& options,
                                    KvConsumer* consumer, const PrefillEvents& events = {},
                                    Cancellation* cancellation = nullptr, PrefillRefusal* refusal = nullptr);

  // Fetches the KV cache of a transfer that another client began, and ends it.
  absl::StatusOr<KvManifest> FetchKv(const std::string& transfer_id, KvConsumer* consumer,
                                     Cancellation* cancellation = nullptr);

 private:
  struct Impl;
  explicit PrefillClient(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Prefills and writes what `longfill prefill` writes: kv-layer-LLL-rank-RRR.safetensors while they arrive,
// then logits.safetensors, last manifest.json. The directory exists. After an error the files that it wrote
// are removed.
absl::StatusOr<Prefilled> DownloadToDirectory(PrefillClient& client, std::span<const int32_t> ids,
                                              const SubmitOptions& options, const std::string& directory,
                                              const PrefillEvents& events = {},
                                              Cancellation* cancellation = nullptr,
                                              PrefillRefusal* refusal = nullptr);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_CLIENT_PREFILL_CLIENT_H_
