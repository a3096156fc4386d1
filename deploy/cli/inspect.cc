// longfill inspect: what a model is and how much memory a prompt would take, before anything is allocated.

#include <algorithm>
#include <cstdio>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "deploy/cli/command.h"
#include "deploy/cli/figures.h"
#include "models/config.h"
#include "models/device_weights.h"
#include "models/fingerprint.h"
#include "models/weights.h"
#include "runtime/engine/engine_device.h"
#include "runtime/engine/memory_plan.h"

namespace longfill {
namespace {

struct InspectOptions {
  ModelOptions model;
  int64_t num_tokens = 0;  // 0: max_position_embeddings
};

void PrintRow(const char* name, const std::string& value) { std::printf("%-26s %s\n", name, value.c_str()); }
void PrintRow(const char* name, int64_t value) { PrintRow(name, absl::StrCat(value)); }

std::string DescribeRope(const RopeConfig& rope) {
  std::string text =
      absl::StrFormat("theta %g, scaling %s", rope.theta, std::string(RopeScalingName(rope.scaling)));
  if (rope.scaling != RopeScaling::kNone) absl::StrAppend(&text, " x", absl::StrFormat("%g", rope.factor));
  return text;
}

void PrintModel(const ModelConfig& config, const ModelWeights& weights, const std::string& fingerprint) {
  PrintRow("architecture", config.architecture);
  PrintRow("layers", config.num_layers);
  PrintRow("hidden size", config.hidden_size);
  PrintRow("intermediate size", config.intermediate_size);
  PrintRow("query heads", config.num_q_heads);
  PrintRow("KV heads", config.num_kv_heads);
  PrintRow("head dim", config.head_dim);
  PrintRow("vocabulary", config.vocab_size);
  PrintRow("max positions", config.max_position_embeddings);
  PrintRow("rotary embedding", DescribeRope(config.rope));
  PrintRow("tied embeddings", config.tie_word_embeddings ? "yes" : "no");
  PrintRow("parameters", weights.num_parameters());
  PrintRow("weights", FormatBytes(weights.bytes()));
  PrintRow("fingerprint", fingerprint);
}

void PrintBytes(const char* name, int64_t bytes) {
  std::printf("  %-24s %15lld  %s\n", name, static_cast<long long>(bytes), FormatBytes(bytes).c_str());
}

void PrintPlan(const char* title, const MemoryPlan& plan) {
  std::printf("%s, bytes of the largest rank\n", title);
  PrintBytes("weights", plan.weights_bytes);
  PrintBytes("activations", plan.activation_bytes);
  PrintBytes("index", plan.index_bytes);
  PrintBytes("attention, selection", plan.attention_bytes);
  if (plan.device == DeviceKind::kCuda) {
    PrintBytes("driver and libraries", plan.outside_bytes);
    PrintBytes("device", plan.DeviceBytes());
    PrintBytes("exchange, page-locked", plan.staging_bytes);
    PrintBytes("KV ring, page-locked", plan.kv_ring_bytes);
  }
  PrintBytes("logits", plan.logits_bytes);
  PrintBytes("KV store", plan.kv_store_bytes);
  if (plan.device == DeviceKind::kCuda) PrintBytes("host", plan.HostBytes());
  PrintBytes("total", plan.TotalBytes());
}

// What the ranks of the mesh would have on this host.
struct Host {
  std::shared_ptr<Backend> backend;
  int64_t outside_bytes = 0;
  MemoryBudget budget;
};

absl::StatusOr<Host> LookAtHost(const ModelOptions& options, const Mesh& mesh, const ModelWeights& weights) {
  Host host;
  LF_ASSIGN_OR_RETURN(const DeviceOptions device, MakeDeviceOptions(options, mesh.size(), 0));
  LF_ASSIGN_OR_RETURN(host.backend, CreateBackend(device));
  LF_ASSIGN_OR_RETURN(const int ranks_on_device, RanksOnDevice(device));
  const bool mapped = device.kind == DeviceKind::kCpu;
  LF_ASSIGN_OR_RETURN(host.budget.host_bytes,
                      AvailableMemoryBytes(mesh.size(), mapped ? weights.mapped_bytes() : 0));
  // This process is one of the ranks to come; each will have a context of its own.
  LF_ASSIGN_OR_RETURN(host.outside_bytes, MeasureOutsideBytes(*host.backend, 1));
  LF_ASSIGN_OR_RETURN(host.budget.device_bytes,
                      AvailableDeviceBytes(*host.backend, ranks_on_device, host.outside_bytes));
  return host;
}

void PrintLongest(const Host& host, const Mesh& mesh, int64_t batch, int64_t served) {
  std::string available = absl::StrCat(FormatBytes(host.budget.host_bytes), " of host memory");
  if (host.backend->kernels().device() == DeviceKind::kCuda) {
    available = absl::StrCat(FormatBytes(host.budget.device_bytes), " of ", host.backend->facts().name,
                             " and ", available);
  }
  std::printf(
      "available now for each of %d ranks on this host: %s; longest prompt: %lld tokens for prefill, %lld "
      "for serve\n",
      mesh.size(), available.c_str(), static_cast<long long>(batch), static_cast<long long>(served));
}

absl::Status Inspect(const InspectOptions& options) {
  Mesh mesh;
  if (!options.model.mesh_text.empty()) {
    LF_ASSIGN_OR_RETURN(mesh, ParseMesh(options.model.mesh_text));
  }
  LF_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model.model_dir));
  LF_ASSIGN_OR_RETURN(const std::unique_ptr<const ModelWeights> weights,
                      ModelWeights::Load(options.model.model_dir, config));
  LF_ASSIGN_OR_RETURN(const std::string fingerprint, ModelFingerprint(config, *weights));
  const int64_t num_tokens = options.num_tokens > 0 ? options.num_tokens : config.max_position_embeddings;
  if (num_tokens > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("--tokens ", num_tokens,
                                                   " is beyond max_position_embeddings ",
                                                   config.max_position_embeddings, " of the model"));
  }
  LF_ASSIGN_OR_RETURN(const Host host, LookAtHost(options.model, mesh, *weights));
  LF_ASSIGN_OR_RETURN(AttentionDefaults defaults, MakeAttentionDefaults(options.model));
  LF_ASSIGN_OR_RETURN(defaults.model_patterns, ReadModelPatterns(options.model.model_dir));
  LF_ASSIGN_OR_RETURN(
      const ResolvedAttention attention,
      ResolveAttention(AttentionSpec{}, defaults, num_tokens, config.num_layers, config.num_q_heads));
  const KernelSet& kernels = host.backend->kernels();
  MemoryPlanInput input;
  input.config = &config;
  input.kernels = &kernels;
  input.patterns = &attention.patterns;
  input.weights_bytes = kernels.device() == DeviceKind::kCpu
                            ? weights->bytes()
                            : DeviceWeightsBytes(config, kernels.compute_dtype());
  input.weights_in_pool = kernels.device() != DeviceKind::kCpu;
  input.outside_bytes = host.outside_bytes;
  input.mesh = mesh;
  input.num_tokens = num_tokens;
  input.kv_dtype = kernels.compute_dtype();

  PrintModel(config, *weights, fingerprint);
  std::printf("\nmemory plan for %lld tokens on mesh %s, %s, attention %s, KV %s\n",
              static_cast<long long>(num_tokens), ToString(mesh).c_str(), host.backend->facts().name.c_str(),
              attention.resolved.c_str(), std::string(DTypeName(input.kv_dtype)).c_str());
  PrintPlan("prefill (KV leaves as files)", PlanMemory(input));
  const int64_t longest_batch = LongestPrompt(input, host.budget, config.max_position_embeddings);
  input.keep_kv = true;
  PrintPlan("serve (KV of all layers is kept)", PlanMemory(input));
  const int64_t longest_served = LongestPrompt(input, host.budget, config.max_position_embeddings);
  PrintLongest(host, mesh, longest_batch, longest_served);
  return absl::OkStatus();
}

}  // namespace

Command AddInspectCommand(CLI::App& program) {
  CLI::App* app =
      program.add_subcommand("inspect", "Show what a model is and the memory that a prompt would take");
  auto options = std::make_shared<InspectOptions>();
  AddModelOption(*app, options->model);
  app->add_option("--tokens", options->num_tokens,
                  "prompt length of the memory plan (default: the model's maximum)")
      ->type_name("N")
      ->check(CLI::PositiveNumber);
  AddMeshOption(*app, options->model);
  AddDeviceOption(*app, options->model);
  AddPatternOptions(*app, options->model);
  return {app, [options](CommandContext& context) {
            if (context.launch.rank != 0) return static_cast<int>(kExitDone);
            const absl::Status status = Inspect(*options);
            const int code = Report(status);
            // A broken checkpoint is bad input, although its bytes are what is wrong.
            return absl::IsDataLoss(status) ? static_cast<int>(kExitUsage) : code;
          }};
}

}  // namespace longfill
