#ifndef LONGFILL_MODELS_WEIGHT_LAYOUT_H_
#define LONGFILL_MODELS_WEIGHT_LAYOUT_H_

// Which weights a model has, from its config and family alone, and where each lies when all of them share one
// piece of memory.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "models/config.h"
#include "models/family.h"

namespace longfill {

// Of a config of LoadModelConfig, ParseModelConfig or GeometryConfig; Unimplemented, naming it, where there
// is no such family.
absl::StatusOr<const Family*> FamilyOf(const ModelConfig& config);

struct RoleShape {
  int64_t out_width = 0;
  int64_t in_width = 0;  // 0 for norms
};
RoleShape ShapeOf(WeightRole role, const ModelConfig& config);
bool IsNorm(WeightRole role);
bool Applies(WeightCondition condition, const ModelConfig& config);

// One role of one stored tensor: a matrix, a bias or a norm.
struct WeightSlot {
  const TensorRule* rule = nullptr;
  WeightRole role{};
  int64_t layer = 0;
  int64_t count = 0;  // elements
  DType dtype = DType::kFloat32;
  int64_t offset_bytes = 0;

  std::string Name() const { return TensorName(rule->name, layer); }  // of the stored tensor
  int64_t size_bytes() const { return count * DTypeBytes(dtype); }
  int64_t end_bytes() const { return offset_bytes + size_bytes(); }
};

inline constexpr int64_t kWeightAlignment = 256;

// What belongs to no layer comes first, then the layers, one like the other.
struct WeightLayout {
  std::vector<WeightSlot> slots;  // in the order of their offsets, which are multiples of kWeightAlignment
  int64_t size_bytes = 0;
  int64_t num_parameters = 0;
  int64_t layers_begin = 0;  // layer i lies in [layers_begin + i * layer_bytes, ... + layer_bytes)
  int64_t layer_bytes = 0;
};

// What is no norm: those are in fp32.
struct WeightDTypes {
  DType matrices = DType::kFloat32;
  DType biases = DType::kFloat32;
};

// A tied LM head takes no place. `family` outlives the result.
WeightLayout LayOutWeights(const ModelConfig& config, const Family& family, const WeightDTypes& dtypes);

}  // namespace longfill

#endif  // LONGFILL_MODELS_WEIGHT_LAYOUT_H_
