#include "models/weights.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <new>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "models/family.h"
#include "models/json_input.h"
#include "models/weight_layout.h"

namespace longfill {
namespace {

constexpr int64_t kMaxIndexBytes = 64 << 20;
constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";

std::string ShowShape(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// The files of the checkpoint in name order: the single file, or the shards of the index with where it puts
// each tensor.
struct FileList {
  std::vector<std::string> names;
  std::map<std::string, std::string> placed;  // tensor -> file name; empty for a single file
};

absl::StatusOr<FileList> ReadIndex(const std::string& path) {
  LF_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxIndexBytes));
  LF_ASSIGN_OR_RETURN(const nlohmann::json index, ParseJson(text, path));
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": has no object weight_map"));
  }
  FileList list;
  std::set<std::string> names;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    if (name.empty() || name == "." || name == ".." ||
        name.find_first_of(std::string_view("/\\\0", 3)) != name.npos) {
      return absl::InvalidArgumentError(absl::StrCat(
          path, ": places tensor ", QuoteForMessage(tensor), " in ", QuoteForMessage(file.dump()),
          ", which is no plain name of a file in the model directory"));
    }
    names.insert(name);
    list.placed.emplace(tensor, name);
  }
  if (names.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": its weight_map is empty"));
  list.names.assign(names.begin(), names.end());
  return list;
}

absl::StatusOr<FileList> ListFiles(const std::string& directory) {
  struct stat info;
  if (stat((directory + "/" + kSingleFile).c_str(), &info) == 0) return FileList{{kSingleFile}, {}};
  absl::StatusOr<FileList> list = ReadIndex(directory + "/" + kIndexFile);
  if (absl::IsNotFound(list.status())) {
    return absl::NotFoundError(absl::StrCat(directory, " holds neither ", kSingleFile, " nor ", kIndexFile));
  }
  return list;
}

}  // namespace

// Fills a ModelWeights rule by rule.
class WeightLoader {
 public:
  WeightLoader(const std::string& directory, const ModelConfig& config, const Family& family,
               ModelWeights& weights)
      : directory_(directory), config_(config), family_(family), weights_(weights) {}

  absl::Status Run() {
    LF_RETURN_IF_ERROR(OpenFiles());
    weights_.layers_.resize(static_cast<size_t>(config_.num_layers));
    for (const TensorRule& rule : family_.tensors) {
      if (!Applies(rule.condition, config_)) continue;
      const int64_t copies = IsLayerTemplate(rule.name) ? config_.num_layers : 1;
      for (int64_t layer = 0; layer < copies; ++layer) LF_RETURN_IF_ERROR(LoadTensor(rule, layer));
    }
    if (config_.tie_word_embeddings) weights_.lm_head_ = weights_.embedding_;
    return CheckLeftOver();
  }

 private:
  struct Stored {
    const SafetensorsFile* file = nullptr;
    const SafetensorsTensor* tensor = nullptr;
    bool used = false;
  };

  absl::Status OpenFiles() {
    LF_ASSIGN_OR_RETURN(const FileList list, ListFiles(directory_));
    for (const std::string& name : list.names) {
      LF_ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(directory_ + "/" + name));
      for (const SafetensorsTensor& tensor : file->tensors()) {
        const auto [place, added] = stored_.emplace(tensor.name, Stored{file.get(), &tensor});
        if (!added) {
          return absl::InvalidArgumentError(absl::StrCat("tensor ", QuoteForMessage(tensor.name),
                                                         " is stored twice: in ", place->second.file->path(),
                                                         " and in ", file->path()));
        }
      }
      weights_.files_.push_back(std::move(file));
    }
    for (const auto& [tensor, name] : list.placed) {
      const auto found = stored_.find(tensor);
      if (found == stored_.end() || found->second.file->path() != directory_ + "/" + name) {
        return absl::InvalidArgumentError(absl::StrCat("tensor ", QuoteForMessage(tensor), " is missing in ",
                                                       directory_, "/", name, ", where ", kIndexFile,
                                                       " places it"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status LoadTensor(const TensorRule& rule, int64_t layer) {
    const std::string name = TensorName(rule.name, layer);
    const auto found = stored_.find(name);
    if (found == stored_.end()) {
      return absl::InvalidArgumentError(absl::StrCat("tensor '", name, "' is missing in ", directory_, " (",
                                                     weights_.files_.size(), " files)"));
    }
    found->second.used = true;
    LF_RETURN_IF_ERROR(CheckTensor(rule, found->second));
    const SafetensorsTensor& tensor = *found->second.tensor;
    int64_t elements = 1;
    for (const int64_t extent : tensor.shape) elements *= extent;
    weights_.num_parameters_ += elements;
    return rule.is_bias || IsNorm(rule.roles.front()) ? LoadVector(rule, layer, tensor)
                                                      : LoadMatrix(rule, layer, tensor);
  }

  absl::Status CheckTensor(const TensorRule& rule, const Stored& stored) const {
    const SafetensorsTensor& tensor = *stored.tensor;
    int64_t rows = 0;
    for (const WeightRole role : rule.roles) rows += ShapeOf(role, config_).out_width;
    std::vector<int64_t> expected = {rows};
    if (!rule.is_bias && !IsNorm(rule.roles.front()))
      expected.push_back(ShapeOf(rule.roles.front(), config_).in_width);
    if (tensor.shape != expected) {
      return absl::InvalidArgumentError(absl::StrCat(stored.file->path(), ": tensor '", tensor.name,
                                                     "' has shape ", ShowShape(tensor.shape),
                                                     ", config.json makes it ", ShowShape(expected)));
    }
    if (!tensor.dtype.has_value() || !IsFloat(*tensor.dtype)) {
      return absl::InvalidArgumentError(absl::StrCat(stored.file->path(), ": tensor '", tensor.name,
                                                     "' has dtype ", tensor.stored_dtype,
                                                     ", expected F32, BF16 or F16"));
    }
    return absl::OkStatus();
  }

  absl::Status LoadVector(const TensorRule& rule, int64_t layer, const SafetensorsTensor& tensor) {
    const int64_t count = tensor.shape.front();
    std::unique_ptr<float[]> values(new (std::nothrow) float[static_cast<size_t>(count)]);
    LF_ASSIGN_OR_RETURN(const void* source, Aligned(tensor, /*keep=*/false));
    if (values == nullptr) return OutOfMemory(tensor);
    WidenToFloat(source, *tensor.dtype, count, values.get());
    scratch_.reset();
    const float* next = values.get();
    for (const WeightRole role : rule.roles) {
      if (rule.is_bias) {
        weights_.Linear(role, layer).bias = next;
      } else {
        weights_.Norm(role, layer) = next;
      }
      next += ShapeOf(role, config_).out_width;
    }
    weights_.owned_bytes_ += count * static_cast<int64_t>(sizeof(float));
    weights_.widened_.push_back(std::move(values));
    return absl::OkStatus();
  }

  absl::Status LoadMatrix(const TensorRule& rule, int64_t layer, const SafetensorsTensor& tensor) {
    LF_ASSIGN_OR_RETURN(const void* source, Aligned(tensor, /*keep=*/true));
    const auto* next = static_cast<const std::byte*>(source);
    for (const WeightRole role : rule.roles) {
      const RoleShape shape = ShapeOf(role, config_);
      LinearWeights& linear = weights_.Linear(role, layer);
      linear.weight = next;
      linear.dtype = *tensor.dtype;
      linear.out_width = shape.out_width;
      linear.in_width = shape.in_width;
      next += shape.out_width * shape.in_width * DTypeBytes(*tensor.dtype);
    }
    return absl::OkStatus();
  }

  // The tensor's bytes aligned to its element: in the mapping if they are, else copied, into the weights or
  // (keep = false) into scratch_.
  absl::StatusOr<const void*> Aligned(const SafetensorsTensor& tensor, bool keep) {
    const auto size = tensor.bytes.size();
    if (tensor.file_offset % DTypeBytes(*tensor.dtype) == 0) {
      if (keep) weights_.mapped_bytes_ += static_cast<int64_t>(size);
      return static_cast<const void*>(tensor.bytes.data());
    }
    std::unique_ptr<std::byte[]> copy(new (std::nothrow) std::byte[size]);
    if (copy == nullptr) return OutOfMemory(tensor);
    std::memcpy(copy.get(), tensor.bytes.data(), size);
    const void* data = copy.get();
    if (keep) {
      weights_.owned_bytes_ += static_cast<int64_t>(size);
      weights_.copies_.push_back(std::move(copy));
    } else {
      scratch_ = std::move(copy);
    }
    return data;
  }

  absl::Status OutOfMemory(const SafetensorsTensor& tensor) const {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for a copy of tensor '", tensor.name, "', ",
                                                     tensor.bytes.size(), " bytes in the file"));
  }

  absl::Status CheckLeftOver() const {
    for (const auto& [name, stored] : stored_) {
      if (stored.used || IsHarmless(name)) continue;
      for (const std::string_view prefix : family_.weight_prefixes) {
        if (!std::string_view(name).starts_with(prefix)) continue;
        return absl::InvalidArgumentError(
            absl::StrCat(stored.file->path(), ": tensor ", QuoteForMessage(name), " is not part of a ",
                         config_.architecture, " with ", config_.num_layers, " layers, attention_bias ",
                         config_.attention_bias ? "true" : "false", " and mlp_bias ",
                         config_.mlp_bias ? "true" : "false"));
      }
    }
    return absl::OkStatus();
  }

  bool IsHarmless(std::string_view name) const {
    for (const std::string_view ignored : family_.ignored_tensors) {
      if (MatchesTemplate(name, ignored)) return true;
    }
    // A tied model may store its head once more.
    return std::any_of(family_.tensors.begin(), family_.tensors.end(), [&](const TensorRule& rule) {
      return rule.condition == WeightCondition::kUntied && rule.name == name && config_.tie_word_embeddings;
    });
  }

  const std::string& directory_;
  const ModelConfig& config_;
  const Family& family_;
  ModelWeights& weights_;
  std::map<std::string, Stored, std::less<>> stored_;
  std::unique_ptr<std::byte[]> scratch_;
};

LinearWeights* LayerWeights::Linear(WeightRole role) {
  switch (role) {
    case WeightRole::kQProj:
      return &q_proj;
    case WeightRole::kKProj:
      return &k_proj;
    case WeightRole::kVProj:
      return &v_proj;
    case WeightRole::kOProj:
      return &o_proj;
    case WeightRole::kGateProj:
      return &gate_proj;
    case WeightRole::kUpProj:
      return &up_proj;
    case WeightRole::kDownProj:
      return &down_proj;
    default:
      return nullptr;
  }
}

const float** LayerWeights::Norm(WeightRole role) {
  switch (role) {
    case WeightRole::kInputNorm:
      return &input_norm;
    case WeightRole::kQNorm:
      return &q_norm;
    case WeightRole::kKNorm:
      return &k_norm;
    case WeightRole::kPostAttentionNorm:
      return &post_attention_norm;
    default:
      return nullptr;
  }
}

LinearWeights& ModelWeights::Linear(WeightRole role, int64_t layer) {
  if (role == WeightRole::kEmbedding) return embedding_;
  if (role == WeightRole::kLmHead) return lm_head_;
  return *layers_[static_cast<size_t>(layer)].Linear(role);
}

const LinearWeights& ModelWeights::Linear(WeightRole role, int64_t layer) const {
  return const_cast<ModelWeights*>(this)->Linear(role, layer);
}

const float*& ModelWeights::Norm(WeightRole role, int64_t layer) {
  if (role == WeightRole::kFinalNorm) return final_norm_;
  return *layers_[static_cast<size_t>(layer)].Norm(role);
}

const float* ModelWeights::Norm(WeightRole role, int64_t layer) const {
  return const_cast<ModelWeights*>(this)->Norm(role, layer);
}

absl::StatusOr<std::unique_ptr<const ModelWeights>> ModelWeights::Load(const std::string& directory,
                                                                       const ModelConfig& config) {
  LF_ASSIGN_OR_RETURN(const Family* family, FamilyOf(config));
  return Load(directory, config, *family);
}

absl::StatusOr<std::unique_ptr<const ModelWeights>> ModelWeights::Load(const std::string& directory,
                                                                       const ModelConfig& config,
                                                                       const Family& family) {
  std::unique_ptr<ModelWeights> weights(new ModelWeights);
  LF_RETURN_IF_ERROR(WeightLoader(directory, config, family, *weights).Run());
  return std::unique_ptr<const ModelWeights>(std::move(weights));
}

}  // namespace longfill
