#ifndef LONGFILL_MODELS_DEVICE_WEIGHTS_H_
#define LONGFILL_MODELS_DEVICE_WEIGHTS_H_

// Weights where a backend computes with them. All tensors lie in one allocation of backend.memory()
// (weight_layout.h), which the weights own: the backend outlives them.

#include <cstdint>
#include <memory>

#include "kernels/api/backend.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "models/config.h"
#include "models/weights.h"

namespace longfill {

// What ConvertWeights takes from backend.memory() and keeps, and RandomWeights for the compute dtype; to the
// byte. The config is one of LoadModelConfig, ParseModelConfig or GeometryConfig.
int64_t DeviceWeightsBytes(const ModelConfig& config, DType dtype);

// The weights that `backend` computes with: on a CPU `host` itself, elsewhere ConvertWeights to its compute
// dtype, and the mapping of the checkpoint goes with `host`. Take what needs files() (the fingerprint)
// before.
absl::StatusOr<std::unique_ptr<const ModelWeights>> UploadWeights(std::unique_ptr<const ModelWeights> host,
                                                                  const ModelConfig& config,
                                                                  Backend& backend);

// A copy of host weights in backend.memory(), projections, embedding and biases rounded to `dtype`, complete
// at return. Memory and errors of CopyWeights (weight_fill.h).
absl::StatusOr<std::unique_ptr<const ModelWeights>> ConvertWeights(const ModelWeights& host,
                                                                   const ModelConfig& config, DType dtype,
                                                                   Backend& backend);

// Weights of the config's shapes without a checkpoint, in the compute dtype, filled on the device from the
// seed as transformers initialises them: matrices normal with standard deviation initializer_range, norms 1,
// biases 0. A matrix depends on seed, role and layer alone.
absl::StatusOr<std::unique_ptr<const ModelWeights>> RandomWeights(const ModelConfig& config, Backend& backend,
                                                                  uint64_t seed);

}  // namespace longfill

#endif  // LONGFILL_MODELS_DEVICE_WEIGHTS_H_
