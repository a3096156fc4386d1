// longfill inspect: what a model is and how much memory a prompt would take, before anything is allocated.

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "deploy/cli/command.h"
#include "deploy/cli/figures.h"
#include "deploy/cli/kv_memory.h"
#include "models/config.h"
#include "models/fingerprint.h"
#include "models/geometry.h"
#include "models/rope.h"
#include "models/weights.h"
#include "parallel/parallel_attention.h"
#include "runtime/engine/device_communicator.h"
#include "runtime/engine/engine_device.h"
#include "runtime/engine/memory_plan.h"

namespace longfill {
namespace {

struct InspectOptions {
  ModelOptions model;
  std::string geometry;    // instead of a model directory
  int64_t num_tokens = 0;  // 0: max_position_embeddings
  std::string kv_memory = "host";
  RecallArguments recall;
};

void PrintRow(const char* name, const std::string& value) { std::printf("%-26s %s\n", name, value.c_str()); }
void PrintRow(const char* name, int64_t value) { PrintRow(name, absl::StrCat(value)); }

// "theta 1e+08, first 64 of 128 dims, interleaved pairs, scaling none"
std::string DescribeRope(const ModelConfig& config) {
  const RopeConfig& rope = config.rope;
  std::string text = absl::StrFormat("theta %g", rope.theta);
  if (rope.rotary_dim < config.head_dim) {
    absl::StrAppend(&text, ", first ", rope.rotary_dim, " of ", config.head_dim, " dims");
  }
  if (rope.form == RotaryForm::kInterleaved) absl::StrAppend(&text, ", interleaved pairs");
  absl::StrAppend(&text, ", scaling ", std::string(RopeScalingName(rope.scaling)));
  if (rope.scaling == RopeScaling::kNone) return text;
  absl::StrAppend(&text, " x", absl::StrFormat("%g", rope.factor));
  if (rope.scaling == RopeScaling::kLongRope) {
    absl::StrAppend(&text, ", short factors up to ", rope.original_max_position_embeddings,
                    " tokens, long ones beyond");
  } else if (rope.original_max_position_embeddings > 0) {
    absl::StrAppend(&text, " of ", rope.original_max_position_embeddings);
  }
  const absl::StatusOr<RotaryTable> table = BuildRotaryTable(rope, 1);
  if (table.ok() && table->attention_scale != 1.0F) {
    absl::StrAppendFormat(&text, ", cos and sin times %.4g", table->attention_scale);
  }
  return text;
}

// What a reader of a Llama would not expect; "nothing" where there is nothing.
std::string DescribeUnusual(const ModelConfig& config, const ModelWeights& weights) {
  std::vector<std::string> parts;
  const LayerWeights& layer = weights.layer(0);
  if (layer.q_norm != nullptr) parts.emplace_back("norms of query and key heads");
  if (layer.q_proj.bias != nullptr) {
    parts.emplace_back(layer.o_proj.bias != nullptr ? "biases of Q, K, V and O" : "biases of Q, K and V");
  }
  if (layer.gate_proj.bias != nullptr) parts.emplace_back("biases of the MLP");
  int64_t windowed = 0;
  int64_t widest = 0;
  for (const int64_t window : config.layer_windows) {
    windowed += window > 0 ? 1 : 0;
    widest = std::max(widest, window);
  }
  if (windowed > 0) {
    parts.push_back(
        absl::StrCat("sliding window of ", widest, " in ", windowed, " of ", config.num_layers, " layers"));
  }
  if (const DualChunk& chunk = config.rope.dual_chunk; chunk.chunk_size > 0) {
    std::string text = absl::StrCat("dual chunk attention beyond ", chunk.chunk_len(),
                                    " tokens, distances up to ", chunk.chunk_size);
    if (config.rope.dual_chunk_original_tokens > 0) {
      absl::StrAppend(&text, ", scaled beyond ", config.rope.dual_chunk_original_tokens, " tokens");
    }
    parts.push_back(text);
  }
  return parts.empty() ? "nothing" : absl::StrJoin(parts, ", ");
}

// What is inspected: a checkpoint, or a model's shapes alone.
struct Subject {
  ModelConfig config;
  std::unique_ptr<const ModelWeights> weights;  // nullptr: shapes alone
  std::string fingerprint;
};

absl::StatusOr<Subject> Open(const InspectOptions& options) {
  Subject subject;
  if (!options.geometry.empty()) {
    LF_ASSIGN_OR_RETURN(subject.config, GeometryConfig(options.geometry));
    return subject;
  }
  const std::string& directory = options.model.model_dir;
  LF_ASSIGN_OR_RETURN(subject.config, LoadModelConfig(directory));
  LF_ASSIGN_OR_RETURN(subject.weights, ModelWeights::Load(directory, subject.config));
  LF_ASSIGN_OR_RETURN(subject.fingerprint, ModelFingerprint(subject.config, *subject.weights));
  return subject;
}

void PrintModel(const Subject& subject) {
  const ModelConfig& config = subject.config;
  PrintRow("architecture", config.architecture);
  PrintRow("family", config.family);
  PrintRow("layers", config.num_layers);
  PrintRow("hidden size", config.hidden_size);
  PrintRow("intermediate size", config.intermediate_size);
  PrintRow("query heads", config.num_q_heads);
  PrintRow("KV heads", config.num_kv_heads);
  PrintRow("head dim", config.head_dim);
  PrintRow("vocabulary", config.vocab_size);
  PrintRow("max positions", config.max_position_embeddings);
  PrintRow("rotary embedding", DescribeRope(config));
  if (subject.weights != nullptr) PrintRow("unusual", DescribeUnusual(config, *subject.weights));
  PrintRow("tied embeddings", config.tie_word_embeddings ? "yes" : "no");
  if (subject.weights == nullptr) return;
  PrintRow("parameters", subject.weights->num_parameters());
  PrintRow("weights", FormatBytes(subject.weights->bytes()));
  PrintRow("fingerprint", subject.fingerprint);
}

// Where patterns come from, if they say so: "searched for this model, recall 0.912 to 0.999".
std::string DescribeProvenance(const PatternSet& patterns, const std::string& fingerprint) {
  const std::optional<PatternProvenance>& provenance = patterns.provenance();
  if (!provenance.has_value()) return "published form, without provenance";
  double least = 1;
  double most = 0;
  for (int64_t layer = 0; layer < patterns.num_layers(); ++layer) {
    for (int64_t head = 0; head < patterns.num_heads(); ++head) {
      const std::optional<double> recall = patterns.score(layer, head);
      least = std::min(least, recall.value_or(least));
      most = std::max(most, recall.value_or(most));
    }
  }
  std::string text = provenance->model_fingerprint == fingerprint
                         ? "searched for this model"
                         : absl::StrCat("searched for another model, ", provenance->model_name,
                                        ", fingerprint ", provenance->model_fingerprint);
  if (least <= most) absl::StrAppendFormat(&text, ", recall %.3f to %.3f", least, most);
  return text;
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
    PrintBytes("KV caches on the device", plan.kv_budget_bytes);
    PrintBytes("driver and libraries", plan.outside_bytes);
    PrintBytes("device", plan.DeviceBytes());
    PrintBytes("exchange, page-locked", plan.staging_bytes);
    PrintBytes("KV ring, page-locked", plan.kv_ring_bytes);
  }
  if (plan.device == DeviceKind::kCpu && plan.kv_budget_bytes > 0) {
    PrintBytes("budget of KV caches", plan.kv_budget_bytes);
  }
  PrintBytes("logits", plan.logits_bytes);
  PrintBytes("KV store", plan.kv_store_bytes);
  if (plan.device == DeviceKind::kCuda) PrintBytes("host", plan.HostBytes());
  PrintBytes("total", plan.TotalBytes());
}

// What the ranks of the mesh would have on this host.
struct Host {
  std::shared_ptr<Backend> backend;
  bool staged_exchange = true;
  int64_t outside_bytes = 0;
  MemoryBudget budget;
};

// What the engine will choose, if the ranks beyond those on this device are alike on others.
absl::StatusOr<bool> ExchangesThroughHost(const ModelOptions& options, const Mesh& mesh, Backend& backend,
                                          int ranks_on_device) {
  LF_ASSIGN_OR_RETURN(const DeviceCommunicatorOptions communicator, MakeCommunicatorOptions(options));
  const std::string& here = backend.facts().id;
  std::vector<RankDevice> ranks;
  ranks.reserve(static_cast<size_t>(mesh.size()));
  for (int rank = 0; rank < mesh.size(); ++rank) {
    ranks.push_back({.id = rank < ranks_on_device || here.empty() ? here : absl::StrCat(here, " + ", rank),
                     .nccl_version = NcclVersionCode(backend).value_or(0)});
  }
  LF_ASSIGN_OR_RETURN(const CommunicatorChoice choice, ChooseCommunicator(communicator, ranks));
  return choice.kind == CommunicatorKind::kStaged;
}

absl::StatusOr<Host> LookAtHost(const ModelOptions& options, const Mesh& mesh, const ModelWeights* weights) {
  Host host;
  LF_ASSIGN_OR_RETURN(const DeviceOptions device, MakeDeviceOptions(options, mesh.size(), 0));
  LF_ASSIGN_OR_RETURN(host.backend, CreateBackend(device));
  LF_ASSIGN_OR_RETURN(const int ranks_on_device, RanksOnDevice(device));
  LF_ASSIGN_OR_RETURN(host.staged_exchange,
                      ExchangesThroughHost(options, mesh, *host.backend, ranks_on_device));
  const bool mapped = device.kind == DeviceKind::kCpu;
  const bool sharded = ShardsWeights(MakeWeightPlacement(options), mesh);
  LF_ASSIGN_OR_RETURN(
      host.budget.host_bytes,
      AvailableMemoryBytes(mesh.size(),
                           mapped && !sharded && weights != nullptr ? weights->mapped_bytes() : 0));
  // This process is one of the ranks to come; each will have a context of its own.
  LF_ASSIGN_OR_RETURN(host.outside_bytes, ForecastOutsideBytes(*host.backend));
  LF_ASSIGN_OR_RETURN(const int64_t device_bytes, AvailableDeviceBytes(*host.backend, 1, host.outside_bytes));
  host.budget.device_bytes = device_bytes / ranks_on_device;
  if (const int64_t limit = options.memory_limit_bytes; limit > 0) {
    if (mapped) {
      host.budget.host_bytes = limit;
    } else {
      host.budget.device_bytes = std::min(host.budget.device_bytes, limit);
    }
  }
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
  LF_ASSIGN_OR_RETURN(const Subject subject, Open(options));
  const ModelConfig& config = subject.config;
  const int64_t num_tokens = options.num_tokens > 0 ? options.num_tokens : config.max_position_embeddings;
  if (num_tokens > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("--tokens ", num_tokens,
                                                   " is beyond max_position_embeddings ",
                                                   config.max_position_embeddings, " of the model"));
  }
  LF_ASSIGN_OR_RETURN(const Host host, LookAtHost(options.model, mesh, subject.weights.get()));
  LF_ASSIGN_OR_RETURN(AttentionDefaults defaults, MakeAttentionDefaults(options.model));
  if (subject.weights != nullptr) {
    LF_ASSIGN_OR_RETURN(defaults.model_patterns, ReadModelPatterns(options.model.model_dir));
  }
  LF_ASSIGN_OR_RETURN(const ResolvedAttention attention,
                      ResolveAttention(AttentionSpec{}, defaults, num_tokens, config));
  const KernelSet& kernels = host.backend->kernels();
  MemoryPlanInput input;
  input.config = &config;
  input.kernels = &kernels;
  input.patterns = &attention.patterns;
  input.weights_bytes =
      LargestWeightsBytes(MakeWeightPlacement(options.model), config, subject.weights.get(), mesh, kernels);
  input.weights_in_pool = kernels.device() != DeviceKind::kCpu;
  input.outside_bytes = host.outside_bytes;
  input.staged_exchange = host.staged_exchange;
  // As if all ranks were on one host.
  input.peer_copies = kernels.device() != DeviceKind::kCpu && ParallelAttention::BeginsEarly(mesh) &&
                      options.model.peer_copies != "off";
  input.mesh = mesh;
  input.num_tokens = num_tokens;
  input.kv_dtype = kernels.compute_dtype();
  input.recall = options.recall.options;

  PrintModel(subject);
  if (!attention.spec.pattern_json.empty()) {
    PrintRow("patterns", attention.spec.text);
    PrintRow("pattern file", DescribeProvenance(attention.patterns, subject.fingerprint));
  }
  std::printf("\nmemory plan for %lld tokens on mesh %s, %s, attention %s, KV %s\n",
              static_cast<long long>(num_tokens), ToString(mesh).c_str(), host.backend->facts().name.c_str(),
              attention.resolved.c_str(), std::string(DTypeName(input.kv_dtype)).c_str());
  PrintPlan("prefill (KV leaves as files)", PlanMemory(input));
  const int64_t longest_batch = LongestPrompt(input, host.budget, config.max_position_embeddings);
  LF_ASSIGN_OR_RETURN(const KvMemory kv_memory, ParseKvMemory(options.kv_memory));
  input.kv_tier = PlanOf(kv_memory);
  const MemoryPlan served = PlanMemory(input);
  PrintPlan(absl::StrCat("serve --kv-memory ", options.kv_memory).c_str(), served);
  if (served.kv_budget_bytes > 0) {
    std::printf("  of its budget the KV cache of this prompt takes %lld bytes\n",
                static_cast<long long>(served.kv_needed_bytes));
  }
  const int64_t longest_served = LongestPrompt(input, host.budget, config.max_position_embeddings);
  PrintLongest(host, mesh, longest_batch, longest_served);
  return FlushOutput();
}

}  // namespace

Command AddInspectCommand(CLI::App& program) {
  CLI::App* app =
      program.add_subcommand("inspect", "Show what a model is and the memory that a prompt would take");
  auto options = std::make_shared<InspectOptions>();
  CLI::Option* const model = AddModelOption(*app, options->model)->required(false);
  CLI::Option* const geometry =
      app->add_option("--geometry", options->geometry,
                      absl::StrCat("the memory plan of a model that is not here: ", GeometryNames(),
                                   ", or a config.json"))
          ->type_name("NAME|FILE")
          ->excludes(model);
  app->callback([app, model, geometry] {
    if (model->empty() && geometry->empty()) throw CLI::RequiredError("--model or --geometry");
  });
  app->add_option("--tokens", options->num_tokens,
                  "prompt length of the memory plan (default: the model's maximum)")
      ->type_name("N")
      ->check(AtLeast(1));
  AddMeshOption(*app, options->model);
  AddDeviceOption(*app, options->model);
  AddWeightsOption(*app, options->model);
  AddMemoryOption(*app, options->model);
  AddKvMemoryOption(*app, options->kv_memory);
  AddPatternOptions(*app, options->model);
  AddRecallOptions(*app, "nobody watches; here it counts in the memory plan", options->recall);
  return {app, [options](CommandContext& context) {
            if (context.launch.rank != 0) return static_cast<int>(kExitDone);
            const absl::Status status = Inspect(*options);
            const int code = Report(status);
            // A broken checkpoint is bad input, although its bytes are what is wrong.
            return absl::IsDataLoss(status) ? static_cast<int>(kExitUsage) : code;
          }};
}

}  // namespace longfill
