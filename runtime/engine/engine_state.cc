#include "runtime/engine/engine_state.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "models/device_weights.h"
#include "models/fingerprint.h"
#include "models/transformer.h"
#include "parallel/peer_memory.h"
#include "parallel/staged_communicator.h"

namespace longfill {

absl::Status EngineState::OpenDevice() {
  if (options.mesh.size() != world.size()) {
    return absl::InvalidArgumentError(absl::StrCat("mesh ", ToString(options.mesh), " has ",
                                                   options.mesh.size(), " ranks, but ", world.size(),
                                                   " were started"));
  }
  if (backend == nullptr) {
    LF_ASSIGN_OR_RETURN(backend, CreateBackend(options.device));
  }
  return absl::OkStatus();
}

absl::Status EngineState::ShareDevice() {
  // Every rank has asked before the exchange ends, and loads after it.
  const absl::StatusOr<int64_t> free_bytes = AvailableDeviceBytes(*backend, 1, 0);
  LF_RETURN_IF_ERROR(Agree(free_bytes.status()));
  const std::string& mine = backend->facts().id;
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> all, AllGatherStrings(world, mine, host_stream));
  ranks_on_device = mine.empty() ? 1 : static_cast<int>(std::count(all.begin(), all.end(), mine));
  const int version = NcclVersionCode(*backend).value_or(0);
  std::vector<int> versions(all.size());
  LF_RETURN_IF_ERROR(
      world.AllGather(&version, versions.data(), std::vector<int64_t>(all.size(), sizeof(int)), host_stream));
  std::vector<RankDevice> ranks;
  for (size_t rank = 0; rank < all.size(); ++rank) ranks.push_back({all[rank], versions[rank]});
  LF_ASSIGN_OR_RETURN(communicator, ChooseCommunicator(options.communicator, ranks));
  // What is in use already, such as the budget of KV caches on the device, is not free.
  device_bytes_free = (*free_bytes - backend->memory().bytes_in_use()) / ranks_on_device;
  return absl::OkStatus();
}

absl::Status EngineState::Load() {
  LF_RETURN_IF_ERROR(LoadWeights());
  LF_ASSIGN_OR_RETURN(ring, KvRing::Allocate(*backend, options.kv_export));
  return absl::OkStatus();
}

absl::Status EngineState::LoadWeights() { return options.bench_model ? DrawBenchModel() : LoadCheckpoint(); }

absl::Status EngineState::DrawBenchModel() {
  config = options.bench_model->config;
  LF_RETURN_IF_ERROR(CheckWeightsFit(nullptr));
  const uint64_t seed = options.bench_model->seed;
  fingerprint = absl::StrCat("random weights of seed ", seed);
  if (ShardsWeights(options.weights, options.mesh)) {
    LF_ASSIGN_OR_RETURN(sharded_weights,
                        ShardedWeights::Random(config, seed, *backend, world.rank(), world.size()));
    return absl::OkStatus();
  }
  LF_ASSIGN_OR_RETURN(replicated_weights, RandomWeights(config, *backend, seed));
  return absl::OkStatus();
}

absl::Status EngineState::LoadCheckpoint() {
  LF_ASSIGN_OR_RETURN(config, LoadModelConfig(options.model_dir));
  LF_ASSIGN_OR_RETURN(options.attention.model_patterns, ReadModelPatterns(options.model_dir));
  LF_ASSIGN_OR_RETURN(std::unique_ptr<const ModelWeights> host,
                      ModelWeights::Load(options.model_dir, config));
  LF_RETURN_IF_ERROR(CheckWeightsFit(host.get()));
  LF_ASSIGN_OR_RETURN(fingerprint, ModelFingerprint(config, *host));
  if (ShardsWeights(options.weights, options.mesh)) {
    LF_ASSIGN_OR_RETURN(sharded_weights,
                        ShardedWeights::Convert(*host, config, *backend, world.rank(), world.size()));
    return absl::OkStatus();
  }
  LF_ASSIGN_OR_RETURN(replicated_weights, UploadWeights(std::move(host), config, *backend));
  return absl::OkStatus();
}

// `host`: the checkpoint; nullptr where there is none.
absl::Status EngineState::CheckWeightsFit(const ModelWeights* host) const {
  const KernelSet& kernels = backend->kernels();
  if (kernels.device() == DeviceKind::kCpu) return absl::OkStatus();
  const bool sharded = ShardsWeights(options.weights, options.mesh);
  const int64_t bytes =
      sharded ? ShardedWeights::PlanBytes(config, DTypesOfShards(host, config, kernels), world.size())
              : DeviceWeightsBytes(config, kernels.compute_dtype());
  if (bytes <= device_bytes_free) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "the weights", sharded ? ", sharded," : "", " need ", bytes, " bytes of GPU memory and ",
      device_bytes_free, " are available on ", backend->facts().name, " for each of ", ranks_on_device,
      " ranks", sharded ? "" : "; sharded over the ranks, each keeps a share of them"));
}

absl::Status EngineState::Connect() {
  LF_RETURN_IF_ERROR(CheckRanksHaveOneModel());
  if (backend->kernels().device() != DeviceKind::kCpu) {
    LF_ASSIGN_OR_RETURN(gpu_world,
                        CreateDeviceCommunicator(communicator, options.communicator.nccl, world, *backend));
  }
  if (sharded_weights != nullptr) LF_RETURN_IF_ERROR(sharded_weights->Connect(device_world()));
  LF_RETURN_IF_ERROR(DecidePeerCopies());
  LF_ASSIGN_OR_RETURN(
      attention,
      ParallelAttention::Create(*backend, device_world(), options.mesh, GeometryOf(config),
                                {.ctas_beside_exchange = CtasBesideExchange(),
                                 .ctas_beside_peers = sharded_weights != nullptr ? CtasBesideExchange() : 0,
                                 .hosts = peer_hosts}));
  return absl::OkStatus();
}

// Collective: which ranks are on one host, and whether they read one another's memory there.
absl::Status EngineState::FindPeers() {
  LF_ASSIGN_OR_RETURN(peer_hosts, PeerHosts::Find(world, *backend));
  LF_RETURN_IF_ERROR(peer_hosts.CheckAlike());
  if (peer_hosts.num_hosts() > 1) {
    LF_ASSIGN_OR_RETURN(own_host,
                        world.Split(peer_hosts.HostOf(world.rank()), peer_hosts.LocalOf(world.rank())));
  }
  return AgreeOnStatus(world, TryPeerMemory(peers(), *backend), host_stream);
}

absl::Status EngineState::DecidePeerCopies() {
  const PeerCopies asked = options.communicator.peer_copies;
  if (asked == PeerCopies::kOff || world.size() == 1) return absl::OkStatus();
  const bool of_use = gpu_world != nullptr && ParallelAttention::BeginsEarly(options.mesh);
  if (!of_use && asked == PeerCopies::kOn) {
    return absl::InvalidArgumentError(
        absl::StrCat("keys and values by copy engines: they are for GPUs with head=1, the mesh is ",
                     ToString(options.mesh)));
  }
  if (!of_use) return absl::OkStatus();
  const absl::Status status = FindPeers();
  peer_copies = status.ok();
  if (status.ok()) return absl::OkStatus();
  peer_hosts = PeerHosts();
  own_host.reset();
  if (asked == PeerCopies::kOn) return Annotate(status, "keys and values by copy engines");
  LF_RETURN_IF_ERROR(Agree(backend->Health()));
  peer_copies_reason = std::string(status.message());
  return absl::OkStatus();
}

// Attention leaves NCCL's kernels their multiprocessors; what the host exchanges needs none.
int EngineState::CtasBesideExchange() const {
  if (communicator.kind != CommunicatorKind::kNccl) return 0;
  return CtasBesideNccl(*backend, options.communicator.nccl);
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

absl::Status EngineState::CheckDevice() {
  const absl::Status health = backend->Health();
  return health.ok() ? health : Break(Annotate(health, "the device is lost"));
}

absl::StatusOr<ResolvedAttention> EngineState::Resolve(const PrefillRequest& request) const {
  LF_ASSIGN_OR_RETURN(ResolvedAttention resolved,
                      ResolveAttention(request.attention, options.attention,
                                       static_cast<int64_t>(request.token_ids.size()), config));
  const std::optional<PatternProvenance>& provenance = resolved.patterns.provenance();
  if (provenance.has_value() && provenance->model_fingerprint != fingerprint) {
    resolved.resolved += ", searched for another model";
  }
  return resolved;
}

MemoryPlanInput EngineState::PlanInput(const PrefillRequest& request, const PatternSet& patterns) const {
  MemoryPlanInput input = {
      .config = &config,
      .kernels = &backend->kernels(),
      .patterns = &patterns,
      .weights_bytes = WeightsBytes(),
      .weights_in_pool = backend->kernels().device() != DeviceKind::kCpu || options.bench_model.has_value() ||
                         sharded_weights != nullptr,
      .outside_bytes = outside_bytes,
      .staged_exchange = communicator.kind == CommunicatorKind::kStaged,
      .peer_copies = peer_copies,
      .peer_hosts = peer_hosts,
      .kv_export = options.kv_export,
      .mesh = options.mesh,
      .num_tokens = static_cast<int64_t>(request.token_ids.size()),
      .num_logits = std::max<int64_t>(1, static_cast<int64_t>(request.logits_positions.size())),
      .kv_dtype = request.kv_dtype,
      .kv_tier = options.kv_tier,
      .recall = request.recall};
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
      // Mapped weights are in the page cache, or can be; others are in use already.
      LF_ASSIGN_OR_RETURN(budget.host_bytes,
                          AvailableMemoryBytes(options.device.ranks_on_host, WeightsBytes()));
      if (options.kv_tier.kind == KvTierKind::kDevice) budget.host_bytes += options.kv_tier.bytes;
    }
    return budget;
  }
  LF_ASSIGN_OR_RETURN(budget.host_bytes, AvailableMemoryBytes(options.device.ranks_on_host, 0));
  budget.host_bytes += KvRing::PlanBytes(DeviceKind::kCuda, options.kv_export);
  if (options.kv_tier.kind == KvTierKind::kDevice) {
    budget.host_bytes +=
        PlanKvTier(options.kv_tier, {.device = DeviceKind::kCuda}).host_bytes;  // its read buffers
  }
  if (world.size() > 1 && communicator.kind == CommunicatorKind::kStaged) {
    budget.host_bytes += 2 * kStagingSliceBytes;
  }
  LF_ASSIGN_OR_RETURN(budget.device_bytes, AvailableDeviceBytes(*backend, ranks_on_device, outside_bytes));
  if (options.memory_limit_bytes > 0) {
    budget.device_bytes = std::min(budget.device_bytes, options.memory_limit_bytes);
  }
  return budget;
}

absl::Status EngineState::CheckMemory(const PrefillRequest& request, const PatternSet& patterns) const {
  LF_ASSIGN_OR_RETURN(const MemoryBudget budget, Budget());
  return CheckFits(PlanInput(request, patterns), budget);
}

}  // namespace longfill
