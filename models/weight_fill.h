#ifndef LONGFILL_MODELS_WEIGHT_FILL_H_
#define LONGFILL_MODELS_WEIGHT_FILL_H_

// How weights get into the memory that a backend computes with.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"
#include "models/config.h"
#include "models/weight_layout.h"
#include "models/weights.h"

namespace longfill {

// Bytes [begin, end) of a layout, multiples of kWeightAlignment, and the memory of the backend that has them.
struct WeightExtent {
  int64_t begin = 0;
  int64_t end = 0;
  std::byte* to = nullptr;
};

// Weights of `host` that lie in the extents, rounded to the dtypes of the layout; complete at return. Goes
// through two pieces of backend.host_memory() of kWeightStagingBytes each, given back at return.
// InvalidArgument, naming the tensor: a finite weight is too large for its dtype. Bytes between two slots are
// left as they are.
absl::Status CopyWeights(const ModelWeights& host, const WeightLayout& layout,
                         std::span<const WeightExtent> extents, Backend& backend);
inline constexpr int64_t kWeightStagingBytes = int64_t{32} << 20;

// Weights without a checkpoint, as transformers initialises them: matrices normal with standard deviation
// config.initializer_range, norms 1, biases 0; complete at return. An element depends on seed, role, layer
// and its place in the matrix alone.
absl::Status DrawWeights(const ModelConfig& config, uint64_t seed, const WeightLayout& layout,
                         std::span<const WeightExtent> extents, Backend& backend);

// Points what the slot is of, `*norm` or a part of `*linear`, to its place at `data`; the other may be
// nullptr.
void PointTo(const WeightSlot& slot, const ModelConfig& config, void* data, LinearWeights* linear,
             const float** norm);

// Memory, not yet filled, for what belongs to no layer and the first `num_layers` layers, and weights that
// point there and own it.
struct UnfilledWeights {
  std::unique_ptr<const ModelWeights> weights;
  WeightExtent extent;
};
absl::StatusOr<UnfilledWeights> AllocateWeights(const ModelConfig& config, const WeightLayout& layout,
                                                int64_t num_layers, Backend& backend);

}  // namespace longfill

#endif  // LONGFILL_MODELS_WEIGHT_FILL_H_
