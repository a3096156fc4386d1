#include "models/transformer.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace longfill {
namespace {

class Stopwatch {
 public:
  explicit Stopwatch(double* seconds) : seconds_(seconds) {}
  ~Stopwatch() {
    *seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double* seconds_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Elements of every buffer of a rank with num_tokens tokens.
struct BufferSizes {
  BufferSizes(const ModelConfig& config, int64_t num_tokens) {
    const int64_t chunk = std::min(num_tokens, kLinearChunkTokens);
    residual = num_tokens * config.hidden_size;
    q = config.num_q_heads * num_tokens * config.head_dim;
    kv = config.num_kv_heads * num_tokens * config.head_dim;
    normed = chunk * config.hidden_size;
    projected = chunk * config.num_q_heads * config.head_dim;
    gate = chunk * config.intermediate_size;
  }
  int64_t Total() const { return residual + 2 * q + 2 * kv + normed + projected + 2 * gate; }

  int64_t residual, q, kv, normed, projected, gate;
};

// Calls body(begin, end) for pieces of kLinearChunkTokens of [0, num_tokens), until it or should_stop fails.
template <typename Body>
absl::Status ForEachChunk(int64_t num_tokens, const std::function<absl::Status()>& should_stop, Body body) {
  for (int64_t begin = 0; begin < num_tokens; begin += kLinearChunkTokens) {
    LF_RETURN_IF_ERROR(should_stop());
    LF_RETURN_IF_ERROR(body(begin, std::min(num_tokens, begin + kLinearChunkTokens)));
  }
  return absl::OkStatus();
}

}  // namespace

Transformer::Transformer(const ModelConfig& config, const ModelWeights& weights, KernelSet& kernels,
                         const ShardPlan& plan, int rank, RotaryTable rotary)
    : config_(config),
      weights_(weights),
      kernels_(kernels),
      plan_(plan),
      positions_(plan.TokenPositions(rank)),
      num_tokens_(plan.NumTokens(rank)),
      rotary_(std::move(rotary)) {}

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Create(const ModelConfig& config,
                                                                 const ModelWeights& weights,
                                                                 KernelSet& kernels, const ShardPlan& plan,
                                                                 int rank) {
  LF_ASSIGN_OR_RETURN(RotaryTable rotary, BuildRotaryTable(config.rope, plan.num_tokens()));
  std::unique_ptr<Transformer> transformer(
      new Transformer(config, weights, kernels, plan, rank, std::move(rotary)));
  LF_RETURN_IF_ERROR(transformer->Allocate());
  return transformer;
}

absl::Status Transformer::Allocate() {
  const BufferSizes sizes(config_, num_tokens_);
  const auto allocate = [this](int64_t elements, const char* what, Buffer* buffer) -> absl::Status {
    LF_ASSIGN_OR_RETURN(*buffer,
                        kernels_.memory().Allocate(elements * static_cast<int64_t>(sizeof(float)), what));
    return absl::OkStatus();
  };
  LF_RETURN_IF_ERROR(allocate(sizes.residual, "the residual stream", &residual_));
  LF_RETURN_IF_ERROR(allocate(sizes.q, "queries", &q_));
  LF_RETURN_IF_ERROR(allocate(sizes.kv, "keys", &k_));
  LF_RETURN_IF_ERROR(allocate(sizes.kv, "values", &v_));
  LF_RETURN_IF_ERROR(allocate(sizes.q, "the attention output", &attention_));
  LF_RETURN_IF_ERROR(allocate(sizes.normed, "normed tokens of a chunk", &normed_));
  LF_RETURN_IF_ERROR(allocate(sizes.projected, "projected tokens of a chunk", &projected_));
  LF_RETURN_IF_ERROR(allocate(sizes.gate, "MLP gates of a chunk", &gate_));
  LF_RETURN_IF_ERROR(allocate(sizes.gate, "MLP values of a chunk", &up_));
  LF_ASSIGN_OR_RETURN(workspace_,
                      kernels_.memory().Allocate(WorkspaceBytes(config_, kernels_, num_tokens_), "GEMM"));
  return absl::OkStatus();
}

int64_t Transformer::WorkspaceBytes(const ModelConfig& config, const KernelSet& kernels, int64_t num_tokens) {
  const int64_t widest_in =
      std::max({config.hidden_size, config.num_q_heads * config.head_dim, config.intermediate_size});
  return kernels.GemmWorkspaceBytes(std::min(num_tokens, kLinearChunkTokens), widest_in,
                                    std::max(widest_in, config.vocab_size));
}

int64_t Transformer::PlanBytes(const ModelConfig& config, const KernelSet& kernels, const ShardPlan& plan) {
  int64_t num_tokens = 0;
  for (int rank = 0; rank < plan.mesh().size(); ++rank)
    num_tokens = std::max(num_tokens, plan.NumTokens(rank));
  return BufferSizes(config, num_tokens).Total() * static_cast<int64_t>(sizeof(float)) +
         WorkspaceBytes(config, kernels, num_tokens);
}

absl::Status Transformer::Embed(std::span<const int32_t> ids, Stream& stream) {
  LF_CHECK(static_cast<int64_t>(ids.size()) == num_tokens_);
  return kernels_.Embed({.ids = ids,
                         .table = weights_.embedding().weight,
                         .table_dtype = weights_.embedding().dtype,
                         .vocab_size = config_.vocab_size,
                         .width = config_.hidden_size,
                         .out = residual_.as<float>()},
                        stream);
}

absl::Status Transformer::RunLayer(int64_t layer, std::span<const HeadPattern> patterns,
                                   const LayerParallelism& parallel, const LayerCallbacks& callbacks,
                                   LayerFigures* figures, Stream& stream) {
  const LayerWeights& weights = weights_.layer(layer);
  absl::Status mine;
  {
    Stopwatch watch(&figures->linear_seconds);
    mine = ForEachChunk(num_tokens_, callbacks.should_stop, [&](int64_t begin, int64_t end) -> absl::Status {
      LF_RETURN_IF_ERROR(ProjectQkv(weights, begin, end, stream));
      return callbacks.on_kv(begin, end, Heads(k_, begin), Heads(v_, begin));
    });
  }
  LF_RETURN_IF_ERROR(callbacks.agree(mine));

  LF_ASSIGN_OR_RETURN(const LayerIndex index,
                      parallel.index_builder->Build(plan_, Heads(q_, 0), Heads(k_, 0), patterns, stream));
  figures->index_seconds += index.seconds - index.communication_seconds;
  for (const PairCounts& pairs : index.pairs) {
    figures->pairs.published += pairs.published;
    figures->pairs.covered += pairs.covered;
  }

  const ParallelAttentionParams params = {.q = Heads(q_, 0),
                                          .k = Heads(k_, 0),
                                          .v = Heads(v_, 0),
                                          .indices = index.heads,
                                          .pairs = index.pairs,
                                          .out = attention_.as<float>(),
                                          .should_stop = [&] { return !callbacks.should_stop().ok(); }};
  const absl::StatusOr<ParallelAttentionStats> stats = parallel.attention->Run(plan_, params, stream);
  if (!stats.ok() && !absl::IsCancelled(stats.status())) return stats.status();
  mine = callbacks.should_stop();  // says why, where `stats` only says that
  LF_RETURN_IF_ERROR(callbacks.agree(mine.ok() ? stats.status() : mine));
  figures->attention_seconds += stats->attention_seconds;
  figures->rank_covered_pairs += stats->covered_pairs;
  figures->rank_computed_pairs += stats->computed_pairs;

  Stopwatch watch(&figures->linear_seconds);
  return callbacks.agree(ForEachChunk(num_tokens_, callbacks.should_stop, [&](int64_t begin, int64_t end) {
    return FinishLayer(weights, begin, end, stream);
  }));
}

// residual -> norm -> Q, K, V, rotated and head-major
absl::Status Transformer::ProjectQkv(const LayerWeights& layer, int64_t begin, int64_t end, Stream& stream) {
  const int64_t rows = end - begin;
  LF_RETURN_IF_ERROR(Norm(residual_.as<float>() + begin * config_.hidden_size, layer.input_norm, rows,
                          config_.hidden_size, normed_.as<float>(), stream));
  const int64_t rotary_dim = config_.rope.rotary_dim;
  LF_RETURN_IF_ERROR(
      ProjectHeads(layer.q_proj, layer.q_norm, rotary_dim, begin, rows, q_.as<float>(), stream));
  LF_RETURN_IF_ERROR(
      ProjectHeads(layer.k_proj, layer.k_norm, rotary_dim, begin, rows, k_.as<float>(), stream));
  return ProjectHeads(layer.v_proj, nullptr, 0, begin, rows, v_.as<float>(), stream);
}

// residual += o_proj(attention); residual += down_proj(activation(gate_proj(norm(residual))) * up_proj(...))
absl::Status Transformer::FinishLayer(const LayerWeights& layer, int64_t begin, int64_t end, Stream& stream) {
  const int64_t rows = end - begin;
  float* residual = residual_.as<float>() + begin * config_.hidden_size;
  const float* attention = attention_.as<float>() + begin * config_.num_q_heads * config_.head_dim;
  LF_RETURN_IF_ERROR(Linear(attention, layer.o_proj, rows, /*accumulate=*/true, residual, stream));
  LF_RETURN_IF_ERROR(
      Norm(residual, layer.post_attention_norm, rows, config_.hidden_size, normed_.as<float>(), stream));
  LF_RETURN_IF_ERROR(Linear(normed_.as<float>(), layer.gate_proj, rows, false, gate_.as<float>(), stream));
  LF_RETURN_IF_ERROR(Linear(normed_.as<float>(), layer.up_proj, rows, false, up_.as<float>(), stream));
  LF_RETURN_IF_ERROR(kernels_.GatedActivation({.gate = gate_.as<float>(),
                                               .up = up_.as<float>(),
                                               .in_stride = config_.intermediate_size,
                                               .activation = config_.activation,
                                               .num_rows = rows,
                                               .width = config_.intermediate_size,
                                               .out = gate_.as<float>()},
                                              stream));
  return Linear(gate_.as<float>(), layer.down_proj, rows, /*accumulate=*/true, residual, stream);
}

absl::Status Transformer::Logits(std::span<const int64_t> rows, std::span<float> logits, Stream& stream) {
  LF_CHECK(logits.size() == rows.size() * static_cast<size_t>(config_.vocab_size));
  const int64_t width = config_.hidden_size;
  const int64_t num_rows = static_cast<int64_t>(rows.size());
  const int64_t chunk = std::min(kLinearChunkTokens, num_tokens_);  // what normed_ holds
  for (int64_t begin = 0; begin < num_rows; begin += chunk) {
    const int64_t count = std::min(num_rows - begin, chunk);
    for (int64_t i = 0; i < count; ++i) {
      LF_RETURN_IF_ERROR(Norm(residual_.as<float>() + rows[static_cast<size_t>(begin + i)] * width,
                              weights_.final_norm(), 1, width, normed_.as<float>() + i * width, stream));
    }
    LF_RETURN_IF_ERROR(Linear(normed_.as<float>(), weights_.lm_head(), count, false,
                              logits.data() + begin * config_.vocab_size, stream));
  }
  return absl::OkStatus();
}

absl::Status Transformer::Norm(const float* x, const float* weight, int64_t num_rows, int64_t width,
                               float* out, Stream& stream) {
  return kernels_.RmsNorm({.x = x,
                           .weight = weight,
                           .epsilon = static_cast<float>(config_.rms_norm_eps),
                           .num_rows = num_rows,
                           .width = width,
                           .out = out},
                          stream);
}

absl::Status Transformer::Linear(const float* x, const LinearWeights& linear, int64_t num_rows,
                                 bool accumulate, float* out, Stream& stream) {
  return kernels_.Gemm({.x = x,
                        .x_stride = linear.in_width,
                        .weight = linear.weight,
                        .weight_dtype = linear.dtype,
                        .bias = linear.bias,
                        .num_rows = num_rows,
                        .in_width = linear.in_width,
                        .out_width = linear.out_width,
                        .accumulate = accumulate,
                        .out = out,
                        .out_stride = linear.out_width},
                       {workspace_.data(), workspace_.size_bytes()}, stream);
}

absl::Status Transformer::ProjectHeads(const LinearWeights& linear, const float* norm, int64_t rotary_dim,
                                       int64_t begin, int64_t num_rows, float* heads, Stream& stream) {
  const int64_t num_heads = linear.out_width / config_.head_dim;
  LF_RETURN_IF_ERROR(Linear(normed_.as<float>(), linear, num_rows, false, projected_.as<float>(), stream));
  if (norm != nullptr) {
    LF_RETURN_IF_ERROR(Norm(projected_.as<float>(), norm, num_rows * num_heads, config_.head_dim,
                            projected_.as<float>(), stream));
  }
  return kernels_.Rotary({.x = projected_.as<float>(),
                          .x_stride = linear.out_width,
                          .inv_freq = rotary_.inv_freq.data(),
                          .attention_scale = rotary_.attention_scale,
                          .form = config_.rope.form,
                          .rotary_dim = rotary_dim,
                          .positions = positions_,
                          .row_offset = begin,
                          .num_rows = num_rows,
                          .num_heads = num_heads,
                          .head_dim = config_.head_dim,
                          .out = heads,
                          .head_stride = num_tokens_ * config_.head_dim},
                         stream);
}

HeadsView<const float> Transformer::Heads(const Buffer& buffer, int64_t row) const {
  return {buffer.as<const float>() + row * config_.head_dim, num_tokens_ * config_.head_dim,
          config_.head_dim};
}

}  // namespace longfill
