#include "runtime/engine/memory_plan.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <optional>
#include <sstream>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/thread_pool.h"
#include "kernels/cpu/cpu_kernel_set.h"
#include "models/transformer.h"
#include "parallel/parallel_attention.h"
#include "parallel/sparse_index_builder.h"

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

}  // namespace

MemoryPlan PlanMemory(const MemoryPlanInput& input) {
  const ModelConfig& config = *input.config;
  const ShardPlan plan(input.mesh, input.num_tokens);
  const AttentionGeometry geometry = GeometryOf(config);
  // Workspace sizes are the backend's; one thread's are a lower bound that is near, since scratch is small.
  ThreadPool pool(1);
  CpuMemoryResource memory;
  const std::unique_ptr<KernelSet> kernels = CreateCpuKernelSet(pool, memory);
  // The pattern with the most to score and select; others take less.
  const std::vector<HeadPattern> patterns(static_cast<size_t>(config.num_q_heads), VerticalSlash{1, 1});

  MemoryPlan result;
  result.weights_bytes = input.weights_bytes;
  result.activation_bytes = Transformer::PlanBytes(config, *kernels, plan);
  result.attention_bytes = ParallelAttention::PlanBytes(*kernels, geometry, plan);
  result.index_bytes = SparseIndexBuilder::PlanBytes(*kernels, geometry, plan, patterns);
  // Rank 0 holds all logits and what the owners sent.
  result.logits_bytes =
      2 * std::max<int64_t>(1, input.num_logits) * config.vocab_size * static_cast<int64_t>(sizeof(float));
  if (input.keep_kv) {
    int64_t most_tokens = 0;
    for (int rank = 0; rank < input.mesh.size(); ++rank)
      most_tokens = std::max(most_tokens, plan.NumTokens(rank));
    result.kv_store_bytes = 2 * config.num_layers * config.num_kv_heads * most_tokens * config.head_dim *
                            DTypeBytes(input.kv_dtype);
  }
  return result;
}

absl::StatusOr<int64_t> AvailableMemoryBytes(int ranks_on_host) {
  const std::optional<int64_t> available = ReadProcKilobytes("/proc/meminfo", "MemAvailable:");
  if (!available.has_value()) return absl::InternalError("/proc/meminfo has no MemAvailable");
  const int64_t bytes = std::min(*available, ControlGroupBytesLeft().value_or(*available));
  return bytes / std::max(1, ranks_on_host);
}

int64_t LongestPrompt(MemoryPlanInput input, int64_t available_bytes, int64_t max_tokens) {
  int64_t low = 0;
  int64_t high = max_tokens;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    input.num_tokens = middle;
    if (PlanMemory(input).TotalBytes() <= available_bytes) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

absl::Status CheckFits(const MemoryPlanInput& input, int64_t available_bytes) {
  const int64_t needed = PlanMemory(input).TotalBytes();
  if (needed <= available_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("a prompt of ", input.num_tokens, " tokens needs ", needed,
                   " bytes on the largest rank and ", available_bytes, " are available; up to ",
                   LongestPrompt(input, available_bytes, input.num_tokens), " tokens would fit"));
}

}  // namespace longfill
