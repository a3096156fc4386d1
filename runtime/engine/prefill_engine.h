#ifndef LONGFILL_RUNTIME_ENGINE_PREFILL_ENGINE_H_
#define LONGFILL_RUNTIME_ENGINE_PREFILL_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"
#include "models/config.h"
#include "models/recall_guard.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "parallel/sparse_index_builder.h"
#include "runtime/engine/attention_spec.h"
#include "runtime/engine/device_communicator.h"
#include "runtime/engine/engine_device.h"
#include "runtime/engine/memory_plan.h"
#include "runtime/kv/kv_exporter.h"
#include "runtime/kv/kv_sink.h"

namespace longfill {

// A model without a checkpoint: weights drawn on the device from a seed. For measurements.
struct BenchModel {
  ModelConfig config;
  uint64_t seed = 0;
};

// Indices that attention runs with in place of those that were just built, which are dropped. For
// measurements of models whose own selections mean nothing. Every rank has an equal one; used by one engine
// at a time.
class IndexReplacement {
 public:
  virtual ~IndexReplacement() = default;
  // What Begin takes from backend.memory().
  virtual int64_t PlanBytes(int64_t num_tokens) const = 0;
  // Before the first layer of a prompt; whatever the outcome, End follows.
  virtual absl::Status Begin(Backend& backend, int64_t num_tokens) = 0;
  // Puts its own views and pair counts into *index, valid until End. Enqueues on backend.stream().
  virtual absl::Status Replace(int64_t layer, LayerIndex* index) = 0;
  virtual void End() = 0;
};

enum class WeightPlacement : uint8_t {
  kReplicated,  // every rank has all weights
  kSharded,     // every rank keeps its share of each layer (models/sharded_weights.h); one rank: all
};
inline bool ShardsWeights(WeightPlacement placement, const Mesh& mesh) {
  return placement == WeightPlacement::kSharded && mesh.size() > 1;
}

struct EngineOptions {
  std::string model_dir;
  std::optional<BenchModel> bench_model;  // instead of model_dir
  Mesh mesh;                              // mesh.size() == communicator size
  WeightPlacement weights = WeightPlacement::kReplicated;

  DeviceOptions device;
  DeviceCommunicatorOptions communicator;
  AttentionDefaults attention;  // model_patterns is filled by Create
  KvTierOptions kv_tier;        // what keeps K and V: counts in the memory plan
  KvExportOptions kv_export;
  // Of this rank's device (on the CPU: of the host); 0: what is available when a request comes.
  int64_t memory_limit_bytes = 0;
  std::shared_ptr<IndexReplacement> index_replacement;  // empty: indices are used as they are built
};

// One prompt. Only rank 0's request counts; the engine sends it to the others.
struct PrefillRequest {
  std::string request_id;
  std::string transfer_id;
  std::vector<int32_t> token_ids;
  AttentionSpec attention;
  Coverage coverage = Coverage::kTiles;
  std::vector<int64_t> logits_positions;  // in the order asked; empty: the last position
  DType kv_dtype = DType::kFloat32;
  RecallOptions recall;  // without min_recall where there is an EngineOptions::index_replacement
};

struct PrefillProgress {
  int64_t total_tokens = 0;
  int64_t processed_tokens = 0;  // total_tokens * finished share of the work in layers, rounded down
  int64_t layers_done = 0;
  int64_t num_layers = 0;
  double seconds = 0;  // since the request was accepted
};

// What the recall monitor saw of a prompt (parallel/recall_monitor.h). Layers whose heads all see every key
// count as 1.
struct RecallFigures {
  int64_t rows = 0;       // sampled, of each head; 0: nobody watched
  double min_recall = 0;  // RecallOptions::min_recall
  double mean = 1;        // over layers and heads, after recomputation
  double min = 1;         // of the least of them, and which it is
  int64_t min_layer = 0, min_head = 0;
  int64_t recomputed = 0;  // heads, of all layers
  // What watching cost: seconds of the slowest rank, and (row, key) pairs that it multiplied over those of
  // attention.
  double seconds = 0;
  double pair_share = 0;
  std::vector<LayerRecall> layers;
};

// What was measured; the fields of `longfill prefill --json`. Times are of the slowest rank for each part.
struct PrefillFigures {
  int64_t tokens = 0;
  int ranks = 0;
  Mesh mesh;
  std::string attention;  // what "auto" resolved to, and how many heads_without_room there are, if any
  int64_t heads_without_room = 0;  // of all layers, see AttentionSpec::dense_without_room
  double seconds = 0;
  double index_seconds = 0;
  double attention_seconds = 0;
  double linear_seconds = 0;  // gemm_seconds and other_seconds
  double gemm_seconds = 0;
  double other_seconds = 0;                  // norms, rotary, activations, embedding, copies on the device
  double communication_seconds = 0;          // exchanges between ranks with their copies, waiting for peers
  double exposed_communication_seconds = 0;  // of these, in which compute stood still
  double exposed_copy_seconds = 0;           // compute stood still until K and V of the layer before had left
  int64_t published_pairs = 0;               // causal pairs, all heads and layers (kernels/sparse/coverage.h)
  int64_t covered_pairs = 0;
  int64_t computed_pairs = 0;
  double density =
      0;  // covered causal pairs over all causal pairs; heads that are computed again count again
  std::vector<int64_t> rank_covered_pairs;
  double imbalance = 0;                     // their maximum over their mean; 1 when nothing is covered
  int64_t kv_bytes = 0;                     // of all ranks, of the cache as it is stored
  std::vector<uint32_t> rank_kv_checksums;  // KvSink::checksum; empty where sinks keep none
  int64_t peak_memory_bytes = 0;            // largest resident set of a rank, as the kernel counts it
  // Of the rank that had most. Peak and plan are of Backend::memory(), by our own account; the held bytes are
  // those that it had of the device at most, by the device's account, with what it keeps for later
  // allocations (0 from a service). What the driver and libraries took beside it by the end is outside; 0 on
  // a CPU.
  int64_t peak_device_bytes = 0;
  int64_t planned_device_bytes = 0;
  int64_t held_device_bytes = 0;
  int64_t outside_device_bytes = 0;
  std::string device;        // DeviceFacts::name of rank 0
  std::string communicator;  // Communicator::name of what exchanges activations
  DType compute_dtype = DType::kFloat32;
  RecallFigures recall;
};

struct PrefillResult {
  std::vector<int64_t> positions;  // as asked, resolved
  std::vector<float> logits;       // [positions.size(), vocab_size] on rank 0, empty elsewhere
  PrefillFigures figures;          // on rank 0
};

struct PrefillCallbacks {
  // Rank 0: all ranks have accepted the request and opened their sinks, compute begins.
  std::function<void(const ResolvedAttention& attention)> on_accepted;
  std::function<void(const PrefillProgress& progress)> on_progress;  // rank 0
  // Any rank may watch for cancellation; rank 0's is what counts for the outcome. Polled often, cheap,
  // thread-safe.
  std::function<absl::Status()> should_stop;
};

// The model over the ranks of one communicator. All ranks create it and call Prefill together; one prompt at
// a time. An error that every rank returns alike leaves the engine usable; if `healthy()` is false
// afterwards, the group is broken and the process should end.
class PrefillEngine {
 public:
  // Collective. Makes the backend (if `backend` is empty), loads the weights, checks mesh and model; every
  // rank gets the same error. `world` outlives the engine.
  static absl::StatusOr<std::unique_ptr<PrefillEngine>> Create(const EngineOptions& options,
                                                               Communicator& world,
                                                               std::shared_ptr<Backend> backend = nullptr);
  ~PrefillEngine();

  const ModelConfig& config() const;
  const std::string& model_fingerprint() const;
  const Mesh& mesh() const;
  int64_t weights_bytes() const;
  DType compute_dtype() const;
  Backend& backend();
  Communicator& world();

  // What can be refused before any work: empty prompt, ids out of vocabulary, length against the model and
  // the memory, logits positions, the least recall, the pattern against the model's shape. Local,
  // thread-safe, callable while a
  // prompt computes.
  absl::Status Validate(const PrefillRequest& request) const;

  // The plan of a request on this group, and the longest prompt like it that this rank's memory takes now (0:
  // not known).
  MemoryPlan PlanMemory(const PrefillRequest& request) const;
  int64_t LongestPrompt(const PrefillRequest& request) const;

  // What "auto" becomes, in words.
  std::string DescribeAuto() const;
  // How the ranks exchange activations, and why so: "nccl, every rank has a GPU of its own".
  std::string DescribeCommunicator() const;

  // Rank 0: runs the request on all ranks, which are in Serve(). Validates first. Cancelled, DeadlineExceeded
  // (from should_stop), errors of sinks and of ranks come back as they are.
  absl::StatusOr<PrefillResult> Prefill(const PrefillRequest& request, const KvSinkFactory& sink_factory,
                                        const PrefillCallbacks& callbacks);

  // Ranks other than 0: takes part in requests until rank 0 calls Shutdown (OK) or the group breaks (the
  // error). `on_request_done` is called after each request with its outcome.
  absl::Status Serve(const KvSinkFactory& sink_factory, const std::function<absl::Status()>& should_stop,
                     const std::function<void(const absl::Status& outcome)>& on_request_done);

  // Rank 0: ends Serve on the others. Idempotent.
  absl::Status Shutdown();

  // Rank 0, between requests: keeps the waits of the others within their deadline, and breaks the group where
  // a rank has lost its device. Call at least every quarter of the communicator's timeout while idle.
  absl::Status KeepAlive();

  bool healthy() const;

 private:
  struct Impl;
  explicit PrefillEngine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_PREFILL_ENGINE_H_
