#include "models/transformer.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

#include "kernels/sparse/coverage.h"
#include "parallel/share_selector.h"

namespace longfill {

Transformer::Transformer(const ModelConfig& config, const ModelWeights& weights, Backend& backend,
                         const ShardPlan& plan, int rank, RotaryTable rotary)
    : config_(config),
      weights_(weights),
      backend_(backend),
      kernels_(backend.kernels()),
      stream_(backend.stream()),
      dtype_(kernels_.compute_dtype()),
      plan_(plan),
      positions_(plan.TokenPositions(rank)),
      num_tokens_(plan.NumTokens(rank)),
      chunk_(std::min(num_tokens_, kernels_.preferred_rows())),
      rotary_(std::move(rotary)),
      timer_(backend, kNumParts) {}

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Create(const ModelConfig& config,
                                                                 const ModelWeights& weights,
                                                                 Backend& backend, const ShardPlan& plan,
                                                                 int rank, MemoryResource* kv_memory) {
  LF_ASSIGN_OR_RETURN(RotaryTable rotary, BuildRotaryTable(config.rope, plan.num_tokens()));
  std::unique_ptr<Transformer> transformer(
      new Transformer(config, weights, backend, plan, rank, std::move(rotary)));
  LF_RETURN_IF_ERROR(transformer->Allocate(kv_memory != nullptr ? *kv_memory : backend.memory()));
  return transformer;
}

std::vector<Transformer::PlannedBuffer> Transformer::PlanBuffers(const ModelConfig& config,
                                                                 const KernelSet& kernels,
                                                                 int64_t num_tokens) {
  if (num_tokens == 0) return {};
  const int64_t chunk = std::min(num_tokens, kernels.preferred_rows());
  const int64_t element = DTypeBytes(kernels.compute_dtype());
  const int64_t q_width = config.num_q_heads * config.head_dim;
  const int64_t kv_bytes = num_tokens * config.num_kv_heads * config.head_dim * element;
  const int64_t inner_bytes = chunk * config.intermediate_size * element;
  const int64_t logits_row = config.vocab_size * static_cast<int64_t>(sizeof(float));
  const int64_t widest_in = std::max({config.hidden_size, q_width, config.intermediate_size});
  return {
      {&Transformer::residual_, "the residual stream", num_tokens * config.hidden_size * element},
      {&Transformer::q_, "queries", num_tokens * q_width * element},
      {&Transformer::k_, "keys", kv_bytes},
      {&Transformer::v_, "values", kv_bytes},
      {&Transformer::attention_, "the attention output", num_tokens * q_width * element},
      {&Transformer::ids_, "token ids of a chunk", chunk * static_cast<int64_t>(sizeof(int32_t))},
      {&Transformer::normed_, "normed tokens of a chunk", chunk * config.hidden_size * element},
      {&Transformer::wide_, "projections of a chunk",
       std::max({chunk * q_width * element, inner_bytes, logits_row})},
      {&Transformer::up_, "MLP values of a chunk", inner_bytes},
      {&Transformer::workspace_, "GEMM scratch",
       kernels.GemmWorkspaceBytes(chunk, widest_in, std::max(widest_in, config.vocab_size))},
  };
}

int64_t Transformer::PlanBytes(const ModelConfig& config, const KernelSet& kernels, const ShardPlan& plan) {
  int64_t bytes = 0;
  for (const PlannedBuffer& buffer : PlanBuffers(config, kernels, plan.MostTokens())) bytes += buffer.bytes;
  return bytes;
}

absl::Status Transformer::Allocate(MemoryResource& kv_memory) {
  for (const PlannedBuffer& planned : PlanBuffers(config_, kernels_, num_tokens_)) {
    const bool kv = planned.place == &Transformer::k_ || planned.place == &Transformer::v_;
    MemoryResource& memory = kv ? kv_memory : backend_.memory();
    LF_ASSIGN_OR_RETURN(this->*planned.place, memory.Allocate(planned.bytes, planned.what));
  }
  for (std::unique_ptr<Event>& event : chunk_events_) {
    LF_ASSIGN_OR_RETURN(event, backend_.NewEvent());
  }
  return absl::OkStatus();
}

// Calls body(begin, end) for chunks of [0, num_tokens), until it or should_stop fails. Waits for the end of
// the chunk before the last one, so that not more than two are on their way.
template <typename Body>
absl::Status Transformer::ForEachChunk(const std::function<absl::Status()>& should_stop, Body body) {
  for (int64_t begin = 0; begin < num_tokens_; begin += chunk_) {
    Event& event = *chunk_events_[next_chunk_event_];
    LF_RETURN_IF_ERROR(event.Wait());
    LF_RETURN_IF_ERROR(timer_.Collect());
    LF_RETURN_IF_ERROR(should_stop());
    LF_RETURN_IF_ERROR(body(begin, std::min(num_tokens_, begin + chunk_)));
    LF_RETURN_IF_ERROR(event.Record(stream_));
    next_chunk_event_ = 1 - next_chunk_event_;
  }
  timer_.Begin(PartTimer::kNoPart);
  return absl::OkStatus();
}

absl::Status Transformer::Embed(std::span<const int32_t> ids) {
  LF_CHECK(static_cast<int64_t>(ids.size()) == num_tokens_);
  const auto never = [] { return absl::OkStatus(); };
  return ForEachChunk(never, [&](int64_t begin, int64_t end) -> absl::Status {
    timer_.Begin(kOther);
    LF_RETURN_IF_ERROR(kernels_.CopyIn(ids_.data(), ids.data() + begin,
                                       (end - begin) * static_cast<int64_t>(sizeof(int32_t)), stream_));
    return kernels_.Embed({.ids = ids_.as<int32_t>(),
                           .num_rows = end - begin,
                           .table = weights_.embedding().weight,
                           .table_dtype = weights_.embedding().dtype,
                           .vocab_size = config_.vocab_size,
                           .width = config_.hidden_size,
                           .out = Rows(residual_, begin, config_.hidden_size)},
                          stream_);
  });
}

absl::Status Transformer::CopyHiddenOut(void* to) { return CopyHidden(to, residual_.data()); }

absl::Status Transformer::CopyHiddenIn(const void* from) { return CopyHidden(residual_.data(), from); }

absl::Status Transformer::CopyHidden(void* to, const void* from) {
  const int64_t row_bytes = config_.hidden_size * DTypeBytes(dtype_);
  return kernels_.Copy2D({.to = to,
                          .to_pitch = row_bytes,
                          .from = from,
                          .from_pitch = row_bytes,
                          .row_bytes = row_bytes,
                          .rows = num_tokens_},
                         stream_);
}

absl::Status Transformer::RunLayer(int64_t layer, std::span<const HeadPattern> patterns,
                                   const LayerParallelism& parallel, const LayerCallbacks& callbacks) {
  for (const HeadPattern& pattern : patterns) {  // no key outside of the window may count
    LF_CHECK(BoundByWindow(pattern, config_.WindowOf(layer), plan_.num_tokens()) == pattern);
  }
  const LayerWeights* gathered = nullptr;
  if (parallel.layer_weights != nullptr) {
    LF_ASSIGN_OR_RETURN(gathered, parallel.layer_weights->Gather(layer));
  }
  const LayerWeights& weights = gathered != nullptr ? *gathered : weights_.layer(layer);
  LF_RETURN_IF_ERROR(ProjectAndAttend(layer, weights, patterns, parallel, callbacks));
  return callbacks.agree(ForEachChunk(
      callbacks.should_stop, [&](int64_t begin, int64_t end) { return FinishLayer(weights, begin, end); }));
}

// Keys and values come first, where ranks can exchange them beside the rest.
absl::Status Transformer::ProjectAndAttend(int64_t layer, const LayerWeights& weights,
                                           std::span<const HeadPattern> patterns,
                                           const LayerParallelism& parallel,
                                           const LayerCallbacks& callbacks) {
  const bool early = !parallel.attend && ParallelAttention::BeginsEarly(plan_.mesh());
  absl::Status mine = callbacks.before_kv_overwrite ? callbacks.before_kv_overwrite() : absl::OkStatus();
  if (mine.ok()) mine = Project(weights, early ? Projected::kKeysAndValues : Projected::kAll, callbacks);
  LF_RETURN_IF_ERROR(callbacks.agree(mine));
  if (!early) return Attend(layer, patterns, parallel, callbacks);
  const auto sampled = IsWatched(layer, patterns, parallel) ? std::span(parallel.recall->positions())
                                                            : std::span<const int64_t>();
  LF_RETURN_IF_ERROR(parallel.attention->Begin(
      plan_, {.k = Heads(k_, 0), .v = Heads(v_, 0), .peers = parallel.peers, .sampled = sampled}));
  absl::Status status = callbacks.agree(Project(weights, Projected::kQueries, callbacks));
  if (status.ok()) status = Attend(layer, patterns, parallel, callbacks);
  const absl::Status dropped = parallel.attention->Drop();
  return status.ok() ? dropped : status;
}

// Chunk by chunk; keys and values are final and handed out with each.
absl::Status Transformer::Project(const LayerWeights& layer, Projected what,
                                  const LayerCallbacks& callbacks) {
  return ForEachChunk(callbacks.should_stop, [&](int64_t begin, int64_t end) -> absl::Status {
    LF_RETURN_IF_ERROR(ProjectChunk(layer, what, begin, end - begin));
    timer_.Begin(PartTimer::kNoPart);
    if (what == Projected::kQueries) return absl::OkStatus();
    return callbacks.on_kv(begin, end, Heads(k_, begin), Heads(v_, begin));
  });
}

bool Transformer::IsWatched(int64_t layer, std::span<const HeadPattern> patterns,
                            const LayerParallelism& parallel) const {
  return parallel.recall != nullptr &&
         SomeLeaveOutKeys(patterns, config_.WindowOf(layer), plan_.num_tokens());
}

absl::Status Transformer::Attend(int64_t layer, std::span<const HeadPattern> patterns,
                                 const LayerParallelism& parallel, const LayerCallbacks& callbacks) {
  if (parallel.attend) {
    const HeadsView<void> out{attention_.data(), config_.head_dim, config_.num_q_heads * config_.head_dim};
    return callbacks.agree(
        parallel.attend(layer, {.q = Heads(q_, 0), .k = Heads(k_, 0), .v = Heads(v_, 0), .out = out}));
  }
  const int64_t window = config_.WindowOf(layer);
  const bool watched = IsWatched(layer, patterns, parallel);
  if (watched) LF_RETURN_IF_ERROR(parallel.recall->Measure(Heads(q_, 0), Heads(k_, 0), window));
  absl::StatusOr<LayerIndex> built = BuildIndex(patterns, parallel, callbacks);
  std::vector<HeadPattern> with_room;
  if (parallel.dense_without_room && ShareSelector::HadNoRoom(built.status())) {  // on all ranks
    with_room.assign(patterns.begin(), patterns.end());
    for (HeadPattern& pattern : with_room) {
      if (!std::holds_alternative<BlockShare>(pattern)) continue;
      pattern = SeesAllPattern(window, plan_.num_tokens());
      ++figures_.heads_without_room;
    }
    patterns = with_room;
    built = BuildIndex(patterns, parallel, callbacks);
  }
  LF_ASSIGN_OR_RETURN(LayerIndex index, std::move(built));
  if (parallel.replace_index) LF_RETURN_IF_ERROR(callbacks.agree(parallel.replace_index(layer, &index)));
  LF_ASSIGN_OR_RETURN(const std::vector<float> lse,
                      AttendHeads(index, {}, watched ? parallel.recall : nullptr, parallel, callbacks));
  if (parallel.recall == nullptr) return absl::OkStatus();
  LayerRecall recall{.watched = watched, .heads = std::vector<double>(patterns.size(), 1.0)};
  if (watched) {
    LF_ASSIGN_OR_RETURN(recall.heads, parallel.recall->Recall(lse));
    for (size_t h = 0; h < patterns.size(); ++h) {
      if (SeesAllKeys(patterns[h], index.pairs[h], window, plan_.num_tokens())) recall.heads[h] = 1;
    }
    LF_RETURN_IF_ERROR(GuardRecall(window, patterns, parallel, callbacks, &recall));
  }
  figures_.recall.push_back(std::move(recall));
  figures_.recall_seconds = parallel.recall->seconds();
  return absl::OkStatus();
}

// Computes some heads (none given: all) and returns the lse of the rows that `recall`, if there is one,
// samples.
absl::StatusOr<std::vector<float>> Transformer::AttendHeads(const LayerIndex& index,
                                                            std::span<const int32_t> heads,
                                                            const RecallMonitor* recall,
                                                            const LayerParallelism& parallel,
                                                            const LayerCallbacks& callbacks) {
  for (size_t h = 0; h < index.pairs.size(); ++h) {
    if (!heads.empty() && !std::ranges::binary_search(heads, static_cast<int32_t>(h))) continue;
    figures_.pairs.published += index.pairs[h].published;
    figures_.pairs.covered += index.pairs[h].covered;
  }
  absl::StatusOr<ParallelAttentionStats> stats = parallel.attention->Run(
      plan_, {.q = Heads(q_, 0),
              .k = Heads(k_, 0),
              .v = Heads(v_, 0),
              .peers = parallel.peers,
              .indices = index.heads,
              .pairs = index.pairs,
              .query_rotary = Rotary(config_.rope.rotary_dim),
              .out = attention_.data(),
              .heads = heads,
              .sampled = recall != nullptr ? std::span(recall->positions()) : std::span<const int64_t>(),
              .should_stop = [&] { return !callbacks.should_stop().ok(); }});
  if (!stats.ok() && !absl::IsCancelled(stats.status())) return stats.status();
  const absl::Status mine = callbacks.should_stop();  // says why, where `stats` only says that
  LF_RETURN_IF_ERROR(callbacks.agree(mine.ok() ? stats.status() : mine));
  figures_.attention_seconds += stats->attention_seconds;
  figures_.attention_exchange_seconds += stats->communication_seconds;
  figures_.attention_exposed_seconds += stats->exposed_seconds;
  figures_.rank_covered_pairs += stats->covered_pairs;
  figures_.rank_computed_pairs += stats->computed_pairs;
  return std::move(stats->sampled_lse);
}

// Of the layer's Q and K. A rank that is told to stop goes on to AttendHeads, which says so to all.
absl::StatusOr<LayerIndex> Transformer::BuildIndex(std::span<const HeadPattern> patterns,
                                                   const LayerParallelism& parallel,
                                                   const LayerCallbacks& callbacks) {
  absl::StatusOr<LayerIndex> index = parallel.index_builder->Build(
      plan_, Heads(q_, 0), Heads(k_, 0), patterns, Rotary(config_.rope.rotary_dim),
      [&] { return !callbacks.should_stop().ok(); });
  if (index.ok()) figures_.index_seconds += index->seconds - index->communication_seconds;
  return index;
}

// Computes the heads that fall short again, with larger budgets, then over all keys. The recall is the same
// on all ranks, and so is every branch here.
absl::Status Transformer::GuardRecall(int64_t window, std::span<const HeadPattern> patterns,
                                      const LayerParallelism& parallel, const LayerCallbacks& callbacks,
                                      LayerRecall* recall) {
  if (parallel.min_recall == 0) return absl::OkStatus();
  const int64_t num_tokens = plan_.num_tokens();
  const HeadPattern all_keys = SeesAllPattern(window, num_tokens);
  std::map<int32_t, RecomputedHead> recomputed;
  constexpr size_t kLast = std::size(kBudgetFactors);
  for (size_t step = 0; step <= kLast; ++step) {
    std::vector<int32_t> heads;
    std::vector<HeadPattern> wider(patterns.size(), all_keys);  // costs nothing where a head is not computed
    for (size_t h = 0; h < patterns.size(); ++h) {
      if (recall->heads[h] >= parallel.min_recall) continue;
      heads.push_back(static_cast<int32_t>(h));
      if (step < kLast) wider[h] = WidenedPattern(patterns[h], kBudgetFactors[step], window, num_tokens);
    }
    if (heads.empty()) break;
    absl::StatusOr<LayerIndex> index = BuildIndex(wider, parallel, callbacks);
    if (ShareSelector::HadNoRoom(index.status()) && step < kLast)
      continue;  // on all ranks; all keys need none
    LF_RETURN_IF_ERROR(index.status());
    LF_ASSIGN_OR_RETURN(const std::vector<float> lse,
                        AttendHeads(*index, heads, parallel.recall, parallel, callbacks));
    LF_ASSIGN_OR_RETURN(const std::vector<double> got, parallel.recall->Recall(lse));
    for (const int32_t head : heads) {
      const auto h = static_cast<size_t>(head);
      RecomputedHead& to =
          recomputed.try_emplace(head, RecomputedHead{.recall_before = recall->heads[h]}).first->second;
      recall->heads[h] = SeesAllKeys(wider[h], index->pairs[h], window, num_tokens) ? 1 : got[h];
      to.head = head;
      to.pattern = wider[h];
      to.recall = recall->heads[h];
      to.density =
          static_cast<double>(index->pairs[h].covered) / static_cast<double>(CausalPairs(num_tokens));
    }
  }
  for (const auto& [head, entry] : recomputed) recall->recomputed.push_back(entry);
  return absl::OkStatus();
}

// residual -> norm -> Q, K, V, head-major; rotated, but for queries that each part of the keys sees otherwise
absl::Status Transformer::ProjectChunk(const LayerWeights& layer, Projected what, int64_t begin,
                                       int64_t num_rows) {
  const int64_t hidden = config_.hidden_size;
  LF_RETURN_IF_ERROR(
      Norm(Rows(residual_, begin, hidden), layer.input_norm, num_rows, hidden, normed_.data()));
  const int64_t rotary_dim = config_.rope.rotary_dim;
  if (what != Projected::kKeysAndValues) {
    const bool split = config_.rope.dual_chunk.Splits(plan_.num_tokens());
    LF_RETURN_IF_ERROR(ProjectHeads(layer.q_proj, layer.q_norm, split ? 0 : rotary_dim, begin, num_rows, q_));
  }
  if (what == Projected::kQueries) return absl::OkStatus();
  LF_RETURN_IF_ERROR(ProjectHeads(layer.k_proj, layer.k_norm, rotary_dim, begin, num_rows, k_));
  return ProjectHeads(layer.v_proj, nullptr, 0, begin, num_rows, v_);
}

// residual += o_proj(attention); residual += down_proj(activation(gate_proj(norm(residual))) * up_proj(...))
absl::Status Transformer::FinishLayer(const LayerWeights& layer, int64_t begin, int64_t end) {
  const int64_t rows = end - begin;
  void* residual = Rows(residual_, begin, config_.hidden_size);
  const void* attention = Rows(attention_, begin, config_.num_q_heads * config_.head_dim);
  LF_RETURN_IF_ERROR(Linear(attention, layer.o_proj, rows, /*accumulate=*/true, residual, dtype_));
  LF_RETURN_IF_ERROR(Norm(residual, layer.post_attention_norm, rows, config_.hidden_size, normed_.data()));
  LF_RETURN_IF_ERROR(Linear(normed_.data(), layer.gate_proj, rows, false, wide_.data(), dtype_));
  LF_RETURN_IF_ERROR(Linear(normed_.data(), layer.up_proj, rows, false, up_.data(), dtype_));
  timer_.Begin(kOther);
  LF_RETURN_IF_ERROR(kernels_.GatedActivation({.gate = wide_.data(),
                                               .up = up_.data(),
                                               .in_stride = config_.intermediate_size,
                                               .activation = config_.activation,
                                               .num_rows = rows,
                                               .width = config_.intermediate_size,
                                               .out = wide_.data()},
                                              stream_));
  return Linear(wide_.data(), layer.down_proj, rows, /*accumulate=*/true, residual, dtype_);
}

absl::Status Transformer::Logits(std::span<const int64_t> rows, std::span<float> logits) {
  LF_CHECK(logits.size() == rows.size() * static_cast<size_t>(config_.vocab_size));
  if (rows.empty()) return absl::OkStatus();
  const int64_t row_bytes = config_.vocab_size * static_cast<int64_t>(sizeof(float));
  const size_t piece = static_cast<size_t>(std::min(chunk_, wide_.size_bytes() / row_bytes));
  for (size_t begin = 0; begin < rows.size(); begin += piece) {
    const std::span<const int64_t> some = rows.subspan(begin, std::min(piece, rows.size() - begin));
    const auto count = static_cast<int64_t>(some.size());
    LF_RETURN_IF_ERROR(FinalNorm(some));
    LF_RETURN_IF_ERROR(
        Linear(normed_.data(), weights_.lm_head(), count, false, wide_.data(), DType::kFloat32));
    timer_.Begin(PartTimer::kNoPart);
    float* out = logits.data() + begin * static_cast<size_t>(config_.vocab_size);
    LF_RETURN_IF_ERROR(kernels_.CopyOut(out, wide_.data(), count * row_bytes, stream_));
  }
  return stream_.Sync();
}

// normed_[i] = final norm of residual row rows[i]
absl::Status Transformer::FinalNorm(std::span<const int64_t> rows) {
  const int64_t width = config_.hidden_size;
  for (size_t begin = 0; begin < rows.size();) {
    size_t end = begin + 1;  // rows that follow one another are normed together
    while (end < rows.size() && rows[end] == rows[end - 1] + 1) ++end;
    LF_RETURN_IF_ERROR(Norm(Rows(residual_, rows[begin], width), weights_.final_norm(),
                            static_cast<int64_t>(end - begin), width,
                            Rows(normed_, static_cast<int64_t>(begin), width)));
    begin = end;
  }
  return absl::OkStatus();
}

absl::StatusOr<LayerFigures> Transformer::Figures() {
  LF_RETURN_IF_ERROR(timer_.Finish());
  LayerFigures figures = figures_;
  figures.gemm_seconds = timer_.seconds(kGemm);
  figures.other_seconds = timer_.seconds(kOther);
  return figures;
}

absl::Status Transformer::Norm(const void* x, const float* weight, int64_t num_rows, int64_t width,
                               void* out) {
  timer_.Begin(kOther);
  return kernels_.RmsNorm({.x = x,
                           .weight = weight,
                           .epsilon = static_cast<float>(config_.rms_norm_eps),
                           .num_rows = num_rows,
                           .width = width,
                           .out = out},
                          stream_);
}

absl::Status Transformer::Linear(const void* x, const LinearWeights& linear, int64_t num_rows,
                                 bool accumulate, void* out, DType out_dtype) {
  timer_.Begin(kGemm);
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
                        .out_dtype = out_dtype,
                        .out_stride = linear.out_width},
                       {workspace_.data(), workspace_.size_bytes()}, stream_);
}

absl::Status Transformer::ProjectHeads(const LinearWeights& linear, const float* norm, int64_t rotary_dim,
                                       int64_t begin, int64_t num_rows, const Buffer& heads) {
  const int64_t num_heads = linear.out_width / config_.head_dim;
  LF_RETURN_IF_ERROR(Linear(normed_.data(), linear, num_rows, false, wide_.data(), dtype_));
  if (norm != nullptr) {
    LF_RETURN_IF_ERROR(Norm(wide_.data(), norm, num_rows * num_heads, config_.head_dim, wide_.data()));
  }
  RotaryParams params = Rotary(rotary_dim);
  params.x = wide_.data();
  params.x_stride = linear.out_width;
  params.num_rows = num_rows;
  params.num_heads = num_heads;
  params.head_stride = num_tokens_ * config_.head_dim;
  return RotateHeads(params, begin, heads);
}

// What vectors are rotated with, whatever their places.
RotaryParams Transformer::Rotary(int64_t rotary_dim) const {
  RotaryParams params;
  params.inv_freq = std::span(rotary_.inv_freq).first(static_cast<size_t>(rotary_dim / 2));
  params.attention_scale = rotary_.attention_scale;
  params.form = config_.rope.form;
  params.rotary_dim = rotary_dim;
  params.head_dim = config_.head_dim;
  return params;
}

// Rows from `begin` on, into their places in `heads`. Each of dual chunks counts its positions anew.
absl::Status Transformer::RotateHeads(RotaryParams params, int64_t begin, const Buffer& heads) {
  timer_.Begin(kOther);
  const DualChunk& dual_chunk = config_.rope.dual_chunk;
  const int64_t num_tokens = plan_.num_tokens();
  const int64_t end = begin + params.num_rows;
  for (int64_t row = begin; row < end;) {
    const int64_t chunk = dual_chunk.ChunkOf(positions_.Position(row), num_tokens);
    const TokenRange tokens = dual_chunk.Tokens(chunk, num_tokens);
    const int64_t first_row = positions_.RowsBelow(tokens.begin);
    params.positions = positions_.From(first_row);
    params.positions.first -= tokens.begin;
    params.row_offset = row - first_row;
    params.num_rows = std::min(end, positions_.RowsBelow(tokens.end)) - row;
    params.out = Rows(heads, first_row, config_.head_dim);
    LF_RETURN_IF_ERROR(kernels_.Rotary(params, stream_));
    params.x = Advance(params.x, params.num_rows * params.x_stride, dtype_);
    row += params.num_rows;
  }
  return absl::OkStatus();
}

HeadsView<const void> Transformer::Heads(const Buffer& buffer, int64_t row) const {
  return {Rows(buffer, row, config_.head_dim), num_tokens_ * config_.head_dim, config_.head_dim};
}

void* Transformer::Rows(const Buffer& buffer, int64_t row, int64_t width) const {
  return Advance(buffer.data(), row * width, dtype_);
}

}  // namespace longfill
