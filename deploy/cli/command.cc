#include "deploy/cli/command.h"

#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "deploy/cli/output_directory.h"
#include "deploy/cli/token_file.h"
#include "kernels/base/dtype.h"
#include "kernels/sparse/head_pattern.h"
#include "models/config.h"
#include "models/device_weights.h"
#include "models/pattern_directory.h"
#include "models/sharded_weights.h"
#include "models/weights.h"

namespace longfill {
namespace {

// N of "cuda:N".
std::optional<int> OrdinalOf(std::string_view device) {
  constexpr std::string_view kPrefix = "cuda:";
  int ordinal = 0;
  if (!device.starts_with(kPrefix)) return std::nullopt;
  const std::string_view number = device.substr(kPrefix.size());
  if (!absl::SimpleAtoi(absl::string_view(number.data(), number.size()), &ordinal) || ordinal < 0) {
    return std::nullopt;
  }
  return ordinal;
}

// A CLI11 check: what is wrong, or nothing.
std::string CheckDeviceName(const std::string& device) {
  if (device == "cpu" || device == "cuda" || OrdinalOf(device)) return {};
  return absl::StrCat("\"", device, "\" is not cpu, cuda or cuda:N");
}

// Likewise.
std::string CheckMinRecall(const std::string& text) {
  double value = 0;
  if (absl::SimpleAtod(text, &value) && value > 0 && value <= 1) return {};
  return absl::StrCat("\"", text, "\" is not in (0, 1]");
}

}  // namespace

void PrintError(std::string_view message) {
  std::string line(message);
  std::replace(line.begin(), line.end(), '\n', ' ');
  std::fprintf(stderr, "longfill: %s\n", line.c_str());
}

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitDone;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kUnimplemented:
      return kExitUsage;
    default:
      return kExitFailed;
  }
}

int Report(const absl::Status& status) {
  if (!status.ok()) PrintError(std::string_view(status.message().data(), status.message().size()));
  return ExitCodeOf(status);
}

absl::Status FlushOutput() {
  if (std::fflush(stdout) == 0) return absl::OkStatus();
  return absl::InternalError("cannot write to standard output");
}

int ReportNoWorld(const Launch& launch, const absl::Status& status) {
  return launch.process == 0 ? Report(status) : ExitCodeOf(status);
}

CLI::Option* AddModelOption(CLI::App& app, ModelOptions& options) {
  return app
      .add_option("--model", options.model_dir,
                  "Hugging Face model directory: config.json and model.safetensors or its shards")
      ->type_name("DIR")
      ->required();
}

void AddMeshOption(CLI::App& app, ModelOptions& options) {
  app.add_option(
         "--mesh", options.mesh_text,
         "how the ranks split a prompt, for example sequence=2,head=2 (default: sequence=ranks,head=1)")
      ->type_name("sequence=S,head=H");
}

void AddDeviceOption(CLI::App& app, ModelOptions& options) {
  app.add_option("--device", options.device,
                 "cpu (default); cuda: the ranks of a host are dealt over its GPUs; or cuda:N, one of them")
      ->type_name("DEVICE")
      ->check(CheckDeviceName, "DEVICE");
  app.add_option("--device-dtype", options.device_dtype,
                 "what a GPU computes in: bfloat16 (default) or float16. The CPU computes in float32")
      ->type_name("TYPE")
      ->check(CLI::IsMember({"float32", "bfloat16", "float16"}));
  app.add_option("--communicator", options.communicator,
                 "how ranks on GPUs exchange: nccl, from GPU to GPU; mpi, through host memory; or auto\n"
                 "(default): nccl where every rank has a GPU of its own")
      ->type_name("WHAT")
      ->check(CLI::IsMember({"auto", "mpi", "nccl"}));
  app.add_option(
         "--nccl-ctas", options.nccl_ctas,
         "multiprocessors that NCCL may take, and that attention leaves to it while both run (default: 8)")
      ->type_name("N")
      ->check(CLI::Range(1, 64));
  app.add_option(
         "--peer-copies", options.peer_copies,
         "whether copy engines bring keys and values from the other ranks' GPUs, when the mesh splits the\n"
         "sequence alone: on, off, or auto (default): where the GPUs of each host can, and every\n"
         "host has as many ranks")
      ->type_name("WHEN")
      ->check(CLI::IsMember({"auto", "on", "off"}));
}

void AddWeightsOption(CLI::App& app, ModelOptions& options) {
  app.add_option(
         "--weights", options.weights,
         "replicated (default): every rank has all weights; sharded: each keeps a share of every layer,\n"
         "and a layer is gathered while the one before it computes, for models too large for one device")
      ->type_name("WHERE")
      ->check(CLI::IsMember({"replicated", "sharded"}));
}

void AddThreadsOption(CLI::App& app, ModelOptions& options) {
  app.add_option("--threads", options.threads,
                 "worker threads of each rank (default: cores / ranks on the host)")
      ->type_name("N")
      ->check(CLI::Range(1, 4096));
}

void AddMemoryOption(CLI::App& app, ModelOptions& options) {
  app.add_option("--memory-limit", options.memory_limit_bytes,
                 "memory of the device that one rank may plan with, such as 4GB; longer prompts are refused\n"
                 "(default: what is available)")
      ->type_name("BYTES")
      ->transform(CLI::Validator(
          [](std::string& text) {
            const absl::StatusOr<int64_t> bytes = ParseBytes(text);
            if (!bytes.ok()) return std::string(bytes.status().message());
            text = absl::StrCat(*bytes);
            return std::string();
          },
          "BYTES"));
}

absl::StatusOr<int64_t> ParseBytes(const std::string& text) {
  const absl::Status wrong =
      absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is no number of bytes such as 4GB"));
  if (text.empty() || !absl::ascii_isdigit(static_cast<unsigned char>(text[0]))) return wrong;
  std::string number = text;
  try {
    if (!CLI::AsSizeValue(/*kb_is_1000=*/true)(number).empty()) return wrong;
  } catch (const CLI::Error&) {  // beyond 64 bits
    return wrong;
  }
  int64_t bytes = 0;
  if (!absl::SimpleAtoi(number, &bytes) || bytes < 1) return wrong;
  return bytes;
}

CLI::Validator AtLeast(int64_t least) {
  const auto check = [least](std::string& text) {
    int64_t value = 0;
    if (absl::SimpleAtoi(text, &value) && value >= least) return std::string();
    return absl::StrCat("\"", text, "\" is not a whole number of at least ", least);
  };
  return CLI::Validator(check, absl::StrCat("N >= ", least));
}

void AddPatternOptions(CLI::App& app, ModelOptions& options) {
  app.add_option(
         "--dense-below", options.dense_below,
         absl::StrCat("'auto' is dense for prompts below N tokens (default: ", options.dense_below, ")"))
      ->type_name("N")
      ->check(AtLeast(0));
  app.add_option(
         "--patterns", options.patterns_path,
         "what 'auto' uses for longer prompts: a pattern file, or a directory of them, where the file is\n"
         "found by the model's name: NAME.json, that which MInference publishes, or patterns.json\n"
         "(default: patterns.json of the model directory, else block-share:8,0.01,8,fp8)")
      ->type_name("FILE|DIR");
}

absl::StatusOr<DeviceOptions> DescribeDevice(const ModelOptions& options, int ranks_on_host, int local_rank) {
  DeviceOptions device;
  device.num_threads = options.threads > 0 ? options.threads : DefaultThreads(ranks_on_host);
  device.ranks_on_host = ranks_on_host;
  device.local_rank = local_rank;
  if (!options.device_dtype.empty()) {
    LF_ASSIGN_OR_RETURN(device.compute_dtype, ParseDType(options.device_dtype));
  }
  if (options.device == "cpu") return device;
  device.kind = DeviceKind::kCuda;
  device.peer_host = PeerHostFromEnvironment();
  device.ordinal = OrdinalOf(options.device).value_or(-1);
  return device;
}

absl::StatusOr<DeviceOptions> MakeDeviceOptions(const ModelOptions& options, int ranks_on_host,
                                                int local_rank) {
  LF_ASSIGN_OR_RETURN(const DeviceOptions device, DescribeDevice(options, ranks_on_host, local_rank));
  if (device.kind == DeviceKind::kCpu) return device;
  if (const absl::StatusOr<int> count = CudaDeviceCount(); !count.ok()) {
    return absl::UnimplementedError(absl::StrCat("--device ", options.device, ": ", count.status().message(),
                                                 "; --device cpu computes on the CPU"));
  }
  return device;
}

absl::StatusOr<AttentionSpec> ReadPatterns(const ModelOptions& options) {
  std::error_code ignored;
  std::string file = options.patterns_path;
  if (std::filesystem::is_directory(file, ignored)) {
    std::string name_or_path;
    if (const absl::StatusOr<ModelConfig> config = LoadModelConfig(options.model_dir); config.ok()) {
      name_or_path = config->name_or_path;  // a model that cannot be read is refused elsewhere
    }
    absl::StatusOr<std::string> found = FindPatternFile(file, ModelNames(options.model_dir, name_or_path));
    if (!found.ok()) return Annotate(found.status(), "--patterns");
    file = *std::move(found);
  }
  if (!std::filesystem::is_regular_file(file, ignored)) {
    return absl::NotFoundError(absl::StrCat("--patterns: there is no pattern file ", file));
  }
  absl::StatusOr<AttentionSpec> spec = ReadAttentionSpec(file);
  if (!spec.ok()) return Annotate(spec.status(), "--patterns");
  return spec;
}

absl::StatusOr<AttentionDefaults> MakeAttentionDefaults(const ModelOptions& options) {
  AttentionDefaults defaults;
  defaults.dense_below = options.dense_below;
  if (!options.patterns_path.empty()) {
    LF_ASSIGN_OR_RETURN(defaults.patterns, ReadPatterns(options));
  }
  return defaults;
}

absl::StatusOr<DeviceCommunicatorOptions> MakeCommunicatorOptions(const ModelOptions& options) {
  DeviceCommunicatorOptions communicator;
  if (options.communicator == "nccl") communicator.kind = CommunicatorKind::kNccl;
  if (options.communicator == "mpi") communicator.kind = CommunicatorKind::kStaged;
  communicator.nccl.ranks_share_gpus = NcclRanksMayShareGpus();
  communicator.nccl.max_ctas = options.nccl_ctas;
  if (options.peer_copies == "on") communicator.peer_copies = PeerCopies::kOn;
  if (options.peer_copies == "off") communicator.peer_copies = PeerCopies::kOff;
  if (options.communicator == "nccl" && options.device == "cpu") {
    return absl::InvalidArgumentError("--communicator nccl is for ranks on GPUs, and --device is cpu");
  }
  if (options.peer_copies == "on" && options.device == "cpu") {
    return absl::InvalidArgumentError("--peer-copies on is for ranks on GPUs, and --device is cpu");
  }
  return communicator;
}

WeightPlacement MakeWeightPlacement(const ModelOptions& options) {
  return options.weights == "sharded" ? WeightPlacement::kSharded : WeightPlacement::kReplicated;
}

int64_t LargestWeightsBytes(WeightPlacement placement, const ModelConfig& config, const ModelWeights* weights,
                            const Mesh& mesh, const KernelSet& kernels) {
  if (ShardsWeights(placement, mesh)) {
    return ShardedWeights::PlanBytes(config, DTypesOfShards(weights, config, kernels), mesh.size());
  }
  if (kernels.device() == DeviceKind::kCpu && weights != nullptr) return weights->bytes();
  return DeviceWeightsBytes(config, kernels.compute_dtype());
}

absl::StatusOr<EngineOptions> MakeEngineOptions(const ModelOptions& options, const World& world) {
  EngineOptions engine;
  LF_ASSIGN_OR_RETURN(engine.device, MakeDeviceOptions(options, world.ranks_on_host(), world.local_rank()));
  LF_ASSIGN_OR_RETURN(engine.communicator, MakeCommunicatorOptions(options));
  engine.weights = MakeWeightPlacement(options);
  engine.model_dir = options.model_dir;
  engine.mesh = Mesh{world.size(), 1};
  if (!options.mesh_text.empty()) {
    LF_ASSIGN_OR_RETURN(engine.mesh, ParseMesh(options.mesh_text));
  }
  if (engine.mesh.size() != world.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--mesh ", ToString(engine.mesh), " is a mesh of ", engine.mesh.size(), " ranks, there are ",
        world.size(), " (mpirun -np ", engine.mesh.size(), " longfill ... starts so many)"));
  }
  LF_ASSIGN_OR_RETURN(engine.attention, MakeAttentionDefaults(options));
  engine.memory_limit_bytes = options.memory_limit_bytes;
  return engine;
}

void AddRecallOptions(CLI::App& app, std::string_view otherwise, RecallArguments& arguments) {
  app.add_flag_function(
      "--recall-monitor",
      [&arguments](int64_t) {
        arguments.options.monitor = true;
        arguments.given = true;
      },
      absl::StrCat("measure on some rows what share of the softmax weight sparse attention covers, for each "
                   "layer and\nhead, and report it (default: ",
                   absl::string_view(otherwise.data(), otherwise.size()), ")"));
  app.add_option_function<double>(
         "--min-recall",
         [&arguments](double value) {
           arguments.options.min_recall = value;
           arguments.given = true;
         },
         "compute heads whose share is below R again, with twice and four times their budgets, then over all "
         "keys;\nreports like --recall-monitor")
      ->type_name("R")
      ->check(CheckMinRecall, "(0, 1]");
}

CLI::Option* AddPromptOptions(CLI::App& app, std::string_view recall_otherwise, PromptOptions& options) {
  app.add_option("--tokens", options.token_paths,
                 "token ids of the prompt: NAME.i32 holds little-endian int32, any other file a JSON list, "
                 "'-' is a JSON\n"
                 "list on standard input. Repeat it for several prompts: results go to OUT/000, OUT/001, ...")
      ->type_name("FILE")
      ->required()
      ->take_all();
  CLI::Option* const out =
      app.add_option("--out", options.out,
                     "directory for manifest.json, kv-layer-LLL-rank-RRR.safetensors and logits.safetensors; "
                     "made if missing")
          ->type_name("DIR");
  app.add_option(
         "--attention", options.attention,
         "dense; a-shape:N_INIT,N_LOCAL; vertical-slash:V,S; block-sparse:K (forced blocks count within K);\n"
         "block-share:R,TAU[,S[,C]][,fp8] (blocks to which a row gives a share of TAU, judged by R outlying\n"
         "keys and the mean, or S > 0 sampled keys; with C, first by 512 keys, judged by C of them; with\n"
         "fp8, by queries and keys rounded to 8 bits);\n"
         "a pattern file in the published JSON form; or auto (default)")
      ->type_name("SPEC");
  app.add_option(
         "--coverage", options.coverage,
         "tiles (default): the selection and what its tiles touch; parity: what the published kernels cover")
      ->type_name("COVERAGE")
      ->check(CLI::IsMember({"parity", "tiles"}));
  app.add_option("--logits", options.logits,
                 "positions whose logits are wanted, such as 4094,4095 (default: last)")
      ->type_name("POSITIONS");
  app.add_option("--kv-dtype", options.kv_dtype,
                 "type of the KV cache: float32, bfloat16 or float16 (default: what the device computes in)")
      ->type_name("TYPE")
      ->check(CLI::IsMember({"float32", "bfloat16", "float16"}));
  AddRecallOptions(app, recall_otherwise, options.recall);
  app.add_flag(
      "--overwrite", options.overwrite,
      "write into a directory that is not empty; replaces files of an earlier result, touches no other");
  app.add_flag(
      "--json", options.json,
      "print the figures as one JSON object and nothing else on standard output; for several prompts\n"
      "{\"prompts\": [...]}");
  return out;
}

absl::StatusOr<std::vector<PrefillRequest>> ReadPrompts(const PromptOptions& options) {
  PrefillRequest prototype;
  LF_ASSIGN_OR_RETURN(prototype.attention, ReadAttentionSpec(options.attention));
  LF_ASSIGN_OR_RETURN(prototype.coverage, ParseCoverage(options.coverage));
  LF_ASSIGN_OR_RETURN(prototype.logits_positions, ParseLogitsPositions(options.logits));
  if (!options.kv_dtype.empty()) {
    LF_ASSIGN_OR_RETURN(prototype.kv_dtype, ParseDType(options.kv_dtype));
  }
  prototype.recall = options.recall.options;
  if (std::count(options.token_paths.begin(), options.token_paths.end(), "-") > 1) {
    return absl::InvalidArgumentError("--tokens -: standard input can be read once only");
  }
  std::vector<PrefillRequest> prompts;
  for (const std::string& path : options.token_paths) {
    PrefillRequest prompt = prototype;
    LF_ASSIGN_OR_RETURN(prompt.token_ids, ReadTokenFile(path));
    prompt.request_id = PromptName(static_cast<int>(prompts.size()));
    prompt.transfer_id = RandomId();
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

std::string RandomId() {
  std::array<char, 16> bytes;
  size_t filled = 0;
  while (filled < bytes.size()) {
    const ssize_t count = getrandom(bytes.data() + filled, bytes.size() - filled, 0);
    if (count > 0) filled += static_cast<size_t>(count);
  }
  return absl::BytesToHexString(absl::string_view(bytes.data(), bytes.size()));
}

}  // namespace longfill
