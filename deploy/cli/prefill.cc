// longfill prefill: the batch job. Under mpirun all ranks run this file; rank 0 reads the input, writes
// manifest and logits and speaks, every rank writes the KV files of its own tokens.

#include <cstdio>
#include <filesystem>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "deploy/cli/command.h"
#include "deploy/cli/figures.h"
#include "deploy/cli/launch_summary.h"
#include "deploy/cli/output_directory.h"
#include "models/file_io.h"
#include "models/fingerprint.h"
#include "runtime/kv/kv_discard_sink.h"
#include "runtime/kv/kv_manifest.h"

namespace longfill {
namespace {

struct PrefillOptions {
  ModelOptions model;
  PromptOptions prompt;
  std::string kv = "files";  // or "discard"
};

// Input that rank 0 has read and checked. Bad input of any kind is exit code 2.
struct Job {
  std::vector<PrefillRequest> prompts;
  std::unique_ptr<OutputDirectory> output;  // nullptr: nothing is written
};

// Sinks into the folder of the prompt that the request id names.
KvSinkFactory MakeSinks(const PrefillOptions& options) {
  if (options.kv == "discard") return MakeKvDiscardSinkFactory();
  return [out = options.prompt.out, num_prompts = options.prompt.token_paths.size()](
             const KvTransferSpec& spec) -> absl::StatusOr<std::unique_ptr<KvSink>> {
    const std::string folder =
        num_prompts == 1 ? out : (std::filesystem::path(out) / spec.request_id).string();
    std::error_code
        ignored;  // other hosts may not see rank 0's directory; the sink reports what it cannot write
    std::filesystem::create_directories(folder, ignored);
    return MakeKvFileSinkFactory(folder)(spec);
  };
}

absl::StatusOr<KvManifest> MakeManifest(const PrefillEngine& engine, const PrefillRequest& prompt) {
  const ModelConfig& config = engine.config();
  const auto num_tokens = static_cast<int64_t>(prompt.token_ids.size());
  KvManifest manifest;
  manifest.request_id = prompt.request_id;
  manifest.transfer_id = prompt.transfer_id;
  manifest.instance_epoch = "batch";
  manifest.architecture = config.architecture;
  manifest.model_fingerprint = engine.model_fingerprint();
  LF_ASSIGN_OR_RETURN(manifest.token_hashes, TokenHashChain(prompt.token_ids, manifest.page_tokens));
  manifest.num_tokens = num_tokens;
  manifest.num_layers = config.num_layers;
  manifest.num_kv_heads = config.num_kv_heads;
  manifest.head_dim = config.head_dim;
  manifest.rotary_chunk_tokens = config.rope.dual_chunk.chunk_len();
  manifest.dtype = prompt.kv_dtype;
  const ShardPlan plan(engine.mesh(), num_tokens);
  for (int rank = 0; rank < plan.mesh().size(); ++rank)
    manifest.shards.push_back({rank, "", plan.TokenRanges(rank)});
  manifest.files = BatchFiles(plan, config.num_layers, config.num_kv_heads);
  return manifest;
}

void PrintProgress(const PrefillProgress& progress) {
  std::fprintf(stderr, "layer %lld of %lld, %.1f s\n", static_cast<long long>(progress.layers_done),
               static_cast<long long>(progress.num_layers), progress.seconds);
}

// Prints a line for every tenth of the layers.
PrefillCallbacks MakeCallbacks(const StopSignals& signals, bool quiet) {
  PrefillCallbacks callbacks;
  callbacks.should_stop = [&signals] { return signals.ShouldStop(); };
  if (quiet) return callbacks;
  callbacks.on_progress = [last_tenth = int64_t{0}](const PrefillProgress& progress) mutable {
    if (progress.num_layers == 0) return;
    const int64_t tenth = progress.layers_done * 10 / progress.num_layers;
    if (tenth > last_tenth) PrintProgress(progress);
    last_tenth = tenth;
  };
  return callbacks;
}

// Writes logits and, where the KV cache is in files, the manifest into `folder`; nothing where that is empty.
absl::StatusOr<PrefillFigures> RunPrompt(PrefillEngine& engine, const PrefillOptions& options,
                                         const PrefillRequest& prompt, const std::string& folder,
                                         const PrefillCallbacks& callbacks) {
  LF_ASSIGN_OR_RETURN(const KvManifest manifest, MakeManifest(engine, prompt));
  LF_ASSIGN_OR_RETURN(const PrefillResult result, engine.Prefill(prompt, MakeSinks(options), callbacks));
  if (folder.empty()) return result.figures;
  LF_RETURN_IF_ERROR(WriteLogitsFile(folder, result.positions, result.logits, engine.config().vocab_size));
  if (options.kv == "discard") return result.figures;
  // Last, so that a manifest stands for a whole result.
  LF_RETURN_IF_ERROR(
      WriteTextFile((std::filesystem::path(folder) / kManifestFileName).string(), manifest.ToJson()));
  return result.figures;
}

// Rank 0 after the engine is there. Returns the exit code; the error is printed.
int RunJob(PrefillEngine& engine, const PrefillOptions& options, Job& job, const StopSignals& signals) {
  const auto name = [&](size_t i) {
    return job.prompts.size() == 1 ? std::string() : absl::StrCat(options.prompt.token_paths[i], ": ");
  };
  for (size_t i = 0; i < job.prompts.size(); ++i) {
    if (options.prompt.kv_dtype.empty()) job.prompts[i].kv_dtype = engine.compute_dtype();
    if (const absl::Status status = engine.Validate(job.prompts[i]); !status.ok()) {
      PrintError(absl::StrCat(name(i), status.message()));
      return kExitUsage;
    }
  }
  if (job.output != nullptr) {
    if (const absl::Status status = job.output->Prepare(); !status.ok()) return Report(status);
  }
  std::vector<PrefillFigures> figures;
  for (size_t i = 0; i < job.prompts.size(); ++i) {
    const std::string folder = job.output == nullptr ? "" : job.output->Folder(static_cast<int>(i));
    const absl::StatusOr<PrefillFigures> done =
        RunPrompt(engine, options, job.prompts[i], folder, MakeCallbacks(signals, options.prompt.json));
    if (!done.ok()) {
      PrintError(absl::StrCat(name(i), done.status().message()));
      return ExitCodeOf(done.status());
    }
    figures.push_back(*done);
    if (!options.prompt.json) std::printf("%s%s\n", name(i).c_str(), FiguresToText(figures.back()).c_str());
  }
  if (job.output != nullptr) job.output->Keep();
  if (options.prompt.json) std::printf("%s\n", FiguresToJson(figures).c_str());
  return Report(FlushOutput());
}

absl::StatusOr<Job> ReadJob(const PrefillOptions& command) {
  const PromptOptions& options = command.prompt;
  Job job;
  LF_ASSIGN_OR_RETURN(job.prompts, ReadPrompts(options));
  if (options.out.empty()) {
    if (command.kv == "discard") return job;
    return absl::InvalidArgumentError("--out is missing: only with --kv discard nothing has to be written");
  }
  LF_ASSIGN_OR_RETURN(job.output, OutputDirectory::Open(options.out, static_cast<int>(job.prompts.size()),
                                                        options.overwrite));
  return job;
}

// The engine on all ranks, or on all ranks the exit code of the same error, printed once.
struct Started {
  std::unique_ptr<PrefillEngine> engine;
  int exit_code = kExitDone;
};

Started StartEngine(const ModelOptions& options, World& world, const absl::Status& job_status) {
  Started started;
  absl::StatusOr<EngineOptions> engine_options = MakeEngineOptions(options, world);
  absl::Status status = world.Agree(job_status.ok() ? engine_options.status() : job_status);
  if (status.ok()) {
    auto engine = PrefillEngine::Create(*engine_options, world.communicator());
    status = engine.status();
    if (engine.ok()) started.engine = std::move(*engine);
  }
  if (status.ok()) return started;
  if (world.rank() == 0) Report(status);
  // A broken checkpoint is bad input, although its bytes are what is wrong.
  started.exit_code = absl::IsDataLoss(status) ? static_cast<int>(kExitUsage) : ExitCodeOf(status);
  return started;
}

// Ranks other than 0. An error that rank 0 knows as well is printed there.
int ServeJob(PrefillEngine& engine, const PrefillOptions& options, const StopSignals& signals) {
  absl::Status last_outcome;
  const absl::Status status = engine.Serve(
      MakeSinks(options), [&signals] { return signals.ShouldStop(); },
      [&last_outcome](const absl::Status& outcome) { last_outcome = outcome; });
  if (!status.ok() && !engine.healthy()) {
    PrintError(absl::StrCat("rank ", engine.world().rank(), ": ", status.message()));
    return kExitFailed;
  }
  return ExitCodeOf(status.ok() ? last_outcome : status);
}

// Collective. What was chosen for the ranks, where there are several and people read.
absl::Status TellLaunch(const PrefillOptions& options, World& world, PrefillEngine& engine) {
  if (world.size() == 1 || options.prompt.json) return absl::OkStatus();
  LF_ASSIGN_OR_RETURN(const DeviceOptions device,
                      MakeDeviceOptions(options.model, world.ranks_on_host(), world.local_rank()));
  LF_ASSIGN_OR_RETURN(const LaunchSummary summary, SummarizeLaunch(world, engine.backend(), device));
  if (world.rank() != 0) return absl::OkStatus();
  std::fprintf(stderr, "%s; exchange: %s\n", LaunchText(summary).c_str(),
               engine.DescribeCommunicator().c_str());
  return absl::OkStatus();
}

int Prefill(const PrefillOptions& options, CommandContext& context) {
  // Before anything that may fail, so that errors can be agreed on and are printed once.
  auto world = World::Create(context.launch, kExitFailed);
  if (!world.ok()) return ReportNoWorld(context.launch, world.status());
  absl::StatusOr<Job> job = Job{};
  if ((*world)->rank() == 0) job = ReadJob(options);
  const Started started = StartEngine(options.model, **world, job.status());
  if (started.engine == nullptr) return started.exit_code;
  if (const absl::Status status = TellLaunch(options, **world, *started.engine); !status.ok()) {
    return (*world)->rank() == 0 ? Report(status) : ExitCodeOf(status);
  }
  if ((*world)->rank() != 0) {
    return ServeJob(*started.engine, options, *context.signals);
  }
  const int exit_code = RunJob(*started.engine, options, *job, *context.signals);
  if (const absl::Status status = started.engine->Shutdown(); !status.ok() && exit_code == kExitDone)
    return Report(status);
  return exit_code;
}

}  // namespace

Command AddPrefillCommand(CLI::App& program) {
  CLI::App* app = program.add_subcommand(
      "prefill",
      "Prefill prompts as a batch job and write KV cache and logits to files; ranks are started by mpirun");
  auto options = std::make_shared<PrefillOptions>();
  AddModelOption(*app, options->model);
  AddPromptOptions(*app, "nobody watches", options->prompt);
  app->add_option(
         "--kv", options->kv,
         "files (default); or discard: copied out as ever, CRC-32C printed, then dropped; --out may be\n"
         "left out then. For measurements")
      ->type_name("WHERE")
      ->check(CLI::IsMember({"files", "discard"}));
  AddMeshOption(*app, options->model);
  AddDeviceOption(*app, options->model);
  AddThreadsOption(*app, options->model);
  AddWeightsOption(*app, options->model);
  AddMemoryOption(*app, options->model);
  AddPatternOptions(*app, options->model);
  return {app, [options](CommandContext& context) { return Prefill(*options, context); }};
}

}  // namespace longfill
