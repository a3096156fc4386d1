#include "runtime/engine/prefill_engine.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/thread_pool.h"
#include "kernels/cpu/cpu_kernel_set.h"
#include "models/fingerprint.h"
#include "models/transformer.h"
#include "models/weights.h"
#include "runtime/engine/request_plan.h"

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
  double linear_seconds = 0;
  double communication_seconds = 0;
  int64_t covered_pairs = 0;
  int64_t computed_pairs = 0;
  int64_t kv_bytes = 0;
  int64_t peak_memory_bytes = 0;
};

PrefillFigures JoinFigures(const std::vector<RankFigures>& ranks, const ShardPlan& plan,
                           const ModelConfig& config, const PairCounts& pairs) {
  PrefillFigures figures;
  figures.tokens = plan.num_tokens();
  figures.ranks = plan.mesh().size();
  figures.mesh = plan.mesh();
  figures.published_pairs = pairs.published;
  figures.covered_pairs = pairs.covered;
  for (const RankFigures& rank : ranks) {
    figures.index_seconds = std::max(figures.index_seconds, rank.index_seconds);
    figures.attention_seconds = std::max(figures.attention_seconds, rank.attention_seconds);
    figures.linear_seconds = std::max(figures.linear_seconds, rank.linear_seconds);
    figures.communication_seconds = std::max(figures.communication_seconds, rank.communication_seconds);
    figures.rank_covered_pairs.push_back(rank.covered_pairs);
    figures.computed_pairs += rank.computed_pairs;
    figures.kv_bytes += rank.kv_bytes;
    figures.peak_memory_bytes = std::max(figures.peak_memory_bytes, rank.peak_memory_bytes);
  }
  const double all_pairs = static_cast<double>(CausalPairs(plan.num_tokens())) *
                           static_cast<double>(config.num_layers * config.num_q_heads);
  figures.density = static_cast<double>(pairs.covered) / all_pairs;
  const int64_t most =
      *std::max_element(figures.rank_covered_pairs.begin(), figures.rank_covered_pairs.end());
  const double mean = static_cast<double>(pairs.covered) / figures.ranks;
  figures.imbalance = mean > 0 ? static_cast<double>(most) / mean : 1;
  return figures;
}

absl::StatusOr<std::optional<AttentionSpec>> ReadModelPatterns(const std::string& model_dir) {
  const std::string path = model_dir + "/patterns.json";
  if (!std::filesystem::exists(path)) return std::nullopt;
  LF_ASSIGN_OR_RETURN(AttentionSpec spec, ReadAttentionSpec(path));
  return spec;
}

}  // namespace

struct PrefillEngine::Impl {
  Impl(EngineOptions options_in, Communicator& world_in)
      : options(std::move(options_in)), world(world_in), pool(options.num_threads) {}

  absl::Status Load();
  absl::Status CheckRanksHaveOneModel();
  absl::StatusOr<PrefillResult> Run(const PrefillRequest& request, const KvSinkFactory& sink_factory,
                                    const PrefillCallbacks& callbacks);
  absl::StatusOr<PrefillResult> RunInGroup(const PrefillRequest& request, const KvSinkFactory& sink_factory,
                                           const PrefillCallbacks& callbacks);
  absl::Status Compute(const PrefillRequest& request, const ShardPlan& plan, const PatternSet& patterns,
                       KvSink& sink, const PrefillCallbacks& callbacks, LayerFigures* layers,
                       PrefillResult* result);
  absl::Status RunLayers(Transformer& transformer, const PrefillRequest& request, const ShardPlan& plan,
                         const PatternSet& patterns, KvSink& sink, const PrefillCallbacks& callbacks,
                         LayerFigures* figures);
  absl::Status CollectLogits(Transformer& transformer, const ShardPlan& plan, PrefillResult* result);
  absl::Status CollectFigures(const ShardPlan& plan, const KvTransferSpec& transfer,
                              const LayerFigures& layers, double communication_seconds,
                              PrefillFigures* figures);
  absl::Status Send(const RankCommand& command);
  absl::Status Agree(const absl::Status& mine);
  MemoryPlanInput PlanInput(const PrefillRequest& request) const;
  absl::StatusOr<int64_t> AvailableBytes() const;
  absl::Status CheckMemory(const PrefillRequest& request) const;
  // After this the group is of no more use: a collective failed here, or is failing on a peer.
  absl::Status Break(const absl::Status& reason);

  EngineOptions options;
  Communicator& world;
  ThreadPool pool;
  CpuMemoryResource memory;
  CpuStream stream;
  std::unique_ptr<KernelSet> kernels;
  ModelConfig config;
  std::unique_ptr<const ModelWeights> weights;
  std::string fingerprint;
  std::unique_ptr<ParallelAttention> attention;
  std::atomic<bool> healthy{true};
  bool shut_down = false;
};

absl::Status PrefillEngine::Impl::Load() {
  if (options.mesh.size() != world.size()) {
    return absl::InvalidArgumentError(absl::StrCat("mesh ", ToString(options.mesh), " has ",
                                                   options.mesh.size(), " ranks, but ", world.size(),
                                                   " were started"));
  }
  LF_ASSIGN_OR_RETURN(config, LoadModelConfig(options.model_dir));
  LF_ASSIGN_OR_RETURN(options.attention.model_patterns, ReadModelPatterns(options.model_dir));
  LF_ASSIGN_OR_RETURN(weights, ModelWeights::Load(options.model_dir, config));
  LF_ASSIGN_OR_RETURN(fingerprint, ModelFingerprint(config, *weights));
  kernels = CreateCpuKernelSet(pool, memory);
  return absl::OkStatus();
}

absl::Status PrefillEngine::Impl::CheckRanksHaveOneModel() {
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> all, AllGatherStrings(world, fingerprint, stream));
  for (size_t rank = 1; rank < all.size(); ++rank) {
    if (all[rank] != all[0]) {
      return absl::FailedPreconditionError(absl::StrCat("rank ", rank, " has another model in ",
                                                        options.model_dir, " (", all[rank], ") than rank 0 (",
                                                        all[0], ")"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<PrefillEngine>> PrefillEngine::Create(const EngineOptions& options,
                                                                     Communicator& world) {
  auto impl = std::make_unique<Impl>(options, world);
  LF_RETURN_IF_ERROR(AgreeOnStatus(world, impl->Load(), impl->stream));
  LF_RETURN_IF_ERROR(impl->CheckRanksHaveOneModel());
  LF_ASSIGN_OR_RETURN(impl->attention, ParallelAttention::Create(*impl->kernels, world, options.mesh,
                                                                 GeometryOf(impl->config)));
  return std::unique_ptr<PrefillEngine>(new PrefillEngine(std::move(impl)));
}

PrefillEngine::PrefillEngine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PrefillEngine::~PrefillEngine() = default;

const ModelConfig& PrefillEngine::config() const { return impl_->config; }
const std::string& PrefillEngine::model_fingerprint() const { return impl_->fingerprint; }
const Mesh& PrefillEngine::mesh() const { return impl_->options.mesh; }
int64_t PrefillEngine::weights_bytes() const { return impl_->weights->bytes(); }
Communicator& PrefillEngine::world() { return impl_->world; }
bool PrefillEngine::healthy() const { return impl_->healthy.load(); }

MemoryPlanInput PrefillEngine::Impl::PlanInput(const PrefillRequest& request) const {
  return {.config = &config,
          .weights_bytes = weights->bytes(),
          .mesh = options.mesh,
          .num_tokens = static_cast<int64_t>(request.token_ids.size()),
          .num_logits = std::max<int64_t>(1, static_cast<int64_t>(request.logits_positions.size())),
          .kv_dtype = request.kv_dtype,
          .keep_kv = options.keep_kv};
}

absl::StatusOr<int64_t> PrefillEngine::Impl::AvailableBytes() const {
  if (options.memory_limit_bytes != 0) return options.memory_limit_bytes;
  LF_ASSIGN_OR_RETURN(const int64_t available, AvailableMemoryBytes(options.ranks_on_host));
  // Mapped weights are in the page cache or can be: they need no memory that is not counted as available.
  return available + weights->mapped_bytes();
}

absl::Status PrefillEngine::Impl::CheckMemory(const PrefillRequest& request) const {
  LF_ASSIGN_OR_RETURN(const int64_t available, AvailableBytes());
  return CheckFits(PlanInput(request), available);
}

MemoryPlan PrefillEngine::PlanMemory(const PrefillRequest& request) const {
  return longfill::PlanMemory(impl_->PlanInput(request));
}

int64_t PrefillEngine::LongestPrompt(const PrefillRequest& request) const {
  const absl::StatusOr<int64_t> available = impl_->AvailableBytes();
  if (!available.ok()) return 0;
  return longfill::LongestPrompt(impl_->PlanInput(request), *available,
                                 impl_->config.max_position_embeddings);
}

std::string PrefillEngine::DescribeAuto() const { return longfill::DescribeAuto(impl_->options.attention); }

absl::Status PrefillEngine::Validate(const PrefillRequest& request) const {
  const int64_t num_tokens = static_cast<int64_t>(request.token_ids.size());
  const ModelConfig& config = impl_->config;
  if (num_tokens == 0) return absl::InvalidArgumentError("the prompt is empty");
  if (num_tokens > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the prompt has ", num_tokens, " tokens, the model takes at most ", config.max_position_embeddings));
  }
  for (int64_t i = 0; i < num_tokens; ++i) {
    const int32_t id = request.token_ids[static_cast<size_t>(i)];
    if (id < 0 || id >= config.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("token id ", id, " at position ", i,
                                                     " is outside the vocabulary of ", config.vocab_size));
    }
  }
  for (const int64_t position : request.logits_positions) {
    if (position < 0 || position >= num_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("logits position ", position, " is outside the prompt of ", num_tokens, " tokens"));
    }
  }
  if (!IsFloat(request.kv_dtype)) {
    return absl::InvalidArgumentError(absl::StrCat("KV dtype ", std::string(DTypeName(request.kv_dtype)),
                                                   " is not float32, bfloat16 or float16"));
  }
  const absl::StatusOr<ResolvedAttention> attention = ResolveAttention(
      request.attention, impl_->options.attention, num_tokens, config.num_layers, config.num_q_heads);
  LF_RETURN_IF_ERROR(attention.status());
  return impl_->CheckMemory(request);
}

absl::Status PrefillEngine::Impl::Break(const absl::Status& reason) {
  healthy = false;
  world.Abort(reason);
  return reason;
}

absl::Status PrefillEngine::Impl::Send(const RankCommand& command) {
  const absl::StatusOr<std::string> sent = BroadcastString(world, Encode(command), 0, stream);
  return sent.ok() ? absl::OkStatus() : Break(sent.status());
}

// One number for the common case; the texts only where some rank has an error.
absl::Status PrefillEngine::Impl::Agree(const absl::Status& mine) {
  int64_t failed = mine.ok() ? 0 : 1;
  if (absl::Status status = world.AllReduce(&failed, 1, ReduceType::kInt64, ReduceOp::kMax, stream);
      !status.ok()) {
    return Break(status);
  }
  return failed == 0 ? absl::OkStatus() : AgreeOnStatus(world, mine, stream);
}

absl::StatusOr<PrefillResult> PrefillEngine::Prefill(const PrefillRequest& request,
                                                     const KvSinkFactory& sink_factory,
                                                     const PrefillCallbacks& callbacks) {
  LF_CHECK(impl_->world.rank() == 0);
  if (!healthy()) return absl::FailedPreconditionError("the group of ranks is broken");
  LF_RETURN_IF_ERROR(Validate(request));
  const int64_t num_tokens = static_cast<int64_t>(request.token_ids.size());
  LF_ASSIGN_OR_RETURN(const ResolvedAttention attention,
                      ResolveAttention(request.attention, impl_->options.attention, num_tokens,
                                       impl_->config.num_layers, impl_->config.num_q_heads));
  PrefillRequest resolved = request;
  resolved.attention = attention.spec;
  if (resolved.logits_positions.empty()) resolved.logits_positions = {num_tokens - 1};
  LF_RETURN_IF_ERROR(impl_->Send(PrefillCommand{resolved}));

  PrefillCallbacks own = callbacks;
  own.on_accepted = [&](const ResolvedAttention&) {
    if (callbacks.on_accepted) callbacks.on_accepted(attention);
  };
  absl::StatusOr<PrefillResult> result = impl_->Run(resolved, sink_factory, own);
  if (result.ok()) result->figures.attention = attention.resolved;
  return result;
}

absl::Status PrefillEngine::Serve(const KvSinkFactory& sink_factory,
                                  const std::function<absl::Status()>& should_stop,
                                  const std::function<void(const absl::Status& outcome)>& on_request_done) {
  LF_CHECK(impl_->world.rank() != 0);
  while (true) {
    const absl::StatusOr<std::string> bytes = BroadcastString(impl_->world, "", 0, impl_->stream);
    if (!bytes.ok()) return impl_->Break(bytes.status());
    const absl::StatusOr<RankCommand> command = Decode(*bytes);
    if (!command.ok()) return impl_->Break(command.status());
    if (std::holds_alternative<ShutdownCommand>(*command)) return absl::OkStatus();
    const auto* prefill = std::get_if<PrefillCommand>(&*command);
    if (prefill == nullptr) continue;
    const absl::StatusOr<PrefillResult> result =
        impl_->Run(prefill->request, sink_factory, {.should_stop = should_stop});
    if (on_request_done) on_request_done(result.status());
    if (!healthy()) return result.status();
  }
}

absl::Status PrefillEngine::Shutdown() {
  LF_CHECK(impl_->world.rank() == 0);
  if (impl_->shut_down || !healthy()) return absl::OkStatus();
  impl_->shut_down = true;
  return impl_->Send(ShutdownCommand{});
}

absl::Status PrefillEngine::KeepAlive() {
  LF_CHECK(impl_->world.rank() == 0);
  return impl_->Send(KeepAliveCommand{});
}

// Every rank from here on, with equal requests.
absl::StatusOr<PrefillResult> PrefillEngine::Impl::Run(const PrefillRequest& request,
                                                       const KvSinkFactory& sink_factory,
                                                       const PrefillCallbacks& callbacks) {
  absl::StatusOr<PrefillResult> result = RunInGroup(request, sink_factory, callbacks);
  // An error is either agreed on, and every rank comes here, or of a collective inside a layer, which has
  // broken the group without passing through Agree.
  if (!result.ok() && healthy && !world.Barrier(stream).ok()) return Break(result.status());
  return result;
}

absl::StatusOr<PrefillResult> PrefillEngine::Impl::RunInGroup(const PrefillRequest& request,
                                                              const KvSinkFactory& sink_factory,
                                                              const PrefillCallbacks& callbacks) {
  const ShardPlan plan(options.mesh, static_cast<int64_t>(request.token_ids.size()));
  const KvTransferSpec transfer = {.request_id = request.request_id,
                                   .transfer_id = request.transfer_id,
                                   .plan = plan,
                                   .rank = world.rank(),
                                   .num_layers = config.num_layers,
                                   .num_kv_heads = config.num_kv_heads,
                                   .head_dim = config.head_dim,
                                   .dtype = request.kv_dtype};
  const Clock::time_point start = Clock::now();
  const double communication_start = world.seconds();
  absl::StatusOr<ResolvedAttention> patterns = ResolveAttention(
      request.attention, options.attention, plan.num_tokens(), config.num_layers, config.num_q_heads);
  absl::Status mine = patterns.status();
  if (mine.ok()) mine = CheckMemory(request);
  std::unique_ptr<KvSink> sink;
  if (mine.ok()) {
    absl::StatusOr<std::unique_ptr<KvSink>> opened = sink_factory(transfer);
    mine = opened.status();
    if (mine.ok()) sink = *std::move(opened);
  }
  PrefillResult result;
  result.positions = request.logits_positions;
  absl::Status outcome = Agree(mine);
  LayerFigures layers;
  if (outcome.ok()) {
    if (callbacks.on_accepted) callbacks.on_accepted(*patterns);
    outcome = Compute(request, plan, patterns->patterns, *sink, callbacks, &layers, &result);
  }
  // Every rank ends its sink with the same outcome; a sink that fails to end is an error of all.
  absl::Status finished = sink != nullptr ? sink->Finish(outcome) : absl::OkStatus();
  if (!outcome.ok()) return outcome;
  LF_RETURN_IF_ERROR(Agree(finished));
  LF_RETURN_IF_ERROR(
      CollectFigures(plan, transfer, layers, world.seconds() - communication_start, &result.figures));
  result.figures.seconds = SecondsSince(start);
  return result;
}

absl::Status PrefillEngine::Impl::Compute(const PrefillRequest& request, const ShardPlan& plan,
                                          const PatternSet& patterns, KvSink& sink,
                                          const PrefillCallbacks& callbacks, LayerFigures* layers,
                                          PrefillResult* result) {
  absl::StatusOr<std::unique_ptr<Transformer>> transformer =
      Transformer::Create(config, *weights, *kernels, plan, world.rank());
  absl::Status mine = transformer.status();
  if (mine.ok()) {
    const PositionMap positions = plan.TokenPositions(world.rank());
    std::vector<int32_t> ids(static_cast<size_t>(plan.NumTokens(world.rank())));
    for (size_t row = 0; row < ids.size(); ++row) {
      ids[row] = request.token_ids[static_cast<size_t>(positions.Position(static_cast<int64_t>(row)))];
    }
    mine = (*transformer)->Embed(ids, stream);
  }
  LF_RETURN_IF_ERROR(Agree(mine));
  LF_RETURN_IF_ERROR(RunLayers(**transformer, request, plan, patterns, sink, callbacks, layers));
  return CollectLogits(**transformer, plan, result);
}

absl::Status PrefillEngine::Impl::RunLayers(Transformer& transformer, const PrefillRequest& request,
                                            const ShardPlan& plan, const PatternSet& patterns, KvSink& sink,
                                            const PrefillCallbacks& callbacks, LayerFigures* figures) {
  LF_ASSIGN_OR_RETURN(SparseIndexBuilder index_builder,
                      SparseIndexBuilder::Create(*kernels, world, GeometryOf(config), request.coverage));
  const LayerParallelism parallel = {.index_builder = &index_builder, .attention = attention.get()};
  const Clock::time_point start = Clock::now();
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    LayerCallbacks layer_callbacks;
    layer_callbacks.on_kv = [&](int64_t row_begin, int64_t row_end, HeadsView<const float> key,
                                HeadsView<const float> value) {
      return sink.Append(layer, row_begin, row_end, key, value);
    };
    layer_callbacks.should_stop = [&] {
      return callbacks.should_stop ? callbacks.should_stop() : absl::OkStatus();
    };
    layer_callbacks.agree = [&](const absl::Status& mine) { return Agree(mine); };
    absl::Status status =
        transformer.RunLayer(layer, patterns.layer(layer), parallel, layer_callbacks, figures, stream);
    if (!status.ok()) return status;
    if (callbacks.on_progress) {
      callbacks.on_progress({.total_tokens = plan.num_tokens(),
                             .processed_tokens = plan.num_tokens() * (layer + 1) / config.num_layers,
                             .layers_done = layer + 1,
                             .num_layers = config.num_layers,
                             .seconds = SecondsSince(start)});
    }
  }
  return absl::OkStatus();
}

// The rank that owns a position computes its logits and sends them to rank 0, which puts them in the order
// asked.
absl::Status PrefillEngine::Impl::CollectLogits(Transformer& transformer, const ShardPlan& plan,
                                                PrefillResult* result) {
  const size_t vocab = static_cast<size_t>(config.vocab_size);
  const int me = world.rank();
  std::vector<std::vector<size_t>> owned(static_cast<size_t>(world.size()));  // places in result->positions
  for (size_t i = 0; i < result->positions.size(); ++i) {
    owned[static_cast<size_t>(plan.RankOfToken(result->positions[i]))].push_back(i);
  }
  std::vector<int64_t> rows;
  for (const size_t i : owned[static_cast<size_t>(me)]) {
    rows.push_back(plan.TokenPositions(me).RowsBelow(result->positions[i]));
  }
  std::vector<float> mine(rows.size() * vocab);
  LF_RETURN_IF_ERROR(Agree(transformer.Logits(rows, mine, stream)));

  std::vector<int64_t> send_bytes(owned.size(), 0);
  std::vector<int64_t> recv_bytes(owned.size(), 0);
  send_bytes[0] = static_cast<int64_t>(mine.size() * sizeof(float));
  size_t total = 0;
  for (size_t rank = 0; me == 0 && rank < owned.size(); ++rank) {
    recv_bytes[rank] = static_cast<int64_t>(owned[rank].size() * vocab * sizeof(float));
    total += owned[rank].size() * vocab;
  }
  std::vector<float> received(total);
  if (absl::Status status = world.AllToAll(mine.data(), send_bytes, received.data(), recv_bytes, stream);
      !status.ok()) {
    return Break(status);
  }
  if (me != 0) return absl::OkStatus();
  result->logits.resize(total);
  const float* next = received.data();
  for (const std::vector<size_t>& places : owned) {
    for (const size_t place : places) {
      std::copy_n(next, vocab, result->logits.begin() + static_cast<std::ptrdiff_t>(place * vocab));
      next += vocab;
    }
  }
  return absl::OkStatus();
}

absl::Status PrefillEngine::Impl::CollectFigures(const ShardPlan& plan, const KvTransferSpec& transfer,
                                                 const LayerFigures& layers, double communication_seconds,
                                                 PrefillFigures* figures) {
  const RankFigures mine = {.index_seconds = layers.index_seconds,
                            .attention_seconds = layers.attention_seconds,
                            .linear_seconds = layers.linear_seconds,
                            .communication_seconds = communication_seconds,
                            .covered_pairs = layers.rank_covered_pairs,
                            .computed_pairs = layers.rank_computed_pairs,
                            .kv_bytes = transfer.OwnedBytes(),
                            .peak_memory_bytes = PeakResidentBytes()};
  std::vector<RankFigures> all(static_cast<size_t>(world.size()));
  const std::vector<int64_t> counts(all.size(), sizeof(RankFigures));
  if (absl::Status status = world.AllGather(&mine, all.data(), counts, stream); !status.ok())
    return Break(status);
  *figures = JoinFigures(all, plan, config, layers.pairs);
  return absl::OkStatus();
}

}  // namespace longfill
