#ifndef LONGFILL_MODELS_TRANSFORMER_H_
#define LONGFILL_MODELS_TRANSFORMER_H_

// The forward pass of one prompt on one rank: which kernels run on which buffers, layer by layer. How the
// work is shared between ranks is in parallel/; nothing here depends on the mesh but the number of local
// tokens.

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/api/backend.h"
#include "models/config.h"
#include "models/part_timer.h"
#include "models/recall_guard.h"
#include "models/rope.h"
#include "models/sharded_weights.h"
#include "models/weights.h"
#include "parallel/mesh.h"
#include "parallel/parallel_attention.h"
#include "parallel/recall_monitor.h"
#include "parallel/sparse_index_builder.h"

namespace longfill {

inline AttentionGeometry GeometryOf(const ModelConfig& config) {
  return {config.num_q_heads, config.num_kv_heads, config.head_dim,
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.head_dim))), config.rope.dual_chunk};
}

// What this rank did for a prompt. Seconds are of the device (on the CPU of the clock); what the device waits
// for from outside, as for before_kv_overwrite, is in none of them.
struct LayerFigures {
  double index_seconds = 0;  // building the indices, without the communication inside
  double attention_seconds = 0;
  double gemm_seconds = 0;                // projections, MLP, LM head
  double other_seconds = 0;               // embedding, norms, rotary, activation
  double attention_exchange_seconds = 0;  // between its ranks, with packing and waiting for peers
  double attention_exposed_seconds = 0;   // of these, in which attention waited for them
  double recall_seconds = 0;              // of the recall monitor
  PairCounts pairs;                       // of all ranks, all heads, with those that were computed again
  int64_t rank_covered_pairs = 0;
  int64_t rank_computed_pairs = 0;
  int64_t heads_without_room = 0;   // of all layers, see LayerParallelism::dense_without_room
  std::vector<LayerRecall> recall;  // of the layers that have run, where there is a monitor
};

// What attention of a layer reads and where its result goes: memory of the backend, of its compute dtype,
// rows as plan.TokenPositions(rank).
struct LayerHeads {
  HeadsView<const void> q;     // [num_q_heads, local tokens, head_dim], after RoPE
  HeadsView<const void> k, v;  // [num_kv_heads, local tokens, head_dim]
  HeadsView<void> out;         // [num_q_heads, local tokens, head_dim]
};

// The parallel parts that a layer calls; owned by the caller.
struct LayerParallelism {
  SparseIndexBuilder* index_builder = nullptr;
  ParallelAttention* attention = nullptr;
  const PeerKeys* peers = nullptr;          // ParallelAttentionParams::peers, of keys() and values()
  ShardedWeights* layer_weights = nullptr;  // nullptr: the weights of Create have the layers
  // Benchmarks: what attention uses instead of the index that was just built, which counts in index_seconds
  // all the same. Puts views of the backend's memory and pair counts into *index, equal on all ranks; they
  // stay until the layer's work has run. Not timed. May be empty.
  std::function<absl::Status(int64_t layer, LayerIndex* index)> replace_index;
  // Pattern search: computes the layer's attention in place of index_builder and attention, which may be
  // nullptr then, and looks at its queries, keys and values. Enqueues on the main stream. May be empty.
  std::function<absl::Status(int64_t layer, const LayerHeads& heads)> attend;
  // Watches every layer whose patterns leave out keys; nullptr: nobody does. Not with replace_index.
  RecallMonitor* recall = nullptr;
  double min_recall = 0;  // RecallOptions::min_recall
  bool dense_without_room =
      false;  // block-share heads see all keys where lists have no room, on all ranks alike
};

struct LayerCallbacks {
  // Key and value of local rows [row_begin, row_end) of the layer are final once the work enqueued so far has
  // run: [num_kv_heads, rows, head_dim] in the backend's memory, unchanged until before_kv_overwrite.
  std::function<absl::Status(int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                             HeadsView<const void> value)>
      on_kv;
  // Called once a layer, before work is enqueued that overwrites the K and V of the layer before: lets that
  // work, or the caller, wait for whoever still reads them. May be empty.
  std::function<absl::Status()> before_kv_overwrite;
  // Not OK: work may end early. Polled between pieces of compute; thread-safe.
  std::function<absl::Status()> should_stop;
  // Collective: every rank passes its own status and gets the same answer; not OK ends the layer on all
  // ranks. Called where a layer may end without leaving a peer in a collective: after the projections and at
  // its end.
  std::function<absl::Status(const absl::Status& mine)> agree;
};

// Memory of one rank for one prompt, in the backend's compute dtype, is allocated in Create and nowhere else.
// Everything runs on the backend's main stream. The host stays at most two chunks of linear work ahead of the
// device, so that it notices should_stop soon. Not thread-safe.
class Transformer {
 public:
  // One allocation of Create.
  struct PlannedBuffer {
    Buffer Transformer::*place;
    std::string_view what;
    int64_t bytes = 0;
  };

  // `config`, `weights` and `backend` outlive the result; the weights are what UploadWeights or RandomWeights
  // of that backend gave, or ShardedWeights::resident. `kv_memory`: where keys and values lie, for peers that
  // read them; nullptr: in backend.memory().
  static absl::StatusOr<std::unique_ptr<Transformer>> Create(const ModelConfig& config,
                                                             const ModelWeights& weights, Backend& backend,
                                                             const ShardPlan& plan, int rank,
                                                             MemoryResource* kv_memory = nullptr);
  // The work that was given to the stream must be through, or the backend's memory be stream-ordered.
  ~Transformer() = default;

  // What Create allocates for a rank with `num_tokens` tokens, to the byte.
  static std::vector<PlannedBuffer> PlanBuffers(const ModelConfig& config, const KernelSet& kernels,
                                                int64_t num_tokens);
  // Their sum for the rank with the most tokens.
  static int64_t PlanBytes(const ModelConfig& config, const KernelSet& kernels, const ShardPlan& plan);

  // [num_kv_heads, tokens of this rank, head_dim], dense: of the layer that was projected last.
  const Buffer& keys() const { return k_; }
  const Buffer& values() const { return v_; }

  // ids: the tokens of this rank, in the order of plan.TokenPositions(rank), each within the vocabulary.
  absl::Status Embed(std::span<const int32_t> ids);

  // Enqueues the layer; its last chunks may still run at return. patterns: one for each query head, bounded
  // by the layer's window (BoundByWindow). Errors of callbacks and kernels that struck one rank come back on
  // every rank (through `agree`); an error inside a collective leaves the group broken.
  absl::Status RunLayer(int64_t layer, std::span<const HeadPattern> patterns,
                        const LayerParallelism& parallel, const LayerCallbacks& callbacks);

  // What goes from layer to layer, [num_tokens, hidden_size] of this rank in the compute dtype, to run layers
  // again from where it was taken: copied to or from `hidden_bytes` of the backend's memory, enqueued.
  int64_t hidden_bytes() const { return residual_.size_bytes(); }
  absl::Status CopyHiddenOut(void* to);
  absl::Status CopyHiddenIn(const void* from);

  // Final norm and LM head of some local rows. logits: [rows.size(), vocab_size], written at return.
  absl::Status Logits(std::span<const int64_t> rows, std::span<float> logits);

  // Waits for the work given so far; sums since Create.
  absl::StatusOr<LayerFigures> Figures();

 private:
  enum Part : int { kGemm, kOther, kNumParts };

  Transformer(const ModelConfig& config, const ModelWeights& weights, Backend& backend, const ShardPlan& plan,
              int rank, RotaryTable rotary);
  absl::Status Allocate(MemoryResource& kv_memory);
  absl::Status CopyHidden(void* to, const void* from);
  template <typename Body>
  absl::Status ForEachChunk(const std::function<absl::Status()>& should_stop, Body body);
  absl::Status Attend(int64_t layer, std::span<const HeadPattern> patterns, const LayerParallelism& parallel,
                      const LayerCallbacks& callbacks);
  absl::StatusOr<LayerIndex> BuildIndex(std::span<const HeadPattern> patterns,
                                        const LayerParallelism& parallel, const LayerCallbacks& callbacks);
  absl::StatusOr<std::vector<float>> AttendHeads(const LayerIndex& index, std::span<const int32_t> heads,
                                                 const RecallMonitor* recall,
                                                 const LayerParallelism& parallel,
                                                 const LayerCallbacks& callbacks);
  absl::Status GuardRecall(int64_t window, std::span<const HeadPattern> patterns,
                           const LayerParallelism& parallel, const LayerCallbacks& callbacks,
                           LayerRecall* recall);
  bool IsWatched(int64_t layer, std::span<const HeadPattern> patterns,
                 const LayerParallelism& parallel) const;
  absl::Status ProjectAndAttend(int64_t layer, const LayerWeights& weights,
                                std::span<const HeadPattern> patterns, const LayerParallelism& parallel,
                                const LayerCallbacks& callbacks);
  enum class Projected : uint8_t { kAll, kQueries, kKeysAndValues };
  absl::Status Project(const LayerWeights& layer, Projected what, const LayerCallbacks& callbacks);
  absl::Status ProjectChunk(const LayerWeights& layer, Projected what, int64_t begin, int64_t num_rows);
  absl::Status FinishLayer(const LayerWeights& layer, int64_t begin, int64_t end);
  absl::Status FinalNorm(std::span<const int64_t> rows);
  absl::Status Norm(const void* x, const float* weight, int64_t num_rows, int64_t width, void* out);
  absl::Status Linear(const void* x, const LinearWeights& linear, int64_t num_rows, bool accumulate,
                      void* out, DType out_dtype);
  absl::Status ProjectHeads(const LinearWeights& linear, const float* norm, int64_t rotary_dim, int64_t begin,
                            int64_t num_rows, const Buffer& heads);
  RotaryParams Rotary(int64_t rotary_dim) const;
  absl::Status RotateHeads(RotaryParams params, int64_t begin, const Buffer& heads);
  HeadsView<const void> Heads(const Buffer& buffer, int64_t row) const;
  void* Rows(const Buffer& buffer, int64_t row, int64_t width) const;  // of a token-major buffer

  const ModelConfig& config_;
  const ModelWeights& weights_;
  Backend& backend_;
  KernelSet& kernels_;
  Stream& stream_;
  const DType dtype_;
  const ShardPlan plan_;
  const PositionMap positions_;
  const int64_t num_tokens_;  // of this rank
  const int64_t chunk_;       // tokens that the linear layers take at a time
  const RotaryTable rotary_;

  PartTimer timer_;
  LayerFigures figures_;                    // without the parts that timer_ keeps
  std::unique_ptr<Event> chunk_events_[2];  // the ends of the last two chunks, by turns
  int next_chunk_event_ = 0;

  Buffer residual_;   // [num_tokens, hidden_size]
  Buffer q_, k_, v_;  // [heads, num_tokens, head_dim]; q_ is not rotated where dual chunks split the prompt
  Buffer attention_;  // [num_tokens, num_q_heads * head_dim]
  Buffer ids_;        // [chunk] int32
  Buffer normed_;     // [chunk, hidden_size]
  Buffer wide_;       // [chunk, width of Q or intermediate_size], by turns; logits of some rows
  Buffer up_;         // [chunk, intermediate_size]
  Buffer workspace_;
};

}  // namespace longfill

#endif  // LONGFILL_MODELS_TRANSFORMER_H_
