#ifndef LONGFILL_MODELS_WEIGHT_LAYOUT_H_
#define LONGFILL_MODELS_WEIGHT_LAYOUT_H_

// Which weights a model has, from its config and family alone, and where each lies when all of them share one
// piece of memory.

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "models/config.h"
#include "models/family.h"

namespace longfill {

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
};

inline constexpr int64_t kWeightAlignment = 256;

struct WeightLayout {
  std::vector<WeightSlot> slots;  // offsets are multiples of kWeightAlignment
  int64_t size_bytes = 0;
  int64_t num_parameters = 0;
};

// Norms in fp32, everything else in `dtype`; a tied LM head takes no place. `family` outlives the result.
WeightLayout LayOutWeights(const ModelConfig& config, const Family& family, DType dtype);

}  // namespace longfill

#endif  // LONGFILL_MODELS_WEIGHT_LAYOUT_H_
