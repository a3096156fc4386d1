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
#include <vector>

#include "kernels/api/kernel_set.h"
#include "kernels/base/memory.h"
#include "models/config.h"
#include "models/rope.h"
#include "models/weights.h"
#include "parallel/mesh.h"
#include "parallel/parallel_attention.h"
#include "parallel/sparse_index_builder.h"

namespace longfill {

inline constexpr int64_t kLinearChunkTokens = 2048;  // tokens that the linear layers take at a time

inline AttentionGeometry GeometryOf(const ModelConfig& config) {
  return {config.num_q_heads, config.num_kv_heads, config.head_dim,
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.head_dim)))};
}

// What layers did on this rank; RunLayer adds to it.
struct LayerFigures {
  double index_seconds = 0;      // building the indices, without the communication inside
  double attention_seconds = 0;  // kernels only
  double linear_seconds = 0;     // norms, projections, MLP, and handing K and V on
  PairCounts pairs;              // of all ranks, all heads
  int64_t rank_covered_pairs = 0;
  int64_t rank_computed_pairs = 0;
};

// The parallel parts that a layer calls; owned by the caller.
struct LayerParallelism {
  SparseIndexBuilder* index_builder = nullptr;
  ParallelAttention* attention = nullptr;
};

struct LayerCallbacks {
  // Key and value of local rows [row_begin, row_end) of the layer are final: [num_kv_heads, rows, head_dim].
  std::function<absl::Status(int64_t row_begin, int64_t row_end, HeadsView<const float> key,
                             HeadsView<const float> value)>
      on_kv;
  // Not OK: work may end early. Polled between pieces of compute; thread-safe.
  std::function<absl::Status()> should_stop;
  // Collective: every rank passes its own status and gets the same answer; not OK ends the layer on all
  // ranks. Called where a layer may end without leaving a peer in a collective: after the projections and at
  // its end.
  std::function<absl::Status(const absl::Status& mine)> agree;
};

// Memory of one rank for one prompt is allocated in Create and nowhere else. Not thread-safe.
class Transformer {
 public:
  // `config`, `weights` and `kernels` outlive the result.
  static absl::StatusOr<std::unique_ptr<Transformer>> Create(const ModelConfig& config,
                                                             const ModelWeights& weights, KernelSet& kernels,
                                                             const ShardPlan& plan, int rank);

  // What Create allocates, for the rank with the most tokens.
  static int64_t PlanBytes(const ModelConfig& config, const KernelSet& kernels, const ShardPlan& plan);

  // ids: the tokens of this rank, in the order of plan.TokenPositions(rank).
  absl::Status Embed(std::span<const int32_t> ids, Stream& stream);

  // patterns: one for each query head. Errors of callbacks and kernels that struck one rank come back on
  // every rank (through `agree`); an error inside a collective leaves the group broken.
  absl::Status RunLayer(int64_t layer, std::span<const HeadPattern> patterns,
                        const LayerParallelism& parallel, const LayerCallbacks& callbacks,
                        LayerFigures* figures, Stream& stream);

  // Final norm and LM head of some local rows. logits: [rows.size(), vocab_size].
  absl::Status Logits(std::span<const int64_t> rows, std::span<float> logits, Stream& stream);

 private:
  Transformer(const ModelConfig& config, const ModelWeights& weights, KernelSet& kernels,
              const ShardPlan& plan, int rank, RotaryTable rotary);
  static int64_t WorkspaceBytes(const ModelConfig& config, const KernelSet& kernels, int64_t num_tokens);
  absl::Status Allocate();
  absl::Status ProjectQkv(const LayerWeights& layer, int64_t begin, int64_t end, Stream& stream);
  absl::Status FinishLayer(const LayerWeights& layer, int64_t begin, int64_t end, Stream& stream);
  absl::Status Norm(const float* x, const float* weight, int64_t num_rows, int64_t width, float* out,
                    Stream& stream);
  absl::Status Linear(const float* x, const LinearWeights& linear, int64_t num_rows, bool accumulate,
                      float* out, Stream& stream);
  absl::Status ProjectHeads(const LinearWeights& linear, const float* norm, int64_t rotary_dim, int64_t begin,
                            int64_t num_rows, float* heads, Stream& stream);
  HeadsView<const float> Heads(const Buffer& buffer, int64_t row) const;

  const ModelConfig& config_;
  const ModelWeights& weights_;
  KernelSet& kernels_;
  const ShardPlan plan_;
  const PositionMap positions_;
  const int64_t num_tokens_;  // of this rank
  const RotaryTable rotary_;

  Buffer residual_;   // [num_tokens, hidden_size]
  Buffer q_, k_, v_;  // [heads, num_tokens, head_dim]
  Buffer attention_;  // [num_tokens, num_q_heads * head_dim]
  Buffer normed_;     // [chunk, hidden_size]
  Buffer projected_;  // [chunk, widest projection]
  Buffer gate_, up_;  // [chunk, intermediate_size]
  Buffer workspace_;
};

}  // namespace longfill

#endif  // LONGFILL_MODELS_TRANSFORMER_H_
