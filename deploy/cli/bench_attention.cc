// longfill bench attention: the attention of single layers on random Q, K and V, timed and checked.

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "deploy/cli/attention_case.h"
#include "deploy/cli/attention_measurement.h"
#include "deploy/cli/bench.h"
#include "models/geometry.h"
#include "runtime/engine/engine_device.h"

namespace longfill {
namespace {

struct BenchOptions {
  ModelOptions device;  // its device, dtype and threads
  std::vector<int64_t> tokens;
  std::vector<std::string> attention;
  std::string patterns_path;
  std::string geometry = "llama3-8b";
  int64_t layer = -1;  // the most uneven one
  std::string indices;
  std::string coverage = "tiles";
  std::vector<int64_t> head_dims = {128};
  int64_t num_q_heads = 32;
  int64_t num_kv_heads = 8;
  int64_t num_heads = 0;  // 0: one call
  std::string kernels = "auto";
  double reference_tflops = 0;
  bool unchecked = false;
  bool json = false;
  AttentionMeasurementOptions measurement;
};

absl::Status CheckOptions(const BenchOptions& options) {
  LF_RETURN_IF_ERROR(CheckHeads(options.num_q_heads, options.num_kv_heads));
  if (options.num_heads % options.num_q_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--heads ", options.num_heads, " is not a multiple of --q-heads ", options.num_q_heads));
  }
  LF_RETURN_IF_ERROR(CheckKernels(options.kernels, options.device));
  if (options.attention.empty() && options.patterns_path.empty()) {
    return absl::InvalidArgumentError("one of --attention and --patterns is required");
  }
  if (!options.patterns_path.empty() && options.num_heads != 0) {
    return absl::InvalidArgumentError("--heads is for --attention: --patterns measures one call");
  }
  return absl::OkStatus();
}

int64_t HeadsOf(const BenchOptions& options) {
  return options.num_heads == 0 ? options.num_q_heads : options.num_heads;
}

std::vector<int64_t> HeadsInOrder(int64_t count) {
  std::vector<int64_t> heads;
  for (int64_t head = 0; head < count; ++head) heads.push_back(head);
  return heads;
}

class CaseMaker {
 public:
  CaseMaker(const BenchOptions& options, Coverage coverage, std::optional<RecordedIndices> recorded,
            ThreadPool& threads)
      : options_(options), coverage_(coverage), recorded_(std::move(recorded)), threads_(threads) {}

  absl::StatusOr<AttentionCase> FromSpec(const std::string& spec, int64_t num_tokens,
                                         int64_t head_dim) const {
    AttentionCase made = Blank(num_tokens, head_dim);
    made.name = spec;
    if (IsRandomBlocks(spec)) {
      LF_ASSIGN_OR_RETURN(const RandomBlocks blocks, ParseRandomBlocks(spec));
      made.source = absl::StrCat("random lists of at least ", blocks.min_blocks, " blocks a row");
      for (int64_t head = 0; head < HeadsOf(options_); ++head) {
        made.indices.emplace_back(
            MakeRandomBlocks(blocks, num_tokens, options_.measurement.seed + static_cast<uint64_t>(head)));
      }
      return made;
    }
    LF_ASSIGN_OR_RETURN(const HeadPattern pattern, ParseHeadPattern(spec));
    made.patterns.assign(static_cast<size_t>(HeadsOf(options_)), pattern);
    LF_RETURN_IF_ERROR(FillIndices(pattern, &made));
    return made;
  }

  absl::StatusOr<AttentionCase> FromPatterns(int64_t num_tokens, int64_t head_dim) const {
    LF_ASSIGN_OR_RETURN(const ModelConfig config, GeometryConfig(options_.geometry));
    LF_ASSIGN_OR_RETURN(const PatternSet patterns,
                        LoadPatternFile(options_.patterns_path, config.num_layers, config.num_q_heads));
    LF_ASSIGN_OR_RETURN(const PatternHeads heads,
                        MostUnevenHeads({*recorded_, num_tokens, coverage_}, patterns.For(num_tokens),
                                        options_.layer, options_.num_q_heads, threads_));
    AttentionCase made = Blank(num_tokens, head_dim);
    made.name = absl::StrCat("mixed, layer ", heads.layer, ", heads ", heads.first_head, " to ",
                             heads.first_head + options_.num_q_heads - 1);
    made.source = absl::StrFormat("%s, largest over mean pairs %.2f", recorded_->path(), heads.unevenness);
    made.patterns = heads.patterns;
    LF_ASSIGN_OR_RETURN(made.indices, RecordedSelections({*recorded_, num_tokens, coverage_}, heads.patterns,
                                                         heads.recorded_heads));
    return made;
  }

 private:
  AttentionCase Blank(int64_t num_tokens, int64_t head_dim) const {
    AttentionCase made;
    made.num_tokens = num_tokens;
    made.head_dim = head_dim;
    made.num_q_heads = options_.num_q_heads;
    made.num_kv_heads = options_.num_kv_heads;
    return made;
  }

  // Leaves them to be built where heads select and nothing was recorded.
  absl::Status FillIndices(const HeadPattern& pattern, AttentionCase* made) const {
    if (std::holds_alternative<BlockSparse>(pattern) || std::holds_alternative<BlockShare>(pattern)) {
      return absl::UnimplementedError(
          absl::StrCat(made->name, ": block lists are timed as random-blocks:..."));
    }
    made->source = "nothing to select";
    if (const std::optional<SparseIndex> fixed = MakeFixedIndex(pattern, made->num_tokens);
        fixed.has_value()) {
      made->indices.assign(made->patterns.size(), *fixed);
      return absl::OkStatus();
    }
    made->source = "as built from random Q and K";
    if (!recorded_) return absl::OkStatus();
    made->source = recorded_->path();
    LF_ASSIGN_OR_RETURN(made->indices, RecordedSelections({*recorded_, made->num_tokens, coverage_},
                                                          made->patterns, HeadsInOrder(HeadsOf(options_))));
    return absl::OkStatus();
  }

  const BenchOptions& options_;
  const Coverage coverage_;
  const std::optional<RecordedIndices> recorded_;
  ThreadPool& threads_;
};

// Every case that the options describe, in the order of lengths, head dims and patterns.
absl::StatusOr<std::vector<AttentionCase>> MakeCases(const BenchOptions& options, ThreadPool& threads) {
  LF_RETURN_IF_ERROR(CheckOptions(options));
  LF_ASSIGN_OR_RETURN(const Coverage coverage, ParseCoverage(options.coverage));
  std::optional<RecordedIndices> recorded;
  if (!options.indices.empty()) {
    absl::StatusOr<RecordedIndices> loaded = RecordedIndices::Load(options.indices);
    if (!loaded.ok()) return Annotate(loaded.status(), "--indices");
    recorded = *std::move(loaded);
  }
  const CaseMaker maker(options, coverage, std::move(recorded), threads);
  std::vector<AttentionCase> cases;
  for (const int64_t num_tokens : options.tokens) {
    for (const int64_t head_dim : options.head_dims) {
      for (const std::string& spec : options.attention) {
        LF_ASSIGN_OR_RETURN(AttentionCase made, maker.FromSpec(spec, num_tokens, head_dim));
        cases.push_back(std::move(made));
      }
      if (options.patterns_path.empty()) continue;
      LF_ASSIGN_OR_RETURN(AttentionCase made, maker.FromPatterns(num_tokens, head_dim));
      cases.push_back(std::move(made));
    }
  }
  return cases;
}

struct Backends {
  std::shared_ptr<Backend> measured;
  std::shared_ptr<Backend> generic;  // empty: `measured` has no others
};

absl::StatusOr<Backends> MakeBackends(const BenchOptions& options) {
  LF_ASSIGN_OR_RETURN(DeviceOptions device, MakeDeviceOptions(options.device, 1, 0));
  device.generic_kernels = options.kernels == "generic";
  Backends backends;
  LF_ASSIGN_OR_RETURN(backends.measured, CreateBackend(device));
  if (device.kind == DeviceKind::kCpu || device.generic_kernels || options.unchecked) return backends;
  device.generic_kernels = true;
  LF_ASSIGN_OR_RETURN(backends.generic, CreateBackend(device));
  return backends;
}

// Cases are printed as they are done, unless they are parts of one JSON object.
absl::StatusOr<std::vector<AttentionFigures>> Measure(const BenchOptions& options, const Backends& backends,
                                                      std::vector<AttentionCase> cases, ThreadPool& threads,
                                                      const StopSignals& signals) {
  HostScratch scratch(*backends.measured);
  std::vector<AttentionFigures> measured;
  for (AttentionCase& next : cases) {
    LF_RETURN_IF_ERROR(signals.ShouldStop());
    LF_ASSIGN_OR_RETURN(AttentionFigures figures,
                        AttentionMeasurement::Run(*backends.measured, backends.generic.get(), threads,
                                                  scratch, std::move(next), options.measurement));
    if (!options.json) std::printf("%s", figures.ToText(options.reference_tflops).c_str());
    std::fflush(stdout);
    measured.push_back(std::move(figures));
  }
  return measured;
}

std::string ReportJson(const BenchOptions& options, const Backend& backend,
                       const std::vector<AttentionFigures>& measured) {
  nlohmann::ordered_json cases = nlohmann::ordered_json::array();
  for (const AttentionFigures& figures : measured) cases.push_back(figures.ToJson(options.reference_tflops));
  const nlohmann::ordered_json report = {{"device", backend.facts().name},
                                         {"kernels", options.kernels},
                                         {"coverage", options.coverage},
                                         {"repeat", options.measurement.repeat},
                                         {"reference_tflops", options.reference_tflops},
                                         {"cases", std::move(cases)}};
  return report.dump(1) + "\n";
}

int BenchAttention(BenchOptions options, CommandContext& context) {
  if (context.launch.parallel) return Report(absl::InvalidArgumentError("bench attention runs on one rank"));
  if (options.device.threads == 0) options.device.threads = DefaultThreads(1);
  options.measurement.checked = !options.unchecked;
  ThreadPool threads(options.device.threads);
  absl::StatusOr<std::vector<AttentionCase>> cases = MakeCases(options, threads);
  if (!cases.ok()) {
    const int code = Report(cases.status());
    return absl::IsDataLoss(cases.status()) ? static_cast<int>(kExitUsage) : code;  // a broken recording
  }
  options.measurement.coverage = *ParseCoverage(options.coverage);
  const absl::StatusOr<Backends> backends = MakeBackends(options);
  if (!backends.ok()) return Report(backends.status());
  if (!options.json) {
    std::printf("%s, %s kernels, %s coverage\n", backends->measured->facts().name.c_str(),
                options.kernels.c_str(), options.coverage.c_str());
  }
  const absl::StatusOr<std::vector<AttentionFigures>> measured =
      Measure(options, *backends, *std::move(cases), threads, *context.signals);
  if (!measured.ok()) return Report(measured.status());
  if (options.json) std::printf("%s", ReportJson(options, *backends->measured, *measured).c_str());
  if (const absl::Status flushed = FlushOutput(); !flushed.ok()) return Report(flushed);
  for (const AttentionFigures& figures : *measured) {
    if (figures.check && !figures.check->Passed()) {
      return Report(
          absl::InternalError(absl::StrCat(figures.name, ", ", figures.num_tokens, " tokens, head dim ",
                                           figures.head_dim, ": the answers are wrong")));
    }
  }
  return kExitDone;
}

void AddCaseOptions(CLI::App& app, BenchOptions& options) {
  const CLI::Range lengths(int64_t{1}, (int64_t{1} << 31) - 128);
  app.add_option("--tokens", options.tokens, "lengths of the prompt, each a case")
      ->type_name("N,...")
      ->required()
      ->delimiter(',')
      ->check(lengths);
  CLI::Option* const attention =
      app.add_option(
             "--attention", options.attention,
             "of all heads: dense, a-shape:N_INIT,N_LOCAL, vertical-slash:V,S, or\n"
             "random-blocks:PERCENT,ROWSxKEYS: at random PERCENT of the key blocks up to a row's own,\n"
             "at least 32, blocks of 64 or 128 rows and keys. May be repeated, each is a case")
          ->type_name("SPEC")
          ->take_all();
  CLI::Option* const indices =
      app.add_option(
             "--indices", options.indices,
             "recorded selections of vertical-slash heads, layers and heads in turn; a shorter prompt\n"
             "takes them scaled to its length (default: what is built from random Q and K)")
          ->type_name("FILE");
  CLI::Option* const patterns =
      app.add_option(
             "--patterns", options.patterns_path,
             "heads of one layer of a pattern file in one call: from a multiple of --q-heads on, those\n"
             "whose covered pairs are most uneven")
          ->type_name("FILE")
          ->needs(indices)
          ->excludes(attention);
  app.add_option("--layer", options.layer, "of --patterns (default: the most uneven one)")
      ->type_name("N")
      ->check(AtLeast(0))
      ->needs(patterns);
  app.add_option("--geometry", options.geometry,
                 absl::StrCat("of the model of --patterns: ", GeometryNames(), ", or a config.json"))
      ->type_name("NAME|FILE")
      ->needs(patterns);
  app.add_option("--coverage", options.coverage, "tiles (default) or parity")
      ->type_name("COVERAGE")
      ->check(CLI::IsMember({"parity", "tiles"}));
  const CLI::Range heads(1, 65536);
  app.add_option("--head-dim", options.head_dims, "each a case (default: 128)")
      ->type_name("D,...")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096));
  app.add_option("--q-heads", options.num_q_heads, "query heads of a call (default: 32)")
      ->type_name("N")
      ->check(heads);
  app.add_option("--kv-heads", options.num_kv_heads, "KV heads of a call (default: 8)")
      ->type_name("N")
      ->check(heads);
  app.add_option("--heads", options.num_heads,
                 "query heads in all, one call after the other (default: --q-heads)")
      ->type_name("N")
      ->check(heads);
}

void AddMeasurementOptions(CLI::App& app, BenchOptions& options) {
  AddKernelsOption(app, options.kernels);
  app.add_option("--repeat", options.measurement.repeat, "timed runs (default: 5)")
      ->type_name("R")
      ->check(CLI::Range(1, 1000));
  app.add_option("--reference-tflops", options.reference_tflops, "R, what ratios are given to")
      ->type_name("X")
      ->check(CLI::PositiveNumber);
  app.add_option("--sample-rows", options.measurement.sample_rows,
                 "rows of a case that are computed in fp64 (default: 4096)")
      ->type_name("N")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  app.add_option("--bit-runs", options.measurement.bit_runs, "runs whose bits are compared (default: 10)")
      ->type_name("R")
      ->check(CLI::Range(1, 1000));
  app.add_flag("--unchecked", options.unchecked, "look at no answer: for profilers");
  app.add_option("--seed", options.measurement.seed,
                 "of Q, K, V, random blocks and sampled rows (default: 1)")
      ->type_name("S");
  app.add_flag("--json", options.json, "one JSON object and nothing else on standard output");
}

}  // namespace

Command AddBenchAttention(CLI::App& bench) {
  CLI::App* app = bench.add_subcommand(
      "attention", "Time and check attention on random Q, K and V: dense, blocks, recorded selections");
  auto options = std::make_shared<BenchOptions>();
  AddCaseOptions(*app, *options);
  AddMeasurementOptions(*app, *options);
  AddDeviceOption(*app, options->device);
  AddThreadsOption(*app, options->device);
  return {app, [options](CommandContext& context) { return BenchAttention(*options, context); }};
}

}  // namespace longfill
