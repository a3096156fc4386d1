#ifndef LONGFILL_MODELS_CONFIG_H_
#define LONGFILL_MODELS_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/api/kernel_set.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status.h"

namespace longfill {

struct Family;

inline constexpr int64_t kMaxModelConfigBytes = 16 << 20;  // of a config.json

enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3, kYarn };
std::string_view RopeScalingName(RopeScaling scaling);  // "none", "linear", "llama3", "yarn"

// Rotary embedding as config.json gives it, defaults filled in. Fields of other kinds of scaling keep their
// defaults.
struct RopeConfig {
  double theta = 10000.0;
  RotaryForm form = RotaryForm::kHalfSplit;
  int64_t rotary_dim = 0;  // even, <= head_dim
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;                           // linear, llama3, yarn: >= 1
  int64_t original_max_position_embeddings = 0;  // llama3, yarn
  double low_freq_factor = 1.0;                  // llama3
  double high_freq_factor = 4.0;                 // llama3, > low_freq_factor
  double beta_fast = 32.0;                       // yarn
  double beta_slow = 1.0;                        // yarn
  std::optional<double> attention_factor;        // yarn; absent: from factor, mscale and mscale_all_dim
  std::optional<double> mscale;                  // yarn
  std::optional<double> mscale_all_dim;          // yarn
  bool truncate = true;                          // yarn: correction range rounded to whole dimensions

  bool operator==(const RopeConfig&) const = default;
};

// Facts of a model from its config.json, checked: the bounds on every number (config.cc) are such that the
// bytes of any weight and of the KV cache of max_position_embeddings tokens fit int64.
struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM"
  std::string family;        // name of the entry in models/family.h: "llama"
  int64_t num_layers = 0;
  int64_t hidden_size = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;  // divides num_q_heads
  int64_t head_dim = 0;
  int64_t intermediate_size = 0;
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  bool attention_bias =
      false;  // what the config key says; which tensors follow from it is the family's matter
  bool mlp_bias = false;
  Activation activation = Activation::kSilu;
  DType dtype = DType::kFloat32;  // as config.json says; each tensor's own dtype is in its LinearWeights
  RopeConfig rope;
  double initializer_range = 0.02;  // standard deviation of random weights
};

// Reads DIR/config.json, in the spelling of transformers 4 (rope_theta, rope_scaling, torch_dtype) or 5
// (rope_parameters, dtype). NotFound: no such file; InvalidArgument: bad JSON or a bad value, naming file,
// key and value; Unimplemented: an architecture, RoPE scaling, activation or feature that is not supported,
// by name.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& directory);

// The same from text; `source` names it in messages. A `family` given takes the place of the known ones: the
// text must be of one of its architectures.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json_text, std::string_view source,
                                             const Family* family = nullptr);

}  // namespace longfill

#endif  // LONGFILL_MODELS_CONFIG_H_
