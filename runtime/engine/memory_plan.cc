#include "runtime/engine/memory_plan.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "models/transformer.h"
#include "parallel/parallel_attention.h"
#include "parallel/recall_monitor.h"
#include "parallel/sparse_index_builder.h"
#include "parallel/staged_communicator.h"

namespace longfill {
namespace {

// "Key:   123 kB" of a /proc file in bytes.
std::optional<int64_t> ReadProcKilobytes(const char* path, std::string_view key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    if (line.compare(0, key.size(), key) != 0) continue;
    std::istringstream rest(line.substr(key.size()));
    int64_t kilobytes = 0;
    if (rest >> kilobytes) return kilobytes * 1024;
  }
  return std::nullopt;
}

std::optional<int64_t> ReadNumber(const char* path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;  // no such file, or "max"
}

// What the control group of a container leaves; page cache counts as used there, so its inactive part is
// given back.
std::optional<int64_t> ControlGroupBytesLeft() {
  const std::optional<int64_t> limit = ReadNumber("/sys/fs/cgroup/memory.max");
  const std::optional<int64_t> used = ReadNumber("/sys/fs/cgroup/memory.current");
  if (!limit.has_value() || !used.has_value()) return std::nullopt;
  std::ifstream file("/sys/fs/cgroup/memory.stat");
  std::string key;
  int64_t value = 0;
  int64_t reclaimable = 0;
  while (file >> key >> value) {
    if (key == "inactive_file") reclaimable = value;
  }
  return std::max<int64_t>(0, *limit - *used + reclaimable);
}

// For keys and values of other hosts, on the rank that needs most.
int64_t RelayBytes(const MemoryPlanInput& input, const ShardPlan& plan) {
  int64_t most = 0;
  for (int rank = 0; rank < plan.mesh().size() && input.peer_copies; ++rank) {
    most = std::max(
        most, ParallelAttention::RelayBytes(GeometryOf(*input.config), input.kernels->compute_dtype(), plan,
                                            input.peer_hosts, rank));
  }
  return 2 * most;
}

// Notes the index of a layer, of `shared` bytes more; returns the scratch that makes it.
int64_t PlanSelection(const MemoryPlanInput& input, const ShardPlan& plan,
                      std::span<const HeadPattern> patterns, int64_t shared, MemoryPlan* result) {
  const AttentionGeometry geometry = GeometryOf(*input.config);
  const int64_t stays = SparseIndexBuilder::IndexBytes(geometry, plan, patterns);
  result->index_bytes = std::max(result->index_bytes, stays + shared);
  return SparseIndexBuilder::PlanBytes(*input.kernels, geometry, plan, patterns) - stays;
}

// Recall and selection of a layer take turns, of `scratch` bytes the larger one, and attention comes after
// them, or has begun before (ParallelAttention::Begin).
void PlanAttention(const MemoryPlanInput& input, const ShardPlan& plan, bool watched, int64_t window,
                   int64_t scratch, MemoryPlan* result) {
  const AttentionGeometry geometry = GeometryOf(*input.config);
  const auto num_sampled =
      watched ? static_cast<int64_t>(SampledPositions(plan.num_tokens(), geometry.q_per_kv()).size()) : 0;
  const int64_t attention =
      ParallelAttention::PlanBytes(*input.kernels, geometry, plan,
                                   {.num_sampled = num_sampled,
                                    .from_peers = input.peer_copies,
                                    .relayed = input.peer_copies && input.peer_hosts.num_hosts() > 1});
  if (watched) {
    scratch = std::max(scratch, RecallMonitor::PlanBytes(*input.kernels, geometry, plan, window));
  }
  const int64_t together =
      ParallelAttention::BeginsEarly(plan.mesh()) ? attention + scratch : std::max(attention, scratch);
  result->attention_bytes = std::max(result->attention_bytes, together);
}

// Of each layer; the index that selection has made stays for attention.
void PlanLayers(const MemoryPlanInput& input, const ShardPlan& plan, MemoryPlan* result) {
  const ModelConfig& config = *input.config;
  for (int64_t layer = 0; layer < input.patterns->num_layers(); ++layer) {
    const auto patterns = input.patterns->layer(layer);
    const int64_t window = config.WindowOf(layer);
    const bool as_before = layer > 0 && std::ranges::equal(patterns, input.patterns->layer(layer - 1)) &&
                           window == config.WindowOf(layer - 1);
    if (as_before) continue;
    const int64_t scratch = PlanSelection(input, plan, patterns, 0, result);
    const bool watched = input.recall.on() && SomeLeaveOutKeys(patterns, window, plan.num_tokens());
    PlanAttention(input, plan, watched, window, scratch, result);
    if (!watched || input.recall.min_recall == 0) continue;
    // Heads that do not fall short take the index over all keys, which they share.
    const HeadPattern all_keys = SeesAllPattern(window, plan.num_tokens());
    const int64_t shared = SparseIndexBuilder::IndexBytes(GeometryOf(config), plan, {&all_keys, 1});
    for (const int64_t factor : kBudgetFactors) {
      std::vector<HeadPattern> wider;
      for (const HeadPattern& pattern : patterns) {
        wider.push_back(WidenedPattern(pattern, factor, window, plan.num_tokens()));
      }
      result->attention_bytes =
          std::max(result->attention_bytes, PlanSelection(input, plan, wider, shared, result));
    }
  }
  if (input.replacement_bytes) result->index_bytes += input.replacement_bytes(input.num_tokens);
}

std::string Describe(const MemoryPlan& plan, const MemoryBudget& budget) {
  if (plan.kv_needed_bytes > plan.kv_budget_bytes) {
    return absl::StrCat(plan.kv_needed_bytes, " bytes for its KV cache on the largest rank and ",
                        plan.kv_budget_bytes, " are kept for KV caches on the device");
  }
  if (plan.device == DeviceKind::kCpu) {
    return absl::StrCat(plan.TotalBytes(), " bytes on the largest rank and ", budget.host_bytes,
                        " are available");
  }
  if (plan.DeviceBytes() > budget.device_bytes) {
    return absl::StrCat(plan.DeviceBytes(), " bytes of GPU memory on the largest rank and ",
                        budget.device_bytes, " are available");
  }
  return absl::StrCat(plan.HostBytes(), " bytes of host memory on the largest rank and ", budget.host_bytes,
                      " are available");
}

bool Fits(const MemoryPlan& plan, const MemoryBudget& budget) {
  if (plan.kv_needed_bytes > plan.kv_budget_bytes) return false;
  if (plan.device == DeviceKind::kCpu) return plan.TotalBytes() <= budget.host_bytes;
  return plan.DeviceBytes() <= budget.device_bytes && plan.HostBytes() <= budget.host_bytes;
}

}  // namespace

MemoryPlan PlanMemory(const MemoryPlanInput& input) {
  const ModelConfig& config = *input.config;
  const ShardPlan plan(input.mesh, input.num_tokens);
  MemoryPlan result;
  result.device = input.kernels->device();
  result.weights_in_pool = input.weights_in_pool;
  result.weights_bytes = input.weights_bytes;
  result.outside_bytes = input.outside_bytes;
  result.activation_bytes = Transformer::PlanBytes(config, *input.kernels, plan) + RelayBytes(input, plan);
  PlanLayers(input, plan, &result);
  // Rank 0 holds all logits and what the owners sent.
  result.logits_bytes =
      2 * std::max<int64_t>(1, input.num_logits) * config.vocab_size * static_cast<int64_t>(sizeof(float));
  if (result.device != DeviceKind::kCpu && input.mesh.size() > 1 && input.staged_exchange) {
    result.staging_bytes = 2 * kStagingSliceBytes;
  }
  result.kv_ring_bytes = KvRing::PlanBytes(result.device, input.kv_export);
  const KvTierPlan tier = PlanKvTier(input.kv_tier, {.num_layers = config.num_layers,
                                                     .num_kv_heads = config.num_kv_heads,
                                                     .num_rows = plan.MostTokens(),
                                                     .head_dim = config.head_dim,
                                                     .kv_dtype = input.kv_dtype,
                                                     .compute_dtype = input.kernels->compute_dtype(),
                                                     .device = result.device});
  result.kv_budget_bytes = tier.device_bytes;
  result.kv_needed_bytes = tier.device_needed_bytes;
  result.kv_store_bytes = tier.host_bytes;
  return result;
}

absl::StatusOr<int64_t> AvailableMemoryBytes(int ranks_on_host, int64_t held_bytes) {
  const std::optional<int64_t> available = ReadProcKilobytes("/proc/meminfo", "MemAvailable:");
  if (!available.has_value()) return absl::InternalError("/proc/meminfo has no MemAvailable");
  const int64_t bytes = std::min(*available, ControlGroupBytesLeft().value_or(*available));
  return bytes / std::max(1, ranks_on_host) + held_bytes;
}

int64_t LongestPrompt(MemoryPlanInput input, const MemoryBudget& budget, int64_t max_tokens) {
  int64_t low = 0;
  int64_t high = max_tokens;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    input.num_tokens = middle;
    if (Fits(PlanMemory(input), budget)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

absl::Status CheckFits(const MemoryPlanInput& input, const MemoryBudget& budget) {
  const MemoryPlan plan = PlanMemory(input);
  if (Fits(plan, budget)) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("a prompt of ", input.num_tokens, " tokens needs ", Describe(plan, budget), "; up to ",
                   LongestPrompt(input, budget, input.num_tokens), " tokens would fit"));
}

}  // namespace longfill
