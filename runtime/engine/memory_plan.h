#ifndef LONGFILL_RUNTIME_ENGINE_MEMORY_PLAN_H_
#define LONGFILL_RUNTIME_ENGINE_MEMORY_PLAN_H_

#include <cstdint>
#include <functional>

#include "kernels/api/kernel_set.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "models/config.h"
#include "models/pattern_file.h"
#include "models/recall_guard.h"
#include "parallel/mesh.h"
#include "parallel/peer_memory.h"
#include "runtime/kv/kv_exporter.h"
#include "runtime/kv/kv_tier.h"

namespace longfill {

// Bytes of one rank (the largest) for one prompt, before anything is allocated. Used by `longfill inspect`,
// admission and the engine alike. On a CPU the device is the host.
struct MemoryPlan {
  DeviceKind device = DeviceKind::kCpu;
  bool weights_in_pool = false;

  // On the device.
  int64_t weights_bytes = 0;     // on a CPU mapped from the checkpoint, shared by the ranks of a host
  int64_t activation_bytes = 0;  // residual, Q, K, V, output of attention, buffers of a chunk of tokens
  int64_t index_bytes = 0;       // the indices of one layer
  int64_t attention_bytes = 0;   // scratch of selection and of attention; exchanged pieces
  int64_t kv_budget_bytes = 0;   // of KV caches that stay on the device (device tier), taken at the start
  int64_t outside_bytes = 0;     // context and libraries, as measured; nothing of ours

  // On the host.
  int64_t logits_bytes = 0;
  int64_t staging_bytes = 0;   // page-locked: what ranks exchange through the host
  int64_t kv_ring_bytes = 0;   // page-locked: K and V on their way out
  int64_t kv_store_bytes = 0;  // of the tier that keeps K and V (serve); else 0

  int64_t kv_needed_bytes = 0;  // of kv_budget_bytes, by the prompt; a part, not a summand

  int64_t DeviceBytes() const {
    return weights_bytes + activation_bytes + attention_bytes + index_bytes + kv_budget_bytes + outside_bytes;
  }
  int64_t HostBytes() const { return logits_bytes + staging_bytes + kv_ring_bytes + kv_store_bytes; }
  int64_t TotalBytes() const { return DeviceBytes() + HostBytes(); }
  // What Backend::memory() has in use at most.
  int64_t PoolBytes() const {
    return activation_bytes + attention_bytes + index_bytes + kv_budget_bytes +
           (weights_in_pool ? weights_bytes : 0);
  }
};

struct MemoryPlanInput {
  const ModelConfig* config = nullptr;
  const KernelSet* kernels = nullptr;
  const PatternSet* patterns = nullptr;  // of the config's layers and query heads
  int64_t weights_bytes = 0;
  bool weights_in_pool = false;  // they are in Backend::memory(): all but a checkpoint on the CPU
  int64_t outside_bytes = 0;
  // Of the memory of the device for so many tokens, where indices are replaced (IndexReplacement). May be
  // empty.
  std::function<int64_t(int64_t num_tokens)> replacement_bytes;
  bool staged_exchange = true;  // several ranks exchange memory of a GPU through the host
  bool peer_copies = false;     // keys and values are read from peers (ParallelAttentionParams::peers)
  PeerHosts peer_hosts;         // then: of the ranks
  KvExportOptions kv_export;
  Mesh mesh;
  int64_t num_tokens = 0;
  int64_t num_logits = 1;
  DType kv_dtype = DType::kFloat32;
  KvTierOptions kv_tier;  // of the KV store; default: there is none, or it is in files
  // What is watched, and for a guard the indices of all heads with their largest budgets: how many fall short
  // is known only when they are computed.
  RecallOptions recall;
};

MemoryPlan PlanMemory(const MemoryPlanInput& input);

// What one rank may use. On a CPU everything comes out of host_bytes and device_bytes is not looked at.
struct MemoryBudget {
  int64_t device_bytes = 0;
  int64_t host_bytes = 0;
};

// Host memory that one of `ranks_on_host` ranks can get: what is available now (and, in a container, what its
// limit leaves), shared evenly, and `held_bytes`, what the plan counts although it needs nothing of that:
// files in the page cache, or that can be, and what the rank has allocated already.
absl::StatusOr<int64_t> AvailableMemoryBytes(int ranks_on_host, int64_t held_bytes);

// The longest prompt of at most `max_tokens` whose plan, with the same patterns, fits; 0: none does.
// input.num_tokens is not read.
int64_t LongestPrompt(MemoryPlanInput input, const MemoryBudget& budget, int64_t max_tokens);

// ResourceExhausted if the plan does not fit, naming device, host or the budget of KV caches, both figures
// and the longest prompt that would fit.
absl::Status CheckFits(const MemoryPlanInput& input, const MemoryBudget& budget);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_MEMORY_PLAN_H_
