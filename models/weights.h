#ifndef LONGFILL_MODELS_WEIGHTS_H_
#define LONGFILL_MODELS_WEIGHTS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "models/config.h"
#include "models/safetensors.h"

namespace longfill {

struct Family;
enum class WeightRole : uint8_t;

// One linear layer as Hugging Face stores it. A slice of a fused tensor looks the same: rows are dense.
struct LinearWeights {
  const void* weight = nullptr;  // [out_width, in_width] of dtype, aligned to its element
  DType dtype = DType::kFloat32;
  int64_t out_width = 0;
  int64_t in_width = 0;
  const void* bias = nullptr;  // [out_width] of the compute dtype (fp32 in host memory), or nullptr
};

struct LayerWeights {
  const float* input_norm = nullptr;  // [hidden_size]
  LinearWeights q_proj;               // [num_q_heads * head_dim, hidden_size]
  LinearWeights k_proj;               // [num_kv_heads * head_dim, hidden_size]
  LinearWeights v_proj;
  const float* q_norm = nullptr;  // [head_dim], nullptr where the family has none
  const float* k_norm = nullptr;
  LinearWeights o_proj;                        // [hidden_size, num_q_heads * head_dim]
  const float* post_attention_norm = nullptr;  // [hidden_size]
  LinearWeights gate_proj;                     // [intermediate_size, hidden_size]
  LinearWeights up_proj;
  LinearWeights down_proj;  // [hidden_size, intermediate_size]

  // By role; nullptr where the role is none of these.
  LinearWeights* Linear(WeightRole role);
  const float** Norm(WeightRole role);
};

// All weights of a model. Load gives those of a checkpoint in host memory, which is what a CPU computes with:
// projections and the embedding are views of the mapped files in their stored dtype (copied where the file
// has them unaligned), norms and biases are widened to fp32. device_weights.h makes those of a backend's
// memory: projections, embedding and biases in one dtype, norms in fp32. Where the layers are shared by the
// ranks (sharded_weights.h), they are what belongs to no layer. Immutable, so thread-safe; the pointers live
// as long as this object.
class ModelWeights {
 public:
  // From DIR/model.safetensors, else from the shards that DIR/model.safetensors.index.json names (plain file
  // names inside DIR). Every tensor of the family must be there once, with the shape that the config gives
  // and a dtype of float32, bfloat16 or float16; else InvalidArgument or DataLoss names file and tensor,
  // expected and found. A tensor that the family does not know is refused where it would take part in the
  // model (Family::weight_prefixes), ignored elsewhere.
  static absl::StatusOr<std::unique_ptr<const ModelWeights>> Load(const std::string& directory,
                                                                  const ModelConfig& config);
  // The same by the tensor rules of the family given.
  static absl::StatusOr<std::unique_ptr<const ModelWeights>> Load(const std::string& directory,
                                                                  const ModelConfig& config,
                                                                  const Family& family);

  const LinearWeights& embedding() const { return embedding_; }  // [vocab_size, hidden_size]
  const float* final_norm() const { return final_norm_; }        // [hidden_size]
  const LinearWeights& lm_head() const { return lm_head_; }      // the embedding itself where tied
  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }
  const LayerWeights& layer(int64_t index) const { return layers_[static_cast<size_t>(index)]; }
  // By role; `layer` is not looked at where the role is not one of a layer.
  const LinearWeights& Linear(WeightRole role, int64_t layer) const;
  const float* Norm(WeightRole role, int64_t layer) const;

  int64_t bytes() const { return mapped_bytes_ + owned_bytes_; }
  int64_t mapped_bytes() const { return mapped_bytes_; }  // views of the page cache
  int64_t owned_bytes() const { return owned_bytes_; }    // allocated
  int64_t num_parameters() const { return num_parameters_; }
  const std::vector<std::shared_ptr<const SafetensorsFile>>& files() const {
    return files_;
  }  // sorted by name

 private:
  friend class WeightLoader;
  friend struct WeightAllocator;
  ModelWeights() = default;
  LinearWeights& Linear(WeightRole role, int64_t layer);
  const float*& Norm(WeightRole role, int64_t layer);

  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::vector<std::unique_ptr<float[]>> widened_;
  std::vector<std::unique_ptr<std::byte[]>> copies_;
  Buffer device_;  // all weights of a backend's memory
  LinearWeights embedding_;
  const float* final_norm_ = nullptr;
  LinearWeights lm_head_;
  std::vector<LayerWeights> layers_;
  int64_t mapped_bytes_ = 0;
  int64_t owned_bytes_ = 0;
  int64_t num_parameters_ = 0;
};

}  // namespace longfill

#endif  // LONGFILL_MODELS_WEIGHTS_H_
