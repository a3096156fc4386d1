#include "models/device_weights.h"

#include <utility>

#include "models/weight_fill.h"
#include "models/weight_layout.h"

namespace longfill {

int64_t DeviceWeightsBytes(const ModelConfig& config, DType dtype) {
  const absl::StatusOr<const Family*> family = FamilyOf(config);
  LF_CHECK(family.ok());
  return LayOutWeights(config, **family, {dtype, dtype}).size_bytes;
}

absl::StatusOr<std::unique_ptr<const ModelWeights>> UploadWeights(std::unique_ptr<const ModelWeights> host,
                                                                  const ModelConfig& config,
                                                                  Backend& backend) {
  if (backend.kernels().device() == DeviceKind::kCpu) return host;
  return ConvertWeights(*host, config, backend.kernels().compute_dtype(), backend);
}

absl::StatusOr<std::unique_ptr<const ModelWeights>> ConvertWeights(const ModelWeights& host,
                                                                   const ModelConfig& config, DType dtype,
                                                                   Backend& backend) {
  LF_ASSIGN_OR_RETURN(const Family* family, FamilyOf(config));
  const WeightLayout layout = LayOutWeights(config, *family, {dtype, dtype});
  LF_ASSIGN_OR_RETURN(UnfilledWeights made, AllocateWeights(config, layout, config.num_layers, backend));
  LF_RETURN_IF_ERROR(CopyWeights(host, layout, {&made.extent, 1}, backend));
  return std::move(made.weights);
}

absl::StatusOr<std::unique_ptr<const ModelWeights>> RandomWeights(const ModelConfig& config, Backend& backend,
                                                                  uint64_t seed) {
  LF_ASSIGN_OR_RETURN(const Family* family, FamilyOf(config));
  const DType dtype = backend.kernels().compute_dtype();
  const WeightLayout layout = LayOutWeights(config, *family, {dtype, dtype});
  LF_ASSIGN_OR_RETURN(UnfilledWeights made, AllocateWeights(config, layout, config.num_layers, backend));
  LF_RETURN_IF_ERROR(DrawWeights(config, seed, layout, {&made.extent, 1}, backend));
  return std::move(made.weights);
}

}  // namespace longfill
