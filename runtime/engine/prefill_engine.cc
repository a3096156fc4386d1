#include "runtime/engine/prefill_engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/engine/engine_state.h"
#include "runtime/engine/prefill_run.h"
#include "runtime/engine/request_plan.h"
#include "runtime/kv/kv_discard_sink.h"

namespace longfill {

struct PrefillEngine::Impl : EngineState {
  using EngineState::EngineState;

  absl::Status Send(const RankCommand& command) {
    const absl::StatusOr<std::string> sent = BroadcastString(world, Encode(command), 0, host_stream);
    return sent.ok() ? absl::OkStatus() : Break(sent.status());
  }
};

namespace {

// One short prompt for each kind of index, on all ranks: what the device has no kernel for is an error of the
// start, and kernels are loaded before the memory that they take is measured.
absl::Status WarmUp(EngineState& engine) {
  const EngineOptions options = engine.options;
  engine.options.index_replacement = nullptr;
  engine.options.memory_limit_bytes = 0;  // it is for prompts of clients
  // Within the first of dual chunks, which know fewer patterns and have no kernels of their own.
  const DualChunk& dual_chunk = engine.config.rope.dual_chunk;
  const int64_t longest = dual_chunk.Tokens(0, engine.config.max_position_embeddings).end;
  const int64_t num_tokens = std::min<int64_t>(2 * kTokenBlock * engine.world.size(), longest);
  absl::Status status;
  constexpr std::pair<const char*, Coverage> kKinds[] = {{"dense", Coverage::kTiles},
                                                         {"vertical-slash:30,50", Coverage::kTiles},
                                                         {"vertical-slash:30,50", Coverage::kParity},
                                                         {"block-sparse:1", Coverage::kTiles},
                                                         {"block-share:1,0.5", Coverage::kTiles}};
  for (const auto& [attention, coverage] : kKinds) {
    if (!status.ok()) break;
    PrefillRequest request;
    request.token_ids.assign(static_cast<size_t>(num_tokens), 0);
    request.attention.text = attention;
    request.coverage = coverage;
    request.logits_positions = {num_tokens - 1};
    request.kv_dtype = engine.backend->kernels().compute_dtype();
    status = Annotate(RunPrefill(engine, request, MakeKvDiscardSinkFactory(), {}).status(),
                      engine.backend->facts().name);
  }
  engine.options = options;
  return status;
}

}  // namespace

absl::StatusOr<std::unique_ptr<PrefillEngine>> PrefillEngine::Create(const EngineOptions& options,
                                                                     Communicator& world,
                                                                     std::shared_ptr<Backend> backend) {
  auto impl = std::make_unique<Impl>(options, world, std::move(backend));
  LF_RETURN_IF_ERROR(AgreeOnStatus(world, impl->OpenDevice(), impl->host_stream));
  LF_RETURN_IF_ERROR(impl->ShareDevice());
  LF_RETURN_IF_ERROR(AgreeOnStatus(world, impl->Load(), impl->host_stream));
  LF_RETURN_IF_ERROR(impl->Connect());
  if (impl->backend->kernels().device() != DeviceKind::kCpu) {
    LF_RETURN_IF_ERROR(WarmUp(*impl));
    LF_RETURN_IF_ERROR(impl->MeasureOutside());
  }
  return std::unique_ptr<PrefillEngine>(new PrefillEngine(std::move(impl)));
}

PrefillEngine::PrefillEngine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PrefillEngine::~PrefillEngine() = default;

const ModelConfig& PrefillEngine::config() const { return impl_->config; }
const std::string& PrefillEngine::model_fingerprint() const { return impl_->fingerprint; }
const Mesh& PrefillEngine::mesh() const { return impl_->options.mesh; }
int64_t PrefillEngine::weights_bytes() const { return impl_->WeightsBytes(); }
DType PrefillEngine::compute_dtype() const { return impl_->backend->kernels().compute_dtype(); }
Backend& PrefillEngine::backend() { return *impl_->backend; }
Communicator& PrefillEngine::world() { return impl_->world; }
bool PrefillEngine::healthy() const { return impl_->healthy.load(); }

MemoryPlan PrefillEngine::PlanMemory(const PrefillRequest& request) const {
  const absl::StatusOr<ResolvedAttention> attention = impl_->Resolve(request);
  if (!attention.ok()) return {};
  return longfill::PlanMemory(impl_->PlanInput(request, attention->patterns));
}

int64_t PrefillEngine::LongestPrompt(const PrefillRequest& request) const {
  const absl::StatusOr<ResolvedAttention> attention = impl_->Resolve(request);
  const absl::StatusOr<MemoryBudget> budget = impl_->Budget();
  if (!attention.ok() || !budget.ok()) return 0;
  return longfill::LongestPrompt(impl_->PlanInput(request, attention->patterns), *budget,
                                 impl_->config.max_position_embeddings);
}

std::string PrefillEngine::DescribeCommunicator() const {
  std::string name(impl_->device_world().name());
  if (impl_->gpu_world == nullptr) return name;
  absl::StrAppend(&name, ", ", impl_->communicator.reason);
  if (impl_->peer_copies) absl::StrAppend(&name, "; keys and values by copy engines");
  if (impl_->relayed()) absl::StrAppend(&name, ", those of other hosts relayed");
  if (!impl_->peer_copies_reason.empty()) {
    absl::StrAppend(&name, "; keys and values not by copy engines: ", impl_->peer_copies_reason);
  }
  return name;
}

std::string PrefillEngine::DescribeAuto() const {
  return longfill::DescribeAuto(impl_->options.attention, impl_->config);
}

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
  LF_RETURN_IF_ERROR(longfill::Validate(request.recall));
  if (request.recall.min_recall > 0 && impl_->options.index_replacement != nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("min_recall ", request.recall.min_recall,
                                                   ": no index is widened where indices are replaced"));
  }
  if (request.recall.on() && config.rope.dual_chunk.Splits(num_tokens)) {
    return absl::UnimplementedError(
        absl::StrCat("recall is not watched with dual chunk attention, which the model computes beyond ",
                     config.rope.dual_chunk.chunk_len(), " tokens; the prompt has ", num_tokens));
  }
  if (!IsFloat(request.kv_dtype)) {
    return absl::InvalidArgumentError(absl::StrCat("KV dtype ", std::string(DTypeName(request.kv_dtype)),
                                                   " is not float32, bfloat16 or float16"));
  }
  LF_ASSIGN_OR_RETURN(const ResolvedAttention attention, impl_->Resolve(request));
  for (int64_t layer = 0; layer < config.num_layers && config.rope.dual_chunk.Splits(num_tokens); ++layer) {
    LF_RETURN_IF_ERROR(CheckDualChunkPatterns(attention.patterns.layer(layer), request.coverage));
  }
  return impl_->CheckMemory(request, attention.patterns);
}

absl::StatusOr<PrefillResult> PrefillEngine::Prefill(const PrefillRequest& request,
                                                     const KvSinkFactory& sink_factory,
                                                     const PrefillCallbacks& callbacks) {
  LF_CHECK(impl_->world.rank() == 0);
  if (!healthy()) return absl::FailedPreconditionError("the group of ranks is broken");
  if (absl::Status status = Validate(request); !status.ok()) {
    LF_RETURN_IF_ERROR(impl_->CheckDevice());
    return status;
  }
  const int64_t num_tokens = static_cast<int64_t>(request.token_ids.size());
  LF_ASSIGN_OR_RETURN(const ResolvedAttention attention, impl_->Resolve(request));
  PrefillRequest resolved = request;
  resolved.attention = attention.spec;
  if (resolved.logits_positions.empty()) resolved.logits_positions = {num_tokens - 1};
  LF_RETURN_IF_ERROR(impl_->Send(PrefillCommand{resolved}));

  PrefillCallbacks own = callbacks;
  own.on_accepted = [&](const ResolvedAttention&) {
    if (callbacks.on_accepted) callbacks.on_accepted(attention);
  };
  absl::StatusOr<PrefillResult> result = RunPrefill(*impl_, resolved, sink_factory, own);
  if (result.ok()) {
    result->figures.attention = attention.resolved;
    const int64_t heads = result->figures.heads_without_room;
    if (heads > 0) {
      absl::StrAppend(&result->figures.attention, ", ", heads, " heads dense: no room for their lists");
    }
  }
  return result;
}

absl::Status PrefillEngine::Serve(const KvSinkFactory& sink_factory,
                                  const std::function<absl::Status()>& should_stop,
                                  const std::function<void(const absl::Status& outcome)>& on_request_done) {
  LF_CHECK(impl_->world.rank() != 0);
  while (true) {
    const absl::StatusOr<std::string> bytes = BroadcastString(impl_->world, "", 0, impl_->host_stream);
    if (!bytes.ok()) return impl_->Break(bytes.status());
    const absl::StatusOr<RankCommand> command = Decode(*bytes);
    if (!command.ok()) return impl_->Break(command.status());
    if (std::holds_alternative<ShutdownCommand>(*command)) return absl::OkStatus();
    const auto* prefill = std::get_if<PrefillCommand>(&*command);
    if (prefill == nullptr) {
      LF_RETURN_IF_ERROR(impl_->CheckDevice());
      continue;
    }
    const absl::StatusOr<PrefillResult> result =
        RunPrefill(*impl_, prefill->request, sink_factory, {.should_stop = should_stop});
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
  LF_RETURN_IF_ERROR(impl_->CheckDevice());
  return impl_->Send(KeepAliveCommand{});
}

}  // namespace longfill
