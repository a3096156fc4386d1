#ifndef LONGFILL_MODELS_GEOMETRY_H_
#define LONGFILL_MODELS_GEOMETRY_H_

#include <string>

#include "kernels/base/status.h"
#include "models/config.h"

namespace longfill {

// The shapes of a published model by name, or of the config.json at the path `name_or_file`. Names:
//   llama3-8b    gradientai/Llama-3-8B-Instruct-Gradient-1048k: 1,048,576 positions, where Meta's model has
//                8,192; the 262k variant differs in its rope_theta alone
//   llama3-70b   the 70B model of that series, 1,048,576 positions, with the rope_theta of the 8B one
//   qwen2.5-7b   Qwen/Qwen2.5-7B-Instruct-1M: 1,010,000 positions, without dual chunk attention
// InvalidArgument for what is neither, listing the names; else the errors of ParseModelConfig.
absl::StatusOr<ModelConfig> GeometryConfig(const std::string& name_or_file);

std::string GeometryNames();  // "llama3-8b, ...", for messages and help

}  // namespace longfill

#endif  // LONGFILL_MODELS_GEOMETRY_H_
