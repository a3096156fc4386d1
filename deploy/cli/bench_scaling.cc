// longfill bench scaling: what a prefill takes on several ranks, told from one device.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <utility>

#include "deploy/cli/bench.h"
#include "deploy/cli/bench_work.h"
#include "deploy/cli/command.h"
#include "deploy/cli/scaling_report.h"
#include "models/device_weights.h"
#include "parallel/parallel_attention.h"
#include "runtime/engine/device_communicator.h"
#include "runtime/engine/engine_device.h"
#include "runtime/scaling/rank_recording.h"
#include "runtime/scaling/referenced_keys.h"

namespace longfill {
namespace {

struct ScalingOptions {
  ModelOptions model;  // model_dir, mesh_text and weights are not used
  BenchWorkOptions work;
  std::vector<int> ranks = {1, 2, 4, 8, 16};
  std::vector<std::string> meshes;  // instead of `ranks`
  std::string links = "400g";
  int64_t num_layers = 0;  // to execute; 0: all that differ
  bool json = false;
};

// By sequence, by head, and where there are several nodes by head inside them.
void AddMeshes(int ranks, const LinkRates& links, std::vector<Mesh>* meshes) {
  meshes->push_back({.sequence = ranks, .head = 1});
  if (ranks == 1) return;
  meshes->push_back({.sequence = 1, .head = ranks});
  if (ranks > links.ranks_per_node && links.ranks_per_node > 1 && ranks % links.ranks_per_node == 0) {
    meshes->push_back({.sequence = ranks / links.ranks_per_node, .head = links.ranks_per_node});
  }
}

PeerHosts HostsOf(const Mesh& mesh, const LinkRates& links) {
  std::vector<int> host_of_rank(static_cast<size_t>(mesh.size()));
  for (int rank = 0; rank < mesh.size(); ++rank) host_of_rank[static_cast<size_t>(rank)] = links.NodeOf(rank);
  return PeerHosts(std::move(host_of_rank));
}

absl::StatusOr<std::vector<Mesh>> MakeMeshes(const ScalingOptions& options, const LinkRates& links) {
  std::vector<Mesh> meshes;
  for (const std::string& text : options.meshes) {
    LF_ASSIGN_OR_RETURN(const Mesh mesh, ParseMesh(text));
    meshes.push_back(mesh);
  }
  if (!meshes.empty()) return meshes;
  for (const int ranks : options.ranks) AddMeshes(ranks, links, &meshes);
  return meshes;
}

// Everything that can be refused before there is a device.
struct ScalingWork {
  BenchWork work;
  DeviceOptions device;
  NcclOptions nccl;
  bool peer_copies = true;
  LinkRates links;
  std::vector<Mesh> meshes;
  LayerChoice choice;
};

absl::StatusOr<ScalingWork> ReadWork(const ScalingOptions& options) {
  ScalingWork read;
  const absl::StatusOr<LinkRates> links = ParseLinks(options.links);
  if (!links.ok()) return Annotate(links.status(), "--links");
  read.links = *links;
  const absl::StatusOr<std::vector<Mesh>> meshes = MakeMeshes(options, read.links);
  if (!meshes.ok()) return Annotate(meshes.status(), "--mesh");
  read.meshes = *meshes;
  LF_ASSIGN_OR_RETURN(read.work, ReadBenchWork(options.work, options.model, {}));
  for (const Mesh& mesh : read.meshes) {
    LF_RETURN_IF_ERROR(CheckRunsAlone(read.work.config, read.work.patterns,
                                      ShardPlan(mesh, options.work.num_tokens),
                                      read.work.replayed != nullptr));
  }
  read.choice = ChooseLayers(read.work.patterns, read.work.num_recorded_layers, options.num_layers);
  LF_ASSIGN_OR_RETURN(const DeviceCommunicatorOptions communicator, MakeCommunicatorOptions(options.model));
  if (communicator.kind == CommunicatorKind::kStaged) {
    return absl::InvalidArgumentError(
        "--communicator mpi: exchanges through host memory are not simulated, only those between GPUs");
  }
  read.nccl = communicator.nccl;
  LF_ASSIGN_OR_RETURN(read.device, MakeDeviceOptions(options.model, 1, 0));
  read.peer_copies = read.device.kind != DeviceKind::kCpu && communicator.peer_copies != PeerCopies::kOff;
  return read;
}

// Of the indices that the executed layers run with.
ReferencedKeys CountReferencedKeys(const BenchWork& work, const std::vector<int64_t>& executed,
                                   const Mesh& mesh) {
  const auto num_tokens = static_cast<int64_t>(work.token_ids.size());
  std::vector<PackedIndices> layers;
  for (const int64_t layer : executed) {
    if (work.replayed != nullptr) {
      layers.push_back(work.replayed->packed(layer));
      continue;
    }
    std::vector<SparseIndex> heads;  // none selects: CheckRunsAlone
    for (int64_t head = 0; head < work.config.num_q_heads; ++head) {
      heads.push_back(MakeFixedIndex(work.patterns.at(layer, head), num_tokens).value());
    }
    layers.emplace_back(heads);
  }
  return SummarizeReferencedKeys(ShardPlan(mesh, num_tokens), layers, work.config.num_kv_heads);
}

// All ranks of a mesh, one after the other.
absl::StatusOr<ScalingRun> Measure(const RecordingJob& job, const ScalingWork& read, const Mesh& mesh,
                                   Backend& device, LinkTraffic& traffic) {
  const auto begin = std::chrono::steady_clock::now();
  const LinkTraffic::Figures before = traffic.figures();
  MeshGroups groups(mesh, job.hosts);
  LF_ASSIGN_OR_RETURN(const std::vector<RankRecording> recordings,
                      RecordRanks(job, mesh, groups, device, &traffic));
  ScalingRun run{.mesh = mesh, .peer_copies = job.peer_copies};
  LF_ASSIGN_OR_RETURN(run.figures,
                      ComputeScalingFigures(recordings, read.choice, groups.members(), read.links));
  const LinkTraffic::Figures after = traffic.figures();
  run.copied = {after.bytes - before.bytes, after.seconds - before.seconds};
  run.recording_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  // Parity coverage has other keys for every row block, which takes minutes to walk.
  if (mesh.sequence > 1 && read.work.coverage == Coverage::kTiles) {
    run.referenced = CountReferencedKeys(read.work, read.choice.executed, mesh);
  }
  return run;
}

absl::Status MeasureAll(const ScalingOptions& options, const ScalingWork& read, const StopSignals& signals,
                        ScalingReport* report) {
  LF_ASSIGN_OR_RETURN(const std::shared_ptr<Backend> device, CreateBackend(read.device));
  LF_ASSIGN_OR_RETURN(std::shared_ptr<Backend> copying, CreateBackend(read.device));
  LF_ASSIGN_OR_RETURN(const std::unique_ptr<LinkTraffic> traffic,
                      LinkTraffic::Create(std::move(copying), read.links));
  LF_ASSIGN_OR_RETURN(const std::unique_ptr<const ModelWeights> weights,
                      RandomWeights(read.work.config, *device, options.work.seed));
  const bool on_gpu = read.device.kind != DeviceKind::kCpu;
  RecordingJob job{.config = read.work.config,
                   .weights = *weights,
                   .patterns = read.work.patterns,
                   .coverage = read.work.coverage,
                   .token_ids = read.work.token_ids,
                   .replacement = read.work.replayed.get(),
                   .layers = read.choice.executed,
                   .ctas_beside_exchange = on_gpu ? CtasBesideNccl(*device, read.nccl) : 0,
                   .should_stop = [&signals] { return signals.ShouldStop(); }};
  report->device = device->facts().name;
  report->compute_dtype = device->kernels().compute_dtype();
  if (!options.json) std::printf("%s", report->HeadText().c_str());
  const auto measure_meshes = [&]() -> absl::Status {
    if (job.replacement != nullptr) {
      LF_RETURN_IF_ERROR(job.replacement->Begin(*device, options.work.num_tokens));
    }
    for (const Mesh& mesh : read.meshes) {
      const PeerHosts hosts = HostsOf(mesh, read.links);
      job.peer_copies = read.peer_copies && ParallelAttention::BeginsEarly(mesh) && hosts.CheckAlike().ok();
      job.hosts = job.peer_copies ? hosts : PeerHosts();
      LF_ASSIGN_OR_RETURN(const ScalingRun run, Measure(job, read, mesh, *device, *traffic));
      report->runs.push_back(run);
      if (!options.json) std::printf("%s", report->RunText(report->runs.back()).c_str());
      std::fflush(stdout);
    }
    return absl::OkStatus();
  };
  absl::Status status = measure_meshes();
  if (job.replacement != nullptr) job.replacement->End();
  return status;
}

int BenchScaling(ScalingOptions options, CommandContext& context) {
  if (context.launch.parallel) return Report(absl::InvalidArgumentError("bench scaling runs on one rank"));
  if (options.model.threads == 0) options.model.threads = DefaultThreads(1);
  const absl::StatusOr<ScalingWork> read = ReadWork(options);
  if (!read.ok()) {
    const int code = Report(read.status());
    return absl::IsDataLoss(read.status()) ? static_cast<int>(kExitUsage) : code;  // a broken recording
  }
  ScalingReport report{
      .geometry = options.work.geometry,
      .num_tokens = options.work.num_tokens,
      .num_layers = read->work.config.num_layers,
      .executed_layers = static_cast<int64_t>(read->choice.executed.size()),
      .attention = read->work.attention.text,
      .indices = options.work.indices,
      .seed = options.work.seed,
      .links = read->links,
  };
  const absl::Status status = MeasureAll(options, *read, *context.signals, &report);
  if (!status.ok()) return Report(status);
  if (options.json) std::printf("%s\n", report.ToJson().c_str());
  return Report(FlushOutput());
}

void AddScalingOptions(CLI::App& app, ScalingOptions& options) {
  CLI::Option* const ranks =
      app.add_option(
             "--ranks", options.ranks,
             "numbers of ranks (default: 1,2,4,8,16), each by sequence and by head, on several nodes\n"
             "also by head inside a node and by sequence between them; efficiency is that against 1")
          ->type_name("P,...")
          ->delimiter(',')
          ->check(CLI::Range(1, 1024));
  app.add_option("--mesh", options.meshes,
                 "this mesh instead, for example sequence=2,head=4. May be repeated")
      ->type_name("sequence=S,head=H")
      ->take_all()
      ->excludes(ranks);
  app.add_option(
         "--links", options.links,
         "400g (default): nodes of 8 with NVLink, 400 Gb/s a rank between them; nvlink: all ranks in\n"
         "one node; or GB/s of a rank in each direction in a node and between nodes, and ranks a node")
      ->type_name("NAME|X,Y,N");
  app.add_option("--layers", options.num_layers,
                 "layers to execute, spread evenly, the others are taken to be like them (default: all that\n"
                 "differ in patterns or recorded selections)")
      ->type_name("N")
      ->check(AtLeast(1));
  app.add_flag("--json", options.json, "one JSON object and nothing else on standard output");
}

}  // namespace

Command AddBenchScaling(CLI::App& bench) {
  CLI::App* app = bench.add_subcommand(
      "scaling", "Time and balance on several ranks, from one device: each rank's share runs alone");
  auto options = std::make_shared<ScalingOptions>();
  AddBenchWorkOptions(*app, options->work, options->model);
  AddScalingOptions(*app, *options);
  AddDeviceOption(*app, options->model);
  AddThreadsOption(*app, options->model);
  return {app, [options](CommandContext& context) { return BenchScaling(*options, context); }};
}

}  // namespace longfill
