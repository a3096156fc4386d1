#include "runtime/engine/prefill_run.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "kernels/sparse/coverage.h"
#include "models/transformer.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int64_t PeakResidentBytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

// What a rank reports at the end of a request; exchanged as bytes between processes of one build.
struct RankFigures {
  double index_seconds = 0;
  double attention_seconds = 0;
  double gemm_seconds = 0;
  double other_seconds = 0;
  double recall_seconds = 0;
  double communication_seconds = 0;
  double exposed_communication_seconds = 0;
  double exposed_copy_seconds = 0;
  int64_t covered_pairs = 0;
  int64_t computed_pairs = 0;
  int64_t kv_bytes = 0;
  int64_t peak_memory_bytes = 0;
  int64_t peak_device_bytes = 0;
  int64_t held_device_bytes = 0;
  int64_t outside_device_bytes = 0;
  int64_t has_kv_checksum = 0;
  int64_t kv_checksum = 0;
};

PrefillFigures JoinFigures(const std::vector<RankFigures>& ranks, const ShardPlan& plan,
                           const ModelConfig& config, const PairCounts& pairs) {
  PrefillFigures figures;
  figures.tokens = plan.num_tokens();
  figures.ranks = plan.mesh().size();
  figures.mesh = plan.mesh();
  figures.published_pairs = pairs.published;
  figures.covered_pairs = pairs.covered;
  const auto raise = [](auto& most, auto value) { most = std::max(most, value); };
  for (const RankFigures& rank : ranks) {
    raise(figures.index_seconds, rank.index_seconds);
    raise(figures.attention_seconds, rank.attention_seconds);
    raise(figures.linear_seconds, rank.gemm_seconds + rank.other_seconds);
    raise(figures.gemm_seconds, rank.gemm_seconds);
    raise(figures.other_seconds, rank.other_seconds);
    raise(figures.recall.seconds, rank.recall_seconds);
    raise(figures.communication_seconds, rank.communication_seconds);
    raise(figures.exposed_communication_seconds, rank.exposed_communication_seconds);
    raise(figures.exposed_copy_seconds, rank.exposed_copy_seconds);
    raise(figures.peak_memory_bytes, rank.peak_memory_bytes);
    raise(figures.peak_device_bytes, rank.peak_device_bytes);
    raise(figures.held_device_bytes, rank.held_device_bytes);
    raise(figures.outside_device_bytes, rank.outside_device_bytes);
    figures.rank_covered_pairs.push_back(rank.covered_pairs);
    figures.computed_pairs += rank.computed_pairs;
    figures.kv_bytes += rank.kv_bytes;
    if (rank.has_kv_checksum != 0) {
      figures.rank_kv_checksums.push_back(static_cast<uint32_t>(rank.kv_checksum));
    }
  }
  const double all_pairs = static_cast<double>(CausalPairs(plan.num_tokens())) *
                           static_cast<double>(config.num_layers * config.num_q_heads);
  figures.density = static_cast<double>(pairs.covered) / all_pairs;
  const int64_t most = *std::ranges::max_element(figures.rank_covered_pairs);
  const double mean = static_cast<double>(pairs.covered) / figures.ranks;
  figures.imbalance = mean > 0 ? static_cast<double>(most) / mean : 1;
  return figures;
}

class PrefillRun {
 public:
  PrefillRun(EngineState& engine, const PrefillRequest& request, const PrefillCallbacks& callbacks)
      : engine_(engine),
        request_(request),
        callbacks_(callbacks),
        plan_(engine.options.mesh, static_cast<int64_t>(request.token_ids.size())),
        transfer_{.request_id = request.request_id,
                  .transfer_id = request.transfer_id,
                  .plan = plan_,
                  .rank = engine.world.rank(),
                  .num_layers = engine.config.num_layers,
                  .num_kv_heads = engine.config.num_kv_heads,
                  .head_dim = engine.config.head_dim,
                  .dtype = request.kv_dtype} {
    result_.positions = request.logits_positions;
  }

  absl::StatusOr<PrefillResult> Run(const KvSinkFactory& sink_factory);

 private:
  // What holds memory of the backend for this prompt.
  struct Work {
    std::unique_ptr<Transformer> transformer;
    Buffer relay_k, relay_v;            // PeerKeys, where there are several hosts
    std::unique_ptr<PeerMemory> peers;  // of the transformer's keys and values, or of these
    std::optional<SparseIndexBuilder> index_builder;
    std::optional<RecallMonitor> recall;
    std::unique_ptr<KvExporter> exporter;
    IndexReplacement* replacement = nullptr;
    ~Work() {
      if (replacement != nullptr) replacement->End();
    }
  };

  absl::Status Open(const KvSinkFactory& sink_factory);
  absl::Status Compute();
  absl::Status Prepare(Work& work);
  absl::Status OpenPeers(Work& work);
  absl::Status RunLayers(Work& work);
  absl::Status ReportLayer(int64_t layer, Clock::time_point start);
  absl::Status LeaveDeviceToPeers();
  absl::Status CollectLogits(Transformer& transformer);
  absl::Status TakeFigures(Work& work);
  void JoinRecall();
  absl::Status GatherFigures();

  EngineState& engine_;
  const PrefillRequest& request_;
  const PrefillCallbacks& callbacks_;
  const ShardPlan plan_;
  const KvTransferSpec transfer_;
  ResolvedAttention attention_;
  std::unique_ptr<KvSink> sink_;
  int64_t planned_device_bytes_ = 0;
  LayerFigures layers_;
  ShardedWeights::Seconds weights_;
  RankFigures mine_;
  PrefillResult result_;
};

absl::StatusOr<PrefillResult> PrefillRun::Run(const KvSinkFactory& sink_factory) {
  const Clock::time_point start = Clock::now();
  const double communication_start = engine_.device_world().seconds();
  absl::Status outcome = engine_.Agree(Open(sink_factory));
  if (outcome.ok()) outcome = Compute();
  const absl::Status left = LeaveDeviceToPeers();
  // Every rank ends its sink with the same outcome; a sink that fails to end is an error of all.
  absl::Status finished = sink_ != nullptr ? sink_->Finish(outcome) : absl::OkStatus();
  LF_RETURN_IF_ERROR(outcome);
  if (finished.ok()) finished = left;
  LF_RETURN_IF_ERROR(engine_.Agree(finished));
  const double outside_attention = engine_.device_world().seconds() - communication_start;
  mine_.communication_seconds =
      outside_attention + layers_.attention_exchange_seconds + weights_.communication;
  mine_.exposed_communication_seconds =
      outside_attention + layers_.attention_exposed_seconds + weights_.exposed;
  LF_RETURN_IF_ERROR(GatherFigures());
  result_.figures.seconds = SecondsSince(start);
  return std::move(result_);
}

absl::Status PrefillRun::Open(const KvSinkFactory& sink_factory) {
  LF_ASSIGN_OR_RETURN(attention_, engine_.Resolve(request_));
  LF_RETURN_IF_ERROR(engine_.CheckMemory(request_, attention_.patterns));
  planned_device_bytes_ = PlanMemory(engine_.PlanInput(request_, attention_.patterns)).PoolBytes();
  LF_ASSIGN_OR_RETURN(sink_, sink_factory(transfer_));
  return absl::OkStatus();
}

absl::Status PrefillRun::Compute() {
  engine_.backend->memory().ResetPeak();
  if (engine_.peer_copies) engine_.backend->peers()->memory().ResetPeak();
  Work work;
  LF_RETURN_IF_ERROR(engine_.Agree(Prepare(work)));
  if (callbacks_.on_accepted) callbacks_.on_accepted(attention_);
  absl::Status outcome = OpenPeers(work);
  if (outcome.ok()) outcome = RunLayers(work);
  if (outcome.ok()) outcome = CollectLogits(*work.transformer);
  if (outcome.ok()) outcome = engine_.Agree(TakeFigures(work));
  // Copies of K and V read memory of `work`.
  const absl::Status drained = work.exporter != nullptr ? work.exporter->Finish(outcome) : absl::OkStatus();
  if (engine_.peer_copies) {  // also where it could not be opened, since other hosts may have
    // What was given up may still be reading. An error is one of a device that whoever uses it next reports.
    engine_.backend->stream().Sync().IgnoreError();
    work.peers.reset();
    const absl::Status closed = engine_.Agree(absl::OkStatus());  // no peer has this rank's memory open
    if (outcome.ok()) outcome = closed;
  }
  if (!outcome.ok()) return outcome;
  if (work.exporter != nullptr) mine_.exposed_copy_seconds = work.exporter->exposed_seconds();
  return engine_.Agree(drained);
}

// All memory of the prompt but that of one layer's selection and attention; the embedded tokens.
absl::Status PrefillRun::Prepare(Work& work) {
  MemoryResource* kv_memory = engine_.peer_copies ? &engine_.backend->peers()->memory() : nullptr;
  if (engine_.relayed()) {
    const int64_t bytes =
        ParallelAttention::RelayBytes(GeometryOf(engine_.config), engine_.backend->kernels().compute_dtype(),
                                      plan_, engine_.peer_hosts, transfer_.rank);
    LF_ASSIGN_OR_RETURN(work.relay_k, kv_memory->Allocate(bytes, "keys of all hosts"));
    LF_ASSIGN_OR_RETURN(work.relay_v, kv_memory->Allocate(bytes, "values of all hosts"));
    kv_memory = nullptr;  // nobody reads the transformer's
  }
  LF_ASSIGN_OR_RETURN(work.transformer,
                      Transformer::Create(engine_.config, engine_.weights(), *engine_.backend, plan_,
                                          transfer_.rank, kv_memory));
  LF_ASSIGN_OR_RETURN(work.index_builder,
                      SparseIndexBuilder::Create(*engine_.backend, engine_.device_world(),
                                                 GeometryOf(engine_.config), request_.coverage));
  if (request_.recall.on()) {
    LF_ASSIGN_OR_RETURN(work.recall, RecallMonitor::Create(*engine_.backend, engine_.device_world(),
                                                           GeometryOf(engine_.config), plan_));
  }
  if (sink_ != nullptr) {
    LF_ASSIGN_OR_RETURN(
        work.exporter,
        KvExporter::Create(
            *engine_.backend, engine_.ring, *sink_,
            {.num_kv_heads = transfer_.num_kv_heads, .head_dim = transfer_.head_dim},
            {.timeout = engine_.options.kv_export.timeout, .should_stop = callbacks_.should_stop}));
  }
  if (engine_.options.index_replacement != nullptr) {
    work.replacement = engine_.options.index_replacement.get();
    LF_RETURN_IF_ERROR(work.replacement->Begin(*engine_.backend, plan_.num_tokens()));
  }
  const PositionMap positions = plan_.TokenPositions(transfer_.rank);
  std::vector<int32_t> ids(static_cast<size_t>(plan_.NumTokens(transfer_.rank)));
  for (size_t row = 0; row < ids.size(); ++row) {
    ids[row] = request_.token_ids[static_cast<size_t>(positions.Position(static_cast<int64_t>(row)))];
  }
  return work.transformer->Embed(ids);
}

// Collective.
absl::Status PrefillRun::OpenPeers(Work& work) {
  if (!engine_.peer_copies) return absl::OkStatus();
  const bool relayed = engine_.relayed();
  const Buffer* const buffers[] = {relayed ? &work.relay_k : &work.transformer->keys(),
                                   relayed ? &work.relay_v : &work.transformer->values()};
  absl::StatusOr<std::unique_ptr<PeerMemory>> opened =
      PeerMemory::Open(engine_.peers(), *engine_.backend->peers(), buffers);
  const absl::Status status = opened.status();
  if (status.ok()) work.peers = *std::move(opened);
  return relayed ? engine_.Agree(status) : status;
}

absl::Status PrefillRun::RunLayers(Work& work) {
  const PeerKeys keys{work.peers.get(), work.relay_k.data(), work.relay_v.data()};
  LayerParallelism parallel = {.index_builder = &*work.index_builder,
                               .attention = engine_.attention.get(),
                               .peers = work.peers != nullptr ? &keys : nullptr,
                               .layer_weights = engine_.sharded_weights.get(),
                               .recall = work.recall.has_value() ? &*work.recall : nullptr,
                               .min_recall = request_.recall.min_recall,
                               .dense_without_room = request_.attention.dense_without_room};
  if (engine_.sharded_weights != nullptr) engine_.sharded_weights->ResetSeconds();
  if (work.replacement != nullptr) {
    parallel.replace_index = [&](int64_t layer, LayerIndex* index) {
      return work.replacement->Replace(layer, index);
    };
  }
  int64_t layer = 0;
  LayerCallbacks layer_callbacks;
  layer_callbacks.on_kv = [&](int64_t row_begin, int64_t row_end, HeadsView<const void> key,
                              HeadsView<const void> value) {
    if (work.exporter == nullptr) return absl::OkStatus();
    return work.exporter->OnKv(layer, row_begin, row_end, key, value);
  };
  if (work.exporter != nullptr) {
    layer_callbacks.before_kv_overwrite = [&] { return work.exporter->BeforeOverwrite(); };
  }
  layer_callbacks.should_stop = [&] {
    return callbacks_.should_stop ? callbacks_.should_stop() : absl::OkStatus();
  };
  layer_callbacks.agree = [&](const absl::Status& mine) { return engine_.Agree(mine); };
  const Clock::time_point start = Clock::now();
  for (; layer < engine_.config.num_layers; ++layer) {
    LF_RETURN_IF_ERROR(
        work.transformer->RunLayer(layer, attention_.patterns.layer(layer), parallel, layer_callbacks));
    LF_RETURN_IF_ERROR(ReportLayer(layer, start));
  }
  return absl::OkStatus();
}

// Once the layer has run, not when it was enqueued.
absl::Status PrefillRun::ReportLayer(int64_t layer, Clock::time_point start) {
  if (!callbacks_.on_progress) return absl::OkStatus();
  // Peers do not wait for this, so an error here cannot be agreed on.
  if (absl::Status status = engine_.backend->stream().Sync(); !status.ok()) return engine_.Break(status);
  const int64_t num_layers = engine_.config.num_layers;
  callbacks_.on_progress({.total_tokens = plan_.num_tokens(),
                          .processed_tokens = plan_.num_tokens() * (layer + 1) / num_layers,
                          .layers_done = layer + 1,
                          .num_layers = num_layers,
                          .seconds = SecondsSince(start)});
  return absl::OkStatus();
}

// After each prompt, before the ranks agree on its end: what this one keeps for its next prompt would be
// missing in those of the ranks that share the device.
absl::Status PrefillRun::LeaveDeviceToPeers() {
  if (engine_.ranks_on_device == 1) return absl::OkStatus();
  LF_RETURN_IF_ERROR(engine_.backend->stream().Sync());
  return engine_.backend->memory().Trim();
}

// The rank that owns a position computes its logits and sends them to rank 0, which puts them in the order
// asked.
absl::Status PrefillRun::CollectLogits(Transformer& transformer) {
  const size_t vocab = static_cast<size_t>(engine_.config.vocab_size);
  const int me = transfer_.rank;
  std::vector<std::vector<size_t>> owned(static_cast<size_t>(engine_.world.size()));  // places in positions
  for (size_t i = 0; i < result_.positions.size(); ++i) {
    owned[static_cast<size_t>(plan_.RankOfToken(result_.positions[i]))].push_back(i);
  }
  std::vector<int64_t> rows;
  for (const size_t i : owned[static_cast<size_t>(me)]) {
    rows.push_back(plan_.TokenPositions(me).RowsBelow(result_.positions[i]));
  }
  std::vector<float> mine(rows.size() * vocab);
  LF_RETURN_IF_ERROR(engine_.Agree(transformer.Logits(rows, mine)));

  std::vector<int64_t> send_bytes(owned.size(), 0);
  std::vector<int64_t> recv_bytes(owned.size(), 0);
  send_bytes[0] = static_cast<int64_t>(mine.size() * sizeof(float));
  size_t total = 0;
  for (size_t rank = 0; me == 0 && rank < owned.size(); ++rank) {
    recv_bytes[rank] = static_cast<int64_t>(owned[rank].size() * vocab * sizeof(float));
    total += owned[rank].size() * vocab;
  }
  std::vector<float> received(total);
  if (absl::Status status =
          engine_.world.AllToAll(mine.data(), send_bytes, received.data(), recv_bytes, engine_.host_stream);
      !status.ok()) {
    return engine_.Break(status);
  }
  if (me != 0) return absl::OkStatus();
  result_.logits.resize(total);
  const float* next = received.data();
  for (const std::vector<size_t>& places : owned) {
    for (const size_t place : places) {
      std::copy_n(next, vocab, result_.logits.begin() + static_cast<std::ptrdiff_t>(place * vocab));
      next += vocab;
    }
  }
  return absl::OkStatus();
}

absl::Status PrefillRun::TakeFigures(Work& work) {
  LF_ASSIGN_OR_RETURN(layers_, work.transformer->Figures());
  mine_.index_seconds = layers_.index_seconds;
  mine_.attention_seconds = layers_.attention_seconds;
  mine_.gemm_seconds = layers_.gemm_seconds;
  mine_.other_seconds = layers_.other_seconds;
  if (engine_.sharded_weights != nullptr) {
    LF_ASSIGN_OR_RETURN(weights_, engine_.sharded_weights->TakenSeconds());
  }
  mine_.recall_seconds = layers_.recall_seconds;
  mine_.covered_pairs = layers_.rank_covered_pairs;
  mine_.computed_pairs = layers_.rank_computed_pairs;
  mine_.peak_device_bytes = engine_.backend->memory().peak_bytes();
  LF_ASSIGN_OR_RETURN(mine_.held_device_bytes, engine_.backend->memory().PeakHeldBytes());
  if (engine_.peer_copies) {  // taken for the whole prompt
    const int64_t shared = engine_.backend->peers()->memory().peak_bytes();
    mine_.peak_device_bytes += shared;
    mine_.held_device_bytes += shared;
  }
  return absl::OkStatus();
}

absl::Status PrefillRun::GatherFigures() {
  mine_.kv_bytes = sink_ != nullptr ? transfer_.OwnedBytes() : 0;
  mine_.peak_memory_bytes = PeakResidentBytes();
  const absl::StatusOr<int64_t> outside = OutsideBytesInUse(*engine_.backend, engine_.ranks_on_device);
  mine_.outside_device_bytes = outside.value_or(engine_.outside_bytes);
  const std::optional<uint32_t> checksum = sink_ != nullptr ? sink_->checksum() : std::nullopt;
  mine_.has_kv_checksum = checksum.has_value() ? 1 : 0;
  mine_.kv_checksum = checksum.value_or(0);
  std::vector<RankFigures> all(static_cast<size_t>(engine_.world.size()));
  const std::vector<int64_t> counts(all.size(), sizeof(RankFigures));
  if (absl::Status status = engine_.world.AllGather(&mine_, all.data(), counts, engine_.host_stream);
      !status.ok()) {
    return engine_.Break(status);
  }
  PrefillFigures& figures = result_.figures;
  figures = JoinFigures(all, plan_, engine_.config, layers_.pairs);
  figures.heads_without_room = layers_.heads_without_room;
  if (request_.recall.on()) JoinRecall();
  figures.planned_device_bytes = planned_device_bytes_;
  figures.device = engine_.backend->facts().name;
  figures.communicator = std::string(engine_.device_world().name());
  figures.compute_dtype = engine_.backend->kernels().compute_dtype();
  return absl::OkStatus();
}

// Into figures that have everything else.
void PrefillRun::JoinRecall() {
  const AttentionGeometry geometry = GeometryOf(engine_.config);
  RecallFigures& recall = result_.figures.recall;
  recall.rows = static_cast<int64_t>(SampledPositions(plan_.num_tokens(), geometry.q_per_kv()).size());
  recall.min_recall = request_.recall.min_recall;
  recall.layers = std::move(layers_.recall);
  double sum = 0;
  int64_t watched_pairs = 0;
  for (size_t layer = 0; layer < recall.layers.size(); ++layer) {
    const std::vector<double>& heads = recall.layers[layer].heads;
    for (size_t head = 0; head < heads.size(); ++head) {
      sum += heads[head];
      if (heads[head] >= recall.min) continue;
      recall.min = heads[head];
      recall.min_layer = static_cast<int64_t>(layer);
      recall.min_head = static_cast<int64_t>(head);
    }
    recall.recomputed += static_cast<int64_t>(recall.layers[layer].recomputed.size());
    if (recall.layers[layer].watched) {
      watched_pairs += RecallMonitor::ComputedPairs(geometry, plan_.num_tokens(),
                                                    engine_.config.WindowOf(static_cast<int64_t>(layer)));
    }
  }
  recall.mean = sum / static_cast<double>(engine_.config.num_layers * engine_.config.num_q_heads);
  recall.pair_share =
      static_cast<double>(watched_pairs) / static_cast<double>(result_.figures.computed_pairs);
}

}  // namespace

absl::StatusOr<PrefillResult> RunPrefill(EngineState& engine, const PrefillRequest& request,
                                         const KvSinkFactory& sink_factory,
                                         const PrefillCallbacks& callbacks) {
  absl::StatusOr<PrefillResult> result = PrefillRun(engine, request, callbacks).Run(sink_factory);
  if (result.ok() || !engine.healthy) return result;
  LF_RETURN_IF_ERROR(engine.CheckDevice());
  // The error is either agreed on, and every rank comes here, or of a collective inside a layer, which has
  // broken the group without passing through Agree.
  if (!engine.world.Barrier(engine.host_stream).ok()) return engine.Break(result.status());
  return result;
}

}  // namespace longfill
