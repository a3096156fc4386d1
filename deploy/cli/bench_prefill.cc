// longfill bench prefill: seconds by part of a whole prefill, of a model that needs no checkpoint.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "deploy/cli/bench.h"
#include "deploy/cli/bench_report.h"
#include "deploy/cli/command.h"
#include "models/geometry.h"
#include "runtime/engine/replayed_indices.h"
#include "runtime/kv/kv_discard_sink.h"

namespace longfill {
namespace {

// A first prompt loads kernels and picks matrix products; more tokens than one chunk of the linear layers.
constexpr int64_t kWarmUpTokens = 32768;
constexpr std::string_view kNoCopy = "none";  // request id of prompts whose K and V stay on the device

struct BenchOptions {
  ModelOptions model;  // model_dir is not used
  std::string geometry;
  int64_t num_tokens = 0;
  std::string attention = "dense";
  std::string coverage = "tiles";
  std::string indices;
  std::string kv = "discard";
  bool compare_kv_copy = false;
  int repeat = 1;
  uint64_t seed = 1;
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
  LF_ASSIGN_OR_RETURN(ModelConfig config, GeometryConfig(options.geometry));
  if (options.num_tokens > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("--tokens ", options.num_tokens, " is beyond the ",
                                                   config.max_position_embeddings, " positions of ",
                                                   options.geometry));
  }
  LF_ASSIGN_OR_RETURN(job.engine, MakeEngineOptions(options.model, world));
  LF_ASSIGN_OR_RETURN(job.request.attention, options.model.patterns_path.empty()
                                                 ? ReadAttentionSpec(options.attention)
                                                 : ReadPatterns(options.model));
  LF_ASSIGN_OR_RETURN(job.request.coverage, ParseCoverage(options.coverage));
  LF_ASSIGN_OR_RETURN(
      ResolvedAttention attention,
      ResolveAttention(job.request.attention, job.engine.attention, options.num_tokens, config));
  job.patterns = std::move(attention.patterns);
  if (!options.indices.empty()) {
    absl::StatusOr<RecordedIndices> recorded = RecordedIndices::Load(options.indices);
    absl::Status status = recorded.status();
    if (status.ok()) status = recorded->CheckReplays(job.patterns, options.num_tokens);
    if (!status.ok()) return Annotate(status, "--indices");
    LF_ASSIGN_OR_RETURN(job.replayed, ReplayedIndices::Create(*recorded, job.patterns, job.request.coverage));
    job.engine.index_replacement = job.replayed;
  }
  std::mt19937_64 random(options.seed);
  std::uniform_int_distribution<int32_t> draw(0, static_cast<int32_t>(config.vocab_size) - 1);
  job.request.token_ids.resize(static_cast<size_t>(options.num_tokens));
  for (int32_t& id : job.request.token_ids) id = draw(random);
  job.engine.bench_model = BenchModel{std::move(config), options.seed};
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
  warm_up.token_ids.resize(static_cast<size_t>(std::min(options.num_tokens, kWarmUpTokens)));
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
  if (std::fflush(stdout) == 0) return kExitDone;
  PrintError("cannot write to standard output");
  return kExitFailed;
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
  report.geometry = options.geometry;
  report.config = (*engine)->config();
  report.num_tokens = options.num_tokens;
  report.seed = options.seed;
  report.indices = options.indices;
  report.selecting_heads = SelectingHeads(job->patterns);
  report.rates = options.rates;
  report.setup_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  status = Measure(**engine, options, job->request, *context.signals, &report);
  const absl::Status shut_down = (*engine)->Shutdown();
  if (status.ok()) status = shut_down;
  return status.ok() ? Print(report, options.json) : Report(status);
}

void AddWorkOptions(CLI::App& app, BenchOptions& options) {
  app.add_option("--geometry", options.geometry, absl::StrCat(GeometryNames(), ", or a config.json"))
      ->type_name("NAME|FILE")
      ->required();
  app.add_option("--tokens", options.num_tokens, "length of the prompt, whose ids are random")
      ->type_name("N")
      ->required()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 31));
  CLI::Option* patterns =
      app.add_option("--patterns", options.model.patterns_path, "a pattern file in the published JSON form")
          ->type_name("FILE|DIR");
  app.add_option("--attention", options.attention,
                 "dense (default), a-shape:N_INIT,N_LOCAL, vertical-slash:V,S, block-sparse:K or "
                 "block-share:R,TAU for all heads")
      ->type_name("SPEC")
      ->excludes(patterns);
  app.add_option("--coverage", options.coverage, "tiles (default) or parity")
      ->type_name("COVERAGE")
      ->check(CLI::IsMember({"parity", "tiles"}));
  app.add_option(
         "--indices", options.indices,
         "recorded selections that attention uses in place of those that are built: each vertical-slash\n"
         "head takes its own budget, layers and heads in turn; of a prompt of N tokens")
      ->type_name("FILE");
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
  app.add_option("--seed", options.seed, "of weights and token ids (default: 1)")->type_name("S");
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
  AddWorkOptions(*app, *options);
  AddMeasurementOptions(*app, *options);
  AddMeshOption(*app, options->model);
  AddDeviceOption(*app, options->model);
  AddThreadsOption(*app, options->model);
  AddWeightsOption(*app, options->model);
  AddMemoryOption(*app, options->model);
  return {app, [options](CommandContext& context) { return BenchPrefill(*options, context); }};
}

}  // namespace longfill
