#ifndef LONGFILL_RUNTIME_ENGINE_MEMORY_PLAN_H_
#define LONGFILL_RUNTIME_ENGINE_MEMORY_PLAN_H_

#include <cstdint>
#include <string>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "models/config.h"
#include "parallel/mesh.h"

namespace longfill {

// Bytes of one rank (the largest) for one prompt, before anything is allocated. Used by `longfill inspect`,
// admission and the engine alike.
struct MemoryPlan {
  int64_t weights_bytes = 0;     // mapped from the checkpoint, shared by the ranks of a host
  int64_t activation_bytes = 0;  // residual, and buffers of a chunk of tokens for the linear layers
  int64_t attention_bytes = 0;   // Q, K, V and output of one layer: own tokens, exchanged and gathered pieces
  int64_t index_bytes = 0;       // last-query scores and selection
  int64_t logits_bytes = 0;
  int64_t kv_store_bytes =
      0;  // K and V of all layers where they are kept (serve); 0 where they leave as files
  int64_t TotalBytes() const {
    return weights_bytes + activation_bytes + attention_bytes + index_bytes + logits_bytes + kv_store_bytes;
  }
};

struct MemoryPlanInput {
  const ModelConfig* config = nullptr;
  int64_t weights_bytes = 0;
  Mesh mesh;
  int64_t num_tokens = 0;
  int64_t num_logits = 1;
  DType kv_dtype = DType::kFloat32;
  bool keep_kv = false;  // the KV store holds all layers
};

MemoryPlan PlanMemory(const MemoryPlanInput& input);

// Memory that this host can give to one of `ranks_on_host` ranks: what is available now (and, in a container,
// what its limit leaves), shared evenly.
absl::StatusOr<int64_t> AvailableMemoryBytes(int ranks_on_host);

// The longest prompt of at most `max_tokens` whose plan fits `available_bytes`; 0: none does.
// input.num_tokens is not read.
int64_t LongestPrompt(MemoryPlanInput input, int64_t available_bytes, int64_t max_tokens);

// ResourceExhausted if the plan does not fit `available_bytes`, naming both and the longest prompt that would
// fit.
absl::Status CheckFits(const MemoryPlanInput& input, int64_t available_bytes);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_ENGINE_MEMORY_PLAN_H_
