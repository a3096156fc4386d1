// longfill serve: one rank of the service. Rank 0 takes prompts; every rank serves the KV pages of its own
// tokens.

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "deploy/cli/command.h"
#include "deploy/cli/version.h"
#include "kernels/base/memory.h"
#include "parallel/watchdog.h"
#include "runtime/client/endpoint.h"
#include "runtime/kv/file_memory.h"
#include "runtime/observe/log.h"
#include "runtime/serving/engine_backend.h"
#include "runtime/serving/server.h"

namespace longfill {
namespace {

static_assert(kExitRankLost == kExitPeerLost);

struct ServeOptions {
  ModelOptions model;
  std::string listen = "127.0.0.1:50051";
  std::string kv_listen;
  std::string kv_memory = "host";  // or "pageable", "file:DIR"
  std::string attention = "auto";
  int queue_capacity = SchedulerOptions{}.queue_capacity;
  int64_t lease_seconds = 30;
  int64_t drain_seconds = 600;
  int64_t transfer_seconds = 60;
  std::string log_level = "info";
};

// DIR of "file:DIR".
std::optional<std::string> KvDirectory(const std::string& kv_memory) {
  constexpr std::string_view kPrefix = "file:";
  if (!kv_memory.starts_with(kPrefix) || kv_memory.size() == kPrefix.size()) return std::nullopt;
  return kv_memory.substr(kPrefix.size());
}

// A CLI11 check: what is wrong, or nothing.
std::string CheckKvMemory(const std::string& kv_memory) {
  if (kv_memory == "host" || kv_memory == "pageable" || KvDirectory(kv_memory)) return {};
  if (kv_memory == "device")
    return "KV caches are not kept on the device, only in host, pageable or file:DIR";
  return absl::StrCat("\"", kv_memory, "\" is not host, pageable or file:DIR");
}

bool IsWildcard(const std::string& host) { return host.empty() || host == "0.0.0.0" || host == "[::]"; }

// Names of the hosts of all ranks, in order of rank.
absl::StatusOr<std::vector<std::string>> GatherStrings(World& world, const std::string& mine) {
  CpuStream stream;
  return AllGatherStrings(world.communicator(), mine, stream);
}

// Where this rank listens. Rank 0: --listen for prompts, and --kv-listen for pages where given. Rank r: port
// r above that of --kv-listen, or any free port; its host is that of --kv-listen, else of --listen.
absl::StatusOr<ServerOptions> MakeServerOptions(const ServeOptions& options, const World& world,
                                                bool several_hosts) {
  ServerOptions server;
  server.rank = world.rank();
  const std::string kv_text = options.kv_listen.empty() ? options.listen : options.kv_listen;
  LF_RETURN_IF_ERROR(ParseHostPort(options.listen).status());
  LF_ASSIGN_OR_RETURN(const HostPort kv, ParseHostPort(kv_text));
  const bool fixed_ports = !options.kv_listen.empty() && kv.port != 0;
  if (kv.port + (fixed_ports ? world.size() - 1 : 0) > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--kv-listen ", kv_text, ": rank r listens r ports above, and there are ", world.size(), " ranks"));
  }
  server.listen = world.rank() == 0 ? options.listen
                                    : absl::StrCat(kv.host, ":", fixed_ports ? kv.port + world.rank() : 0);
  if (world.rank() == 0) server.kv_listen = options.kv_listen;
  if (several_hosts && IsWildcard(kv.host)) server.advertise_host = HostName();
  server.scheduler.queue_capacity = options.queue_capacity;
  server.store.lease = std::chrono::seconds(options.lease_seconds);
  server.drain_grace = std::chrono::seconds(options.drain_seconds);
  server.transfer_grace = std::chrono::seconds(options.transfer_seconds);
  return server;
}

// The engine's options; --attention replaces everything that "auto" would choose from.
absl::StatusOr<EngineOptions> MakeServeEngineOptions(const ServeOptions& options, const World& world) {
  LF_ASSIGN_OR_RETURN(EngineOptions engine, MakeEngineOptions(options.model, world));
  engine.keep_kv = !KvDirectory(options.kv_memory);  // files take none of the host's memory
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
       {"threads", engine.device.num_threads},
       {"kv_memory", options.kv_memory},
       {"attention", options.attention},
       {"dense_below", engine.attention.dense_below},
       {"patterns", options.model.patterns_path},
       {"memory_limit_bytes", engine.memory_limit_bytes},
       {"queue", options.queue_capacity},
       {"lease_seconds", options.lease_seconds},
       {"drain_seconds", options.drain_seconds},
       {"transfer_seconds", options.transfer_seconds}});
}

// What one rank of the service is made of, in the order in which it is built.
struct Rank {
  std::shared_ptr<Backend> device;
  std::unique_ptr<FileMemoryResource> kv_files;
  CpuMemoryResource pageable;
  MemoryResource* kv_memory = nullptr;
  std::unique_ptr<Server> server;
  std::unique_ptr<PrefillEngine> engine;
  std::unique_ptr<PrefillBackend> backend;
  std::unique_ptr<Watchdog> watchdog;
};

// The device, and the memory that --kv-memory names.
absl::Status OpenDevice(const ServeOptions& options, const EngineOptions& engine, Rank& rank) {
  LF_ASSIGN_OR_RETURN(rank.device, CreateBackend(engine.device));
  if (const std::optional<std::string> directory = KvDirectory(options.kv_memory); directory) {
    LF_ASSIGN_OR_RETURN(rank.kv_files, FileMemoryResource::Create(*directory));
    rank.kv_memory = rank.kv_files.get();
  } else if (options.kv_memory == "pageable") {
    rank.kv_memory = &rank.pageable;
  } else {
    rank.kv_memory = &rank.device->host_memory();
  }
  return absl::OkStatus();
}

// Collective: everything up to the moment when prompts are taken. Every rank gets the same error.
absl::Status Build(const ServeOptions& options, World& world, Rank& rank) {
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> hosts, GatherStrings(world, HostName()));
  const bool several_hosts = std::set<std::string>(hosts.begin(), hosts.end()).size() > 1;
  const absl::StatusOr<ServerOptions> server_options = MakeServerOptions(options, world, several_hosts);
  const absl::StatusOr<EngineOptions> engine_options = MakeServeEngineOptions(options, world);
  LF_RETURN_IF_ERROR(world.Agree(server_options.ok() ? engine_options.status() : server_options.status()));
  LF_RETURN_IF_ERROR(world.Agree(OpenDevice(options, *engine_options, rank)));
  if (world.rank() == 0) LogConfiguration(options, *engine_options, *rank.device, world);

  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(*server_options, rank.kv_memory);
  LF_RETURN_IF_ERROR(world.Agree(server.status()));
  rank.server = std::move(*server);
  LF_ASSIGN_OR_RETURN(rank.engine, PrefillEngine::Create(*engine_options, world.communicator(), rank.device));
  rank.backend = MakeEngineBackend(rank.engine.get());

  GroupInfo group;
  group.rank = world.rank();
  group.server_version = absl::StrCat(kVersion, " (", kGitCommit, ")");
  CpuStream stream;
  LF_ASSIGN_OR_RETURN(group.kv_endpoints, GatherStrings(world, rank.server->kv_endpoint()));
  LF_ASSIGN_OR_RETURN(group.instance_epoch, BroadcastString(world.communicator(), RandomId(), 0, stream));
  WatchdogOptions watchdog_options;
  if (several_hosts) watchdog_options.advertise_host = HostName();
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
  if (!world.ok()) return context.launch.rank == 0 ? Report(world.status()) : ExitCodeOf(world.status());
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
  app->add_option("--listen", options->listen,
                  absl::StrCat("where rank 0 takes prompts; port 0 takes any free one (default: ",
                               options->listen, ")"))
      ->type_name("HOST:PORT");
  app->add_option("--kv-listen", options->kv_listen,
                  "where ranks serve their KV pages: rank r at PORT + r, with port 0 at any free one\n"
                  "(default: rank 0 at --listen, the others on its host at any free port)")
      ->type_name("HOST:PORT");
  app->add_option("--kv-memory", options->kv_memory,
                  "where KV caches are until they have been read: host (default, page-locked for a GPU);\n"
                  "pageable; or file:DIR, unnamed files in DIR, for caches larger than the host's memory")
      ->type_name("WHERE")
      ->check(CheckKvMemory, "WHERE");
  AddMeshOption(*app, options->model);
  app->add_option(
         "--attention", options->attention,
         "what requests get that ask for 'auto': dense; a-shape:N_INIT,N_LOCAL; vertical-slash:V,S;\n"
         "block-sparse:K; a pattern file; or auto (default), see --dense-below and --patterns")
      ->type_name("SPEC");
  AddDeviceOption(*app, options->model);
  AddThreadsOption(*app, options->model);
  AddMemoryOption(*app, options->model);
  AddPatternOptions(*app, options->model);
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
