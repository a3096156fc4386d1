// longfill bench prefill: seconds by part of a whole prefill, of a model that needs no checkpoint.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "deploy/cli/bench.h"
#include "deploy/cli/bench_report.h"
#include "deploy/cli/bench_work.h"
#include "deploy/cli/command.h"
#include "runtime/engine/replayed_indices.h"
#include "runtime/kv/kv_discard_sink.h"

namespace longfill {
namespace {

// A first prompt loads kernels and picks matrix products; more tokens than one chunk of the linear layers.
constexpr int64_t kWarmUpTokens = 32768;
constexpr std::string_view kNoCopy = "none";  // request id of prompts whose K and V stay on the device

struct BenchOptions {
  ModelOptions model;  // model_dir is not used
  BenchWorkOptions work;
  std::string kv = "discard";
  bool compare_kv_copy = false;
  RecallArguments recall;
  int repeat = 1;
  CardRates rates;
  bool json = false;
};

// What the options say, checked; equal on all ranks where the file systems are.
struct BenchJob {
  EngineOptions engine;
  PrefillRequest request;
  PatternSet patterns;
  std::shared_ptr<ReplayedIndices> replayed;  // empty: the indices that are built are used
};

absl::StatusOr<BenchJob> MakeJob(const BenchOptions& options, const World& world) {
  BenchJob job;
  LF_ASSIGN_OR_RETURN(job.engine, MakeEngineOptions(options.model, world));
  LF_ASSIGN_OR_RETURN(BenchWork work, ReadBenchWork(options.work, options.model, job.engine.attention));
  job.request.attention = std::move(work.attention);
  job.request.coverage = work.coverage;
  job.request.token_ids = std::move(work.token_ids);
  job.request.recall = options.recall.options;
  job.patterns = std::move(work.patterns);
  job.replayed = std::move(work.replayed);
  job.engine.index_replacement = job.replayed;
  job.engine.bench_model = BenchModel{std::move(work.config), options.work.seed};
  return job;
}

// Every rank knows from the request id what to do with its K and V.
absl::StatusOr<std::unique_ptr<KvSink>> MakeSink(const KvTransferSpec& spec) {
  if (spec.request_id == kNoCopy) return nullptr;
  return MakeKvDiscardSinkFactory()(spec);
}

// Whether K and V are copied out in each run. A comparison goes on, off, off, on, ..., so that a card that
// warms up favours neither.
std::vector<bool> PlanRuns(const BenchOptions& options) {
  std::vector<bool> copied;
  for (int i = 0; i < options.repeat; ++i) {
    if (!options.compare_kv_copy) {
      copied.push_back(options.kv != kNoCopy);
    } else {
      copied.push_back(i % 2 == 0);
      copied.push_back(i % 2 != 0);
    }
  }
  return copied;
}

absl::Status Measure(PrefillEngine& engine, const BenchOptions& options, PrefillRequest request,
                     const StopSignals& signals, BenchReport* report) {
  const PrefillCallbacks callbacks = {.should_stop = [&signals] { return signals.ShouldStop(); }};
  request.kv_dtype = engine.compute_dtype();
  PrefillRequest warm_up = request;
  warm_up.token_ids.resize(static_cast<size_t>(std::min(options.work.num_tokens, kWarmUpTokens)));
  warm_up.transfer_id = RandomId();
  LF_RETURN_IF_ERROR(engine.Prefill(warm_up, MakeSink, callbacks).status());
  for (const bool copied : PlanRuns(options)) {
    request.request_id = copied ? options.kv : std::string(kNoCopy);
    request.transfer_id = RandomId();
    LF_ASSIGN_OR_RETURN(PrefillResult result, engine.Prefill(request, MakeSink, callbacks));
    report->runs.push_back({copied, std::move(result.figures)});
  }
  return absl::OkStatus();
}

// Ranks other than 0; rank 0 reports what all know.
int ServeRuns(PrefillEngine& engine, const StopSignals& signals) {
  absl::Status last_outcome;
  const absl::Status status = engine.Serve(
      MakeSink, [&signals] { return signals.ShouldStop(); },
      [&last_outcome](const absl::Status& outcome) { last_outcome = outcome; });
  return ExitCodeOf(status.ok() ? last_outcome : status);
}

int Print(const BenchReport& report, bool json) {
  std::printf("%s", json ? absl::StrCat(report.ToJson(), "\n").c_str() : report.ToText().c_str());
  return Report(FlushOutput());
}

// Collective. Pairs of replayed indices are counted here, so that no timed run does it.
absl::StatusOr<std::unique_ptr<PrefillEngine>> MakeEngine(const BenchJob& job, World& world) {
  LF_ASSIGN_OR_RETURN(std::unique_ptr<PrefillEngine> engine,
                      PrefillEngine::Create(job.engine, world.communicator()));
  if (job.replayed == nullptr) return engine;
  const absl::Status counted =
      job.replayed->Begin(engine->backend(), static_cast<int64_t>(job.request.token_ids.size()));
  job.replayed->End();
  LF_RETURN_IF_ERROR(world.Agree(counted));
  return engine;
}

int BenchPrefill(const BenchOptions& options, CommandContext& context) {
  auto world = World::Create(context.launch, kExitFailed);
  if (!world.ok()) return ReportNoWorld(context.launch, world.status());
  const bool speaks = (*world)->rank() == 0;
  const absl::StatusOr<BenchJob> job = MakeJob(options, **world);
  absl::Status status = (*world)->Agree(job.status());
  if (!status.ok()) {
    const int code = speaks ? Report(status) : ExitCodeOf(status);
    // A broken recording is bad input, although its bytes are what is wrong.
    return absl::IsDataLoss(status) ? static_cast<int>(kExitUsage) : code;
  }
  const auto begin = std::chrono::steady_clock::now();
  const absl::StatusOr<std::unique_ptr<PrefillEngine>> engine = MakeEngine(*job, **world);
  if (!engine.ok()) return speaks ? Report(engine.status()) : ExitCodeOf(engine.status());
  if (!speaks) return ServeRuns(**engine, *context.signals);

  BenchReport report;
  report.geometry = options.work.geometry;
  report.config = (*engine)->config();
  report.num_tokens = options.work.num_tokens;
  report.seed = options.work.seed;
  report.indices = options.work.indices;
  report.selecting_heads = SelectingHeads(job->patterns);
  report.rates = options.rates;
  report.setup_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  status = Measure(**engine, options, job->request, *context.signals, &report);
  const absl::Status shut_down = (*engine)->Shutdown();
  if (status.ok()) status = shut_down;
  return status.ok() ? Print(report, options.json) : Report(status);
}

void AddKvOptions(CLI::App& app, BenchOptions& options) {
  CLI::Option* kv =
      app.add_option("--kv", options.kv,
                     "discard (default): K and V leave the device, are checksummed and dropped;\n"
                     "none: they do not leave it")
          ->type_name("WHERE")
          ->check(CLI::IsMember({"discard", "none"}));
  app.add_flag("--compare-kv-copy", options.compare_kv_copy, "every run with and without that copy")
      ->excludes(kv);
}

void AddMeasurementOptions(CLI::App& app, BenchOptions& options) {
  app.add_option("--repeat", options.repeat, "runs (default: 1)")->type_name("R")->check(CLI::Range(1, 1000));
  const auto rate = [&app](const char* name, double* value, const char* what) {
    app.add_option(name, *value, absl::StrCat("floor times: ", what, " (default: ", *value, ")"))
        ->type_name("X")
        ->check(CLI::PositiveNumber);
  };
  rate("--gemm-tflops", &options.rates.gemm_tflops, "matrix products, TFLOP/s");
  rate("--attention-tflops", &options.rates.attention_tflops, "attention, TFLOP/s of covered pairs");
  rate("--memory-tbs", &options.rates.memory_tbs, "device memory, TB/s");
  rate("--copy-gbs", &options.rates.copy_gbs, "device to host, GB/s");
  app.add_flag("--json", options.json, "one JSON object and nothing else on standard output");
}

}  // namespace

Command AddBenchPrefill(CLI::App& bench) {
  CLI::App* app = bench.add_subcommand(
      "prefill", "Measure a whole prefill, part by part: random weights and prompt, recorded selections");
  auto options = std::make_shared<BenchOptions>();
  AddBenchWorkOptions(*app, options->work, options->model);
  AddKvOptions(*app, *options);
  AddMeasurementOptions(*app, *options);
  AddRecallOptions(*app, "nobody watches; --min-recall not with --indices", options->recall);
  AddMeshOption(*app, options->model);
  AddDeviceOption(*app, options->model);
  AddThreadsOption(*app, options->model);
  AddWeightsOption(*app, options->model);
  AddMemoryOption(*app, options->model);
  return {app, [options](CommandContext& context) { return BenchPrefill(*options, context); }};
}

}  // namespace longfill
