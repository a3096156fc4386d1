// longfill serve: one rank of the service. Rank 0 takes prompts; every rank serves the KV pages of its own
// tokens.

#include <unistd.h>

#include <cstdio>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "deploy/cli/command.h"
#include "deploy/cli/kv_memory.h"
#include "deploy/cli/launch_summary.h"
#include "deploy/cli/serve_addresses.h"
#include "deploy/cli/version.h"
#include "parallel/watchdog.h"
#include "runtime/observe/log.h"
#include "runtime/serving/engine_backend.h"
#include "runtime/serving/server.h"

namespace longfill {
namespace {

static_assert(kExitRankLost == kExitPeerLost);

struct ServeOptions {
  ModelOptions model;
  std::string listen = kDefaultListen;
  std::string kv_listen;
  std::string kv_memory = "host";
  std::string attention = "auto";
  RecallArguments recall;
  int queue_capacity = SchedulerOptions{}.queue_capacity;
  int64_t lease_seconds = 30;
  int64_t reader_seconds = 30;
  int64_t drain_seconds = 600;
  int64_t transfer_seconds = 60;
  std::string log_level = "info";
};

absl::StatusOr<ServerOptions> MakeServerOptions(const ServeOptions& options, const World& world) {
  ServerOptions server;
  server.rank = world.rank();
  LF_ASSIGN_OR_RETURN(const ServeAddresses addresses,
                      MakeServeAddresses(options.listen, options.kv_listen, world.rank(), world.hosts()));
  server.listen = addresses.listen;
  server.kv_listen = addresses.kv_listen;
  server.advertise_host = addresses.advertise_host;
  server.scheduler.queue_capacity = options.queue_capacity;
  server.prefill.recall = options.recall.options;
  server.store.lease = std::chrono::seconds(options.lease_seconds);
  server.store.reader_timeout = std::chrono::seconds(options.reader_seconds);
  server.drain_grace = std::chrono::seconds(options.drain_seconds);
  server.transfer_grace = std::chrono::seconds(options.transfer_seconds);
  return server;
}

// The engine's options; --attention replaces everything that "auto" would choose from.
absl::StatusOr<EngineOptions> MakeServeEngineOptions(const ServeOptions& options, const World& world) {
  LF_ASSIGN_OR_RETURN(EngineOptions engine, MakeEngineOptions(options.model, world));
  LF_ASSIGN_OR_RETURN(const KvMemory kv_memory, ParseKvMemory(options.kv_memory));
  engine.kv_tier = PlanOf(kv_memory);
  if (options.attention == "auto") return engine;
  if (engine.attention.patterns) {
    return absl::InvalidArgumentError(
        "--attention and --patterns both say what 'auto' stands for; give one of them");
  }
  LF_ASSIGN_OR_RETURN(engine.attention.patterns, ReadAttentionSpec(options.attention));
  engine.attention.dense_below = 0;
  return engine;
}

void LogConfiguration(const ServeOptions& options, const EngineOptions& engine, Backend& backend,
                      const World& world) {
  Log(LogLevel::kInfo, "configuration",
      {{"version", kVersion},
       {"commit", kGitCommit},
       {"pid", getpid()},
       {"model", options.model.model_dir},
       {"ranks", world.size()},
       {"mesh", ToString(engine.mesh)},
       {"listen", options.listen},
       {"kv_listen", options.kv_listen},
       {"device", backend.facts().name},
       {"compute_dtype", std::string(DTypeName(backend.kernels().compute_dtype()))},
       {"communicator", options.model.communicator},
       {"weights", options.model.weights},
       {"threads", engine.device.num_threads},
       {"kv_memory", options.kv_memory},
       {"attention", options.attention},
       {"dense_below", engine.attention.dense_below},
       {"patterns", options.model.patterns_path},
       {"recall_monitor", options.recall.options.monitor},
       {"min_recall", options.recall.options.min_recall},
       {"memory_limit_bytes", engine.memory_limit_bytes},
       {"queue", options.queue_capacity},
       {"lease_seconds", options.lease_seconds},
       {"reader_seconds", options.reader_seconds},
       {"drain_seconds", options.drain_seconds},
       {"transfer_seconds", options.transfer_seconds}});
}

// What one rank of the service is made of, in the order in which it is built.
struct Rank {
  std::shared_ptr<Backend> device;
  std::unique_ptr<KvMemoryTier> kv_memory;
  std::unique_ptr<Server> server;
  std::unique_ptr<PrefillEngine> engine;
  std::unique_ptr<PrefillBackend> backend;
  std::unique_ptr<Watchdog> watchdog;
};

// The device, and the memory that --kv-memory names.
absl::Status OpenDevice(const ServeOptions& options, const EngineOptions& engine, Rank& rank) {
  LF_ASSIGN_OR_RETURN(rank.device, CreateBackend(engine.device));
  LF_ASSIGN_OR_RETURN(const KvMemory kv_memory, ParseKvMemory(options.kv_memory));
  LF_ASSIGN_OR_RETURN(rank.kv_memory, KvMemoryTier::Create(kv_memory, *rank.device));
  return absl::OkStatus();
}

// Collective: everything up to the moment when prompts are taken. Every rank gets the same error.
absl::Status Build(const ServeOptions& options, World& world, Rank& rank) {
  const absl::StatusOr<ServerOptions> server_options = MakeServerOptions(options, world);
  const absl::StatusOr<EngineOptions> engine_options = MakeServeEngineOptions(options, world);
  LF_RETURN_IF_ERROR(world.Agree(server_options.ok() ? engine_options.status() : server_options.status()));
  LF_RETURN_IF_ERROR(world.Agree(OpenDevice(options, *engine_options, rank)));
  if (world.rank() == 0) LogConfiguration(options, *engine_options, *rank.device, world);
  LF_ASSIGN_OR_RETURN(const LaunchSummary launch,
                      SummarizeLaunch(world, *rank.device, engine_options->device));
  if (world.rank() == 0) LogLaunch(launch);

  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(*server_options, rank.kv_memory->tier());
  LF_RETURN_IF_ERROR(world.Agree(server.status()));
  rank.server = std::move(*server);
  LF_ASSIGN_OR_RETURN(rank.engine, PrefillEngine::Create(*engine_options, world.communicator(), rank.device));
  if (world.rank() == 0)
    Log(LogLevel::kInfo, "exchange", {{"communicator", rank.engine->DescribeCommunicator()}});
  rank.backend = MakeEngineBackend(rank.engine.get());

  GroupInfo group;
  group.rank = world.rank();
  group.server_version = absl::StrCat(kVersion, " (", kGitCommit, ")");
  CpuStream stream;
  LF_ASSIGN_OR_RETURN(group.kv_endpoints,
                      AllGatherStrings(world.communicator(), rank.server->kv_endpoint(), stream));
  LF_ASSIGN_OR_RETURN(group.instance_epoch, BroadcastString(world.communicator(), RandomId(), 0, stream));
  WatchdogOptions watchdog_options;
  if (world.several_hosts()) watchdog_options.advertise_host = HostName();
  WatchdogCallbacks callbacks;
  callbacks.on_peer_lost = [server = rank.server.get()](int lost, const absl::Status& reason) {
    server->OnPeerLost(lost, reason);
  };
  LF_ASSIGN_OR_RETURN(rank.watchdog,
                      Watchdog::Start(world.communicator(), watchdog_options, std::move(callbacks), stream));
  rank.server->Begin(rank.backend.get(), std::move(group));
  return absl::OkStatus();
}

int Serve(const ServeOptions& options, CommandContext& context) {
  auto world = World::Create(context.launch, kExitRankLost);
  if (!world.ok()) return ReportNoWorld(context.launch, world.status());
  const absl::StatusOr<LogLevel> level = ParseLogLevel(options.log_level);
  if (!level.ok()) return Report(level.status());
  ConfigureLog(*level, (*world)->rank());
  Rank rank;
  if (const absl::Status status = Build(options, **world, rank); !status.ok()) {
    if ((*world)->rank() == 0) Report(status);
    // A broken checkpoint is bad input, although its bytes are what is wrong.
    return absl::IsDataLoss(status) ? static_cast<int>(kExitUsage) : ExitCodeOf(status);
  }
  // A second signal cuts the waits of the drain short.
  context.signals->SetHandler([server = rank.server.get()](int) { server->RequestDrain(); });
  if ((*world)->rank() == 0) {
    std::printf("longfill: serving on %s\n", rank.server->listen_endpoint().c_str());
    std::fflush(stdout);
  }
  const absl::Status status = rank.server->Wait();
  context.signals->SetHandler(nullptr);
  if (status.ok()) {
    rank.watchdog->Close();
    return kExitDone;
  }
  if ((*world)->rank() == 0) Report(status);
  std::fflush(stdout);
  _exit(kExitRankLost);  // the engine may still hang in a collective: no destructor may wait for it
}

}  // namespace

Command AddServeCommand(CLI::App& program) {
  CLI::App* app = program.add_subcommand("serve", "Serve prefills over gRPC; ranks are started by mpirun");
  auto options = std::make_shared<ServeOptions>();
  AddModelOption(*app, options->model);
  AddListenOptions(*app, options->listen, options->kv_listen);
  AddKvMemoryOption(*app, options->kv_memory);
  AddMeshOption(*app, options->model);
  app->add_option(
         "--attention", options->attention,
         "what requests get that ask for 'auto': dense; a-shape:N_INIT,N_LOCAL; vertical-slash:V,S;\n"
         "block-sparse:K; block-share:R,TAU[,S[,C]][,fp8]; a pattern file; or auto (default), see\n"
         "--dense-below and --patterns")
      ->type_name("SPEC");
  AddDeviceOption(*app, options->model);
  AddThreadsOption(*app, options->model);
  AddWeightsOption(*app, options->model);
  AddMemoryOption(*app, options->model);
  AddPatternOptions(*app, options->model);
  AddRecallOptions(*app, "nobody watches; of requests that say nothing of it", options->recall);
  app->add_option("--queue", options->queue_capacity,
                  absl::StrCat("prompts that may wait for the one that computes (default: ",
                               options->queue_capacity, ")"))
      ->type_name("N")
      ->check(CLI::Range(0, 100000));
  app->add_option("--lease", options->lease_seconds,
                  absl::StrCat("seconds that a KV cache stays without a sign of its reader (default: ",
                               options->lease_seconds, ")"))
      ->type_name("SECONDS")
      ->check(CLI::Range(1, 86400));
  app->add_option(
         "--reader-timeout", options->reader_seconds,
         absl::StrCat("with --kv-memory reader: seconds for which each layer may wait for its reader, then\n"
                      "the prompt fails (default: ",
                      options->reader_seconds, ")"))
      ->type_name("SECONDS")
      ->check(CLI::Range(1, 60));  // well below the timeout of a communicator
  app->add_option("--drain-grace", options->drain_seconds,
                  absl::StrCat("after SIGTERM: seconds for the prompt that computes (default: ",
                               options->drain_seconds, ")"))
      ->type_name("SECONDS")
      ->check(CLI::Range(0, 86400));
  app->add_option(
         "--transfer-grace", options->transfer_seconds,
         absl::StrCat("then seconds for readers of KV caches (default: ", options->transfer_seconds, ")"))
      ->type_name("SECONDS")
      ->check(CLI::Range(0, 86400));
  app->add_option("--log-level", options->log_level, "debug, info (default), warning, error or off")
      ->type_name("LEVEL")
      ->check(CLI::IsMember({"debug", "info", "warning", "error", "off"}));
  return {app, [options](CommandContext& context) { return Serve(*options, context); }};
}

}  // namespace longfill
