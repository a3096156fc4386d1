#ifndef LONGFILL_MODELS_PATTERN_DIRECTORY_H_
#define LONGFILL_MODELS_PATTERN_DIRECTORY_H_

// Which file of a directory of pattern files is a model's, by the model's name.

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"

namespace longfill {

// The names under which a model may be known, without owner and duplicates, the likeliest first: that of a
// Hugging Face cache folder (".../models--OWNER--NAME/snapshots/REVISION"), that of the directory itself, and
// the last part of `name_or_path`, which is _name_or_path of its config.json (may be empty).
std::vector<std::string> ModelNames(const std::string& model_dir, std::string_view name_or_path);

// The file of `directory` for the first of the names that it has one for: NAME.json, else the file that
// MInference publishes for a model of that name (upper and lower case are the same), else patterns.json,
// which is for any model and the only one for a geometry, which has no name. NotFound says where and for
// which names was looked.
absl::StatusOr<std::string> FindPatternFile(const std::string& directory, std::span<const std::string> names);

}  // namespace longfill

#endif  // LONGFILL_MODELS_PATTERN_DIRECTORY_H_
