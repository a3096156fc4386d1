// longfill search: the offline search of each head's pattern, the cost table that it needs, and the judgement
// of its results. models/search/README.md tells how it works.

#include "deploy/cli/search.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "deploy/cli/token_file.h"
#include "models/device_weights.h"
#include "models/file_io.h"
#include "models/fingerprint.h"
#include "models/geometry.h"
#include "models/json_input.h"
#include "models/pattern_directory.h"

namespace longfill {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr std::string_view kStateSuffix = ".state";

// What CLI11 cannot check.
absl::Status CheckOptions(const SearchCommandOptions& options, const World& world) {
  if (options.model.model_dir.empty() == options.geometry.empty()) {
    return absl::InvalidArgumentError("give either --model or --geometry");
  }
  if (world.size() > 1 && (options.calibrate || !options.evaluate.empty())) {
    return absl::InvalidArgumentError(absl::StrCat(options.calibrate ? "--calibrate" : "--evaluate",
                                                   " measures time on one rank, and there are ",
                                                   world.size()));
  }
  if (options.calibrate && options.out.empty()) {
    return absl::InvalidArgumentError("--out is missing: where the cost table goes");
  }
  const bool searches = !options.calibrate && options.evaluate.empty();
  if (!searches) return absl::OkStatus();
  if (options.out.empty() && options.geometry.empty()) {
    return absl::InvalidArgumentError("--out is missing: where the patterns go");
  }
  if (!options.out.empty() && !options.geometry.empty()) {
    return absl::InvalidArgumentError(
        "--out: patterns of --geometry, whose weights are random, are for no model; leave it out");
  }
  if (world.size() > 1 && options.cost_path.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--cost is missing: ", world.size(),
                                                   " ranks do not measure the time of kernels; "
                                                   "--calibrate on one rank does"));
  }
  return absl::OkStatus();
}

// Rank 0. Files are read there alone.
absl::StatusOr<SearchInput> ReadInput(const SearchCommandOptions& options) {
  SearchInput input;
  if (std::count(options.token_paths.begin(), options.token_paths.end(), "-") > 1) {
    return absl::InvalidArgumentError("--tokens -: standard input can be read once only");
  }
  for (const std::string& path : options.token_paths) {
    LF_ASSIGN_OR_RETURN(std::vector<int32_t> ids, ReadTokenFile(path));
    input.samples.push_back(std::move(ids));
  }
  if (!options.cost_path.empty()) {
    absl::StatusOr<std::string> text = ReadSmallFile(options.cost_path, kMaxCostTableBytes);
    if (!text.ok()) return Annotate(text.status(), "--cost");
    input.cost_json = *std::move(text);
    LF_RETURN_IF_ERROR(ParseCostTable(input.cost_json, options.cost_path).status());
  }
  return input;
}

// From rank 0 to all; collective after rank 0 has read it.
absl::Status ShareInput(World& world, SearchInput* input) {
  CpuStream stream;
  std::string lengths, ids;
  for (const std::vector<int32_t>& sample : input->samples) {
    const auto length = static_cast<int64_t>(sample.size());
    lengths.append(reinterpret_cast<const char*>(&length), sizeof(length));
    ids.append(reinterpret_cast<const char*>(sample.data()), sample.size() * sizeof(int32_t));
  }
  LF_ASSIGN_OR_RETURN(lengths, BroadcastString(world.communicator(), lengths, 0, stream));
  LF_ASSIGN_OR_RETURN(ids, BroadcastString(world.communicator(), ids, 0, stream));
  LF_ASSIGN_OR_RETURN(input->cost_json, BroadcastString(world.communicator(), input->cost_json, 0, stream));
  if (world.rank() == 0) return absl::OkStatus();
  const char* next = ids.data();
  for (size_t at = 0; at < lengths.size(); at += sizeof(int64_t)) {
    int64_t length = 0;
    std::copy_n(lengths.data() + at, sizeof(length), reinterpret_cast<char*>(&length));
    std::vector<int32_t> sample(static_cast<size_t>(length));
    const size_t bytes = sample.size() * sizeof(int32_t);
    std::copy_n(next, bytes, reinterpret_cast<char*>(sample.data()));
    next += bytes;
    input->samples.push_back(std::move(sample));
  }
  return absl::OkStatus();
}

absl::StatusOr<LoadedModel> Load(const SearchCommandOptions& options, const SearchInput& input,
                                 const World& world) {
  LoadedModel model;
  if (options.geometry.empty()) {
    LF_ASSIGN_OR_RETURN(model.config, LoadModelConfig(options.model.model_dir));
  } else {
    LF_ASSIGN_OR_RETURN(model.config, GeometryConfig(options.geometry));
  }
  for (size_t i = 0; i < input.samples.size(); ++i) {
    LF_RETURN_IF_ERROR(CheckSample(model.config, input.samples[i], options.token_paths[i]));
  }
  LF_ASSIGN_OR_RETURN(const DeviceOptions device,
                      MakeDeviceOptions(options.model, world.ranks_on_host(), world.local_rank()));
  LF_ASSIGN_OR_RETURN(model.backend, CreateBackend(device));
  if (!options.geometry.empty()) {
    model.fingerprint = absl::StrCat("random weights of seed ", options.seed);
    model.name = options.geometry;
    LF_ASSIGN_OR_RETURN(model.weights, RandomWeights(model.config, *model.backend, options.seed));
    return model;
  }
  LF_ASSIGN_OR_RETURN(std::unique_ptr<const ModelWeights> host,
                      ModelWeights::Load(options.model.model_dir, model.config));
  LF_ASSIGN_OR_RETURN(model.fingerprint, ModelFingerprint(model.config, *host));
  LF_ASSIGN_OR_RETURN(model.weights, UploadWeights(std::move(host), model.config, *model.backend));
  const std::vector<std::string> names = ModelNames(options.model.model_dir, model.config.name_or_path);
  if (!names.empty()) model.name = names.front();
  return model;
}

// Scores of ranks with other models, or devices that round otherwise, do not belong together.
absl::Status CheckRanksAreAlike(const LoadedModel& model, World& world) {
  CpuStream stream;
  const std::string mine = absl::StrCat(model.fingerprint, " on ", model.backend->facts().name);
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                      AllGatherStrings(world.communicator(), mine, stream));
  for (size_t rank = 1; rank < all.size(); ++rank) {
    if (all[rank] == all[0]) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", rank, " has ", all[rank], ", and rank 0 has ", all[0]));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> Run(const SearchCommandOptions& options, CommandContext& context, World& world) {
  absl::StatusOr<SearchInput> input = SearchInput{};
  absl::Status status = CheckOptions(options, world);
  if (status.ok() && world.rank() == 0 && !options.out.empty()) status = CheckCanWrite(options.out);
  if (status.ok() && world.rank() == 0) {
    input = ReadInput(options);
    status = input.status();
  }
  LF_RETURN_IF_ERROR(world.Agree(status));
  LF_RETURN_IF_ERROR(ShareInput(world, &*input));
  const absl::StatusOr<LoadedModel> model = Load(options, *input, world);
  status = model.status();
  // A broken checkpoint is bad input, although its bytes are what is wrong.
  if (absl::IsDataLoss(status)) status = absl::InvalidArgumentError(status.message());
  LF_RETURN_IF_ERROR(world.Agree(status));
  LF_RETURN_IF_ERROR(CheckRanksAreAlike(*model, world));
  const int num_threads =
      options.model.threads > 0 ? options.model.threads : DefaultThreads(world.ranks_on_host());
  const SamplePassOptions pass = MakePassOptions(options, num_threads, *context.signals);
  if (options.calibrate) return RunCalibration(options, *input, *model, pass);
  if (!options.evaluate.empty()) return RunEvaluation(options, *input, *model, pass);
  return RunPatternSearch(options, *input, *model, pass, world);
}

int Search(const SearchCommandOptions& options, CommandContext& context) {
  auto world = World::Create(context.launch, kExitFailed);
  if (!world.ok()) return ReportNoWorld(context.launch, world.status());
  const absl::StatusOr<std::string> report = Run(options, context, **world);
  if (!report.ok()) {
    const absl::Status& status = report.status();
    if ((*world)->rank() == 0) return Report(status);
    // What ranks agree on is printed once; of a group that has ended, rank 0 may not live to tell.
    if (!(*world)->communicator().Health().ok()) {
      PrintError(absl::StrCat("rank ", (*world)->rank(), ": ", status.message()));
    }
    return ExitCodeOf(status);
  }
  if ((*world)->rank() != 0) return kExitDone;
  std::printf("%s", report->c_str());
  return Report(FlushOutput());
}

void AddInputOptions(CLI::App& app, SearchCommandOptions& options) {
  CLI::Option* model = app.add_option("--model", options.model.model_dir,
                                      "Hugging Face model directory: config.json and model.safetensors or "
                                      "its shards")
                           ->type_name("DIR");
  app.add_option("--geometry", options.geometry,
                 absl::StrCat(GeometryNames(), ", or a config.json: random weights, to measure a search"))
      ->type_name("NAME|FILE")
      ->excludes(model);
  app.add_option("--seed", options.seed, "of the weights of --geometry (default: 1)")->type_name("S");
  app.add_option("--tokens", options.token_paths,
                 "token ids of a calibration prompt, as `prefill` takes them; several are best")
      ->type_name("FILE")
      ->required()
      ->take_all();
  app.add_option(
         "--out", options.out,
         "the pattern file; beside it OUT.curve.csv, and while the search runs OUT.state, from which\n"
         "one that was cut short goes on. With --calibrate the cost table")
      ->type_name("FILE");
  app.add_option(
         "--rows", options.max_rows,
         absl::StrCat("query rows of a prompt that are compared: blocks of 128, evenly spread, the last "
                      "among them (default: ",
                      kDefaultSearchRows, ")"))
      ->type_name("N")
      ->check(CLI::Range(int64_t{128}, int64_t{1} << 31));
  app.add_option("--coverage", options.coverage, "tiles (default) or parity")
      ->type_name("COVERAGE")
      ->check(CLI::IsMember({"parity", "tiles"}));
  app.add_flag("--json", options.json, "one JSON object and nothing else on standard output");
}

void AddModes(CLI::App& app, SearchCommandOptions& options) {
  CLI::Option* calibrate =
      app.add_flag("--calibrate", options.calibrate,
                   "measure what --candidates take on this device, at the lengths of the prompts, and write\n"
                   "the cost table to --out; nothing is searched");
  app.add_option("--evaluate", options.evaluate,
                 "judge this pattern or pattern file on the prompts: recall, error, seconds; repeat it for\n"
                 "several. Nothing is searched")
      ->type_name("SPEC|FILE")
      ->take_all()
      ->excludes(calibrate);
  app.add_option(
         "--cost", options.cost_path,
         "cost table of --calibrate (default: it is measured first, on the first prompt of each length)")
      ->type_name("FILE")
      ->excludes(calibrate);
  app.add_option("--calibration-layers", options.calibration_layers,
                 "layers that a calibration measures, evenly spread (default: 2)")
      ->type_name("N")
      ->check(CLI::Range(1, 1000));
  app.add_option("--runs", options.runs,
                 "runs of each measurement, the median counts (default: 3; of --evaluate 1)")
      ->type_name("R")
      ->check(CLI::Range(1, 1000));
}

void AddTargets(CLI::App& app, SearchCommandOptions& options) {
  app.add_option(
         "--candidates", options.candidates,
         "patterns to try, each a family that grows and shrinks (default: what MInference tries, and\n"
         "block-share:4,0.1); repeat it. dense is always tried")
      ->type_name("SPEC")
      ->take_all();
  CLI::Option* budgets =
      app.add_option(
             "--budgets", options.budgets,
             "kernel time of the candidates, as shares of that of --reference: each family is brought\n"
             "to each of them (default: 0.05,0.1,0.2,0.35,0.5,0.75,1)")
          ->type_name("X,...")
          ->delimiter(',')
          ->check(CLI::Range(1e-6, 1e6));
  app.add_flag("--as-given", options.as_given, "candidates are tried as they are, whatever they take")
      ->excludes(budgets);
  app.add_option("--reference", options.reference,
                 "the pattern whose time is 1 (default: vertical-slash:1000,6096)")
      ->type_name("SPEC");
  CLI::Option* time =
      app.add_option(
             "--time", options.time_share,
             "target: time of all heads as a share of that of --reference on all heads (default: 0.5)")
          ->type_name("X")
          ->check(CLI::Range(1e-6, 1e6));
  app.add_option("--recall", options.mean_recall,
                 "target: mean --value of all heads (of error: 1 - mean error), as cheap as it can be")
      ->type_name("R")
      ->check(CLI::Range(1e-6, 1.0))
      ->excludes(time);
  app.add_option(
         "--head-recall", options.head_recall,
         "heads below it get more of their pattern after that, beyond the target, until they reach it")
      ->type_name("R")
      ->check(CLI::Range(1e-6, 1.0));
  app.add_option(
         "--value", options.value,
         "what makes a candidate good: recall, over all sampled rows; end (default), --end-share of it that\n"
         "over the last 64 rows, where a question stands and decoding goes on; answers, recall, where heads\n"
         "that decide what the model says next keep what they have with --reference for the last rows; or\n"
         "error, of the output")
      ->type_name("WHAT")
      ->check(CLI::IsMember({"answers", "end", "error", "recall"}));
  app.add_option("--end-share", options.end_share, "of --value end: what the last rows count (default: 0.5)")
      ->type_name("X")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option(
         "--answer-share", options.answer_share,
         "of --value answers: the part of all influence on the next token that the heads with most of it\n"
         "have together, which keep what they have (default: 0.95)")
      ->type_name("X")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--target-tokens", options.target_tokens,
                 "lengths at which the time is kept to; some prompt has each (default: the longest)")
      ->type_name("N,...")
      ->delimiter(',')
      ->check(AtLeast(1));
  app.add_flag(
      "--per-length", options.per_length,
      "patterns of their own for each of these lengths (default: all of the prompts), each found on\n"
      "the prompts of that length; a prompt between two takes those of the nearer one by ratio");
}

}  // namespace

absl::StatusOr<std::string> SamplesHash(const std::vector<std::vector<int32_t>>& samples) {
  std::vector<int32_t> all;
  for (const std::vector<int32_t>& sample : samples) {
    all.push_back(static_cast<int32_t>(sample.size()));
    all.insert(all.end(), sample.begin(), sample.end());
  }
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> hashes, TokenHashChain(all, std::ssize(all)));
  return hashes.front();
}

SamplePassOptions MakePassOptions(const SearchCommandOptions& options, int num_threads,
                                  const StopSignals& signals) {
  return {.coverage = options.coverage == "parity" ? Coverage::kParity : Coverage::kTiles,
          .max_rows = options.max_rows > 0 ? options.max_rows : kDefaultSearchRows,
          .num_threads = num_threads,
          .should_stop = [&signals] { return signals.ShouldStop(); }};
}

void ProgressLines::Report(const std::string& what, int64_t done, int64_t total, double seconds,
                           double seconds_left) {
  if (quiet_ || total == 0) return;
  const int64_t tenth = done * 10 / total;
  if (what == what_ && tenth == last_tenth_) return;
  what_ = what;
  last_tenth_ = tenth;
  std::fprintf(stderr, "%s: %lld of %lld, %.1f s, about %.1f s left\n", what.c_str(),
               static_cast<long long>(done), static_cast<long long>(total), seconds, seconds_left);
}

void ProgressLines::ReportEqualPieces(const std::string& what, int64_t done, int64_t total) {
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  Report(what, done, total, seconds, seconds / static_cast<double>(done) * static_cast<double>(total - done));
}

Command AddSearchCommand(CLI::App& program) {
  CLI::App* app = program.add_subcommand(
      "search",
      "Find the attention pattern of each head on calibration prompts; ranks are started by mpirun");
  auto options = std::make_shared<SearchCommandOptions>();
  AddInputOptions(*app, *options);
  AddModes(*app, *options);
  AddTargets(*app, *options);
  AddDeviceOption(*app, options->model);
  AddThreadsOption(*app, options->model);
  return {app, [options](CommandContext& context) { return Search(*options, context); }};
}

}  // namespace longfill
