#include "runtime/engine/engine_state.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "models/device_weights.h"
#include "models/fingerprint.h"
#include "models/transformer.h"
#include "parallel/staged_communicator.h"

namespace longfill {
absl::Status EngineState::Load() {
  if (options.mesh.size() != world.size()) {
    return absl::InvalidArgumentError(absl::StrCat("mesh ", ToString(options.mesh), " has ",
                                                   options.mesh.size(), " ranks, but ", world.size(),
                                                   " were started"));
  }
  if (backend == nullptr) {
    LF_ASSIGN_OR_RETURN(backend, CreateBackend(options.device));
  }
  LF_RETURN_IF_ERROR(LoadWeights());
  LF_ASSIGN_OR_RETURN(ring, KvRing::Allocate(*backend, options.kv_export));
  if (backend->kernels().device() == DeviceKind::kCpu) return absl::OkStatus();
  LF_ASSIGN_OR_RETURN(ranks_on_device, RanksOnDevice(options.device));
  LF_ASSIGN_OR_RETURN(staged_world, CreateStagedCommunicator(world, *backend));
  return absl::OkStatus();
}

absl::Status EngineState::LoadWeights() {
  if (options.bench_model) {
    config = options.bench_model->config;
    fingerprint = absl::StrCat("random weights of seed ", options.bench_model->seed);
    LF_ASSIGN_OR_RETURN(weights, RandomWeights(config, *backend, options.bench_model->seed));
    return absl::OkStatus();
  }
  LF_ASSIGN_OR_RETURN(config, LoadModelConfig(options.model_dir));
  LF_ASSIGN_OR_RETURN(options.attention.model_patterns, ReadModelPatterns(options.model_dir));
  LF_ASSIGN_OR_RETURN(std::unique_ptr<const ModelWeights> host,
                      ModelWeights::Load(options.model_dir, config));
  LF_ASSIGN_OR_RETURN(fingerprint, ModelFingerprint(config, *host));
  LF_ASSIGN_OR_RETURN(weights, UploadWeights(std::move(host), config, *backend));
  return absl::OkStatus();
}

absl::Status EngineState::Connect() {
  LF_RETURN_IF_ERROR(CheckRanksHaveOneModel());
  LF_ASSIGN_OR_RETURN(attention,
                      ParallelAttention::Create(*backend, device_world(), options.mesh, GeometryOf(config)));
  return absl::OkStatus();
}

absl::Status EngineState::MeasureOutside() {
  const absl::StatusOr<int64_t> measured = MeasureOutsideBytes(*backend, ranks_on_device);
  outside_bytes = measured.value_or(0);
  return Agree(measured.status());
}

absl::Status EngineState::CheckRanksHaveOneModel() {
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> all, AllGatherStrings(world, fingerprint, host_stream));
  for (size_t rank = 1; rank < all.size(); ++rank) {
    if (all[rank] != all[0]) {
      return absl::FailedPreconditionError(absl::StrCat("rank ", rank, " has another model in ",
                                                        options.model_dir, " (", all[rank], ") than rank 0 (",
                                                        all[0], ")"));
    }
  }
  return absl::OkStatus();
}

// One number for the common case; the texts only where some rank has an error.
absl::Status EngineState::Agree(const absl::Status& mine) {
  int64_t failed = mine.ok() ? 0 : 1;
  if (absl::Status status = world.AllReduce(&failed, 1, ReduceType::kInt64, ReduceOp::kMax, host_stream);
      !status.ok()) {
    return Break(status);
  }
  return failed == 0 ? absl::OkStatus() : AgreeOnStatus(world, mine, host_stream);
}

absl::Status EngineState::Break(const absl::Status& reason) {
  healthy = false;
  world.Abort(reason);
  return reason;
}

absl::StatusOr<ResolvedAttention> EngineState::Resolve(const PrefillRequest& request) const {
  return ResolveAttention(request.attention, options.attention,
                          static_cast<int64_t>(request.token_ids.size()), config.num_layers,
                          config.num_q_heads);
}

MemoryPlanInput EngineState::PlanInput(const PrefillRequest& request, const PatternSet& patterns) const {
  MemoryPlanInput input = {
      .config = &config,
      .kernels = &backend->kernels(),
      .patterns = &patterns,
      .weights_bytes = weights->bytes(),
      .weights_in_pool = backend->kernels().device() != DeviceKind::kCpu || options.bench_model.has_value(),
      .outside_bytes = outside_bytes,
      .kv_export = options.kv_export,
      .mesh = options.mesh,
      .num_tokens = static_cast<int64_t>(request.token_ids.size()),
      .num_logits = std::max<int64_t>(1, static_cast<int64_t>(request.logits_positions.size())),
      .kv_dtype = request.kv_dtype,
      .keep_kv = options.keep_kv};
  if (options.index_replacement != nullptr) {
    input.replacement_bytes = [replacement = options.index_replacement.get()](int64_t num_tokens) {
      return replacement->PlanBytes(num_tokens);
    };
  }
  return input;
}

// What this rank holds already counts in the plan, and so in the budget; so does what the prompt that
// computes now has of the device, since the one that is asked about comes after it.
absl::StatusOr<MemoryBudget> EngineState::Budget() const {
  MemoryBudget budget;
  if (backend->kernels().device() == DeviceKind::kCpu) {
    budget.host_bytes = options.memory_limit_bytes;
    if (budget.host_bytes == 0) {
      // Mapped weights are in the page cache, or can be.
      LF_ASSIGN_OR_RETURN(budget.host_bytes,
                          AvailableMemoryBytes(options.device.ranks_on_host, weights->mapped_bytes()));
    }
    return budget;
  }
  LF_ASSIGN_OR_RETURN(budget.host_bytes, AvailableMemoryBytes(options.device.ranks_on_host, 0));
  budget.host_bytes += KvRing::PlanBytes(DeviceKind::kCuda, options.kv_export);
  if (world.size() > 1) budget.host_bytes += 2 * kStagingSliceBytes;
  budget.device_bytes = options.memory_limit_bytes;
  if (budget.device_bytes == 0) {
    LF_ASSIGN_OR_RETURN(budget.device_bytes, AvailableDeviceBytes(*backend, ranks_on_device, outside_bytes));
  }
  return budget;
}

absl::Status EngineState::CheckMemory(const PrefillRequest& request, const PatternSet& patterns) const {
  LF_ASSIGN_OR_RETURN(const MemoryBudget budget, Budget());
  return CheckFits(PlanInput(request, patterns), budget);
}

}  // namespace longfill
