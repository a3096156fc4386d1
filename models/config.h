#ifndef LONGFILL_MODELS_CONFIG_H_
#define LONGFILL_MODELS_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/api/kernel_set.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status.h"
#include "parallel/dual_chunk.h"

namespace longfill {

struct Family;

inline constexpr int64_t kMaxModelConfigBytes = 16 << 20;  // of a config.json

enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3, kYarn, kLongRope };
std::string_view RopeScalingName(RopeScaling scaling);  // "none", "linear", "llama3", "yarn", "longrope"

// Rotary embedding as config.json gives it, defaults filled in. Fields of other kinds of scaling keep their
// defaults.
struct RopeConfig {
  double theta = 10000.0;
  RotaryForm form = RotaryForm::kHalfSplit;
  int64_t rotary_dim = 0;  // even, <= head_dim
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;                           // linear, llama3, yarn: >= 1; longrope: above 0
  int64_t original_max_position_embeddings = 0;  // llama3, yarn, longrope
  double low_freq_factor = 1.0;                  // llama3
  double high_freq_factor = 4.0;                 // llama3, > low_freq_factor
  double beta_fast = 32.0;                       // yarn
  double beta_slow = 1.0;                        // yarn
  // yarn, longrope; absent: from factor and mscale and mscale_all_dim, or the original length
  std::optional<double> attention_factor;
  std::optional<double> mscale;          // yarn
  std::optional<double> mscale_all_dim;  // yarn
  bool truncate = true;                  // yarn: correction range rounded to whole dimensions
  // longrope: [rotary_dim / 2] divisors of the frequencies, of prompts of up to
  // original_max_position_embeddings tokens and of longer ones
  std::vector<double> short_factor;
  std::vector<double> long_factor;

  DualChunk dual_chunk;  // without scaling alone
  // Prompts of more tokens multiply rotated queries and keys by 0.1 ln(tokens / this) + 1; 0: none does.
  int64_t dual_chunk_original_tokens = 0;

  bool operator==(const RopeConfig&) const = default;
};

// Facts of a model from its config.json, checked: the bounds on every number (config.cc) are such that the
// bytes of any weight and of the KV cache of max_position_embeddings tokens fit int64.
struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM"
  std::string family;        // name of the entry in models/family.h: "llama"
  std::string name_or_path;  // _name_or_path of config.json, may be empty
  int64_t num_layers = 0;
  int64_t hidden_size = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;  // divides num_q_heads
  int64_t head_dim = 0;
  int64_t intermediate_size = 0;
  int64_t vocab_size = 0;
  int64_t max_position_embeddings = 0;  // longest prompt; with yarn at least factor times the original length
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  bool attention_bias =
      false;  // what the config key says; which tensors follow from it is the family's matter
  bool mlp_bias = false;
  Activation activation = Activation::kSilu;
  DType dtype = DType::kFloat32;  // as config.json says; each tensor's own dtype is in its LinearWeights
  RopeConfig rope;
  // [num_layers] keys that a query of the layer sees, its own included (distances below it); 0: all before
  // it. Empty: no layer has a window.
  std::vector<int64_t> layer_windows;
  double initializer_range = 0.02;  // standard deviation of random weights

  int64_t WindowOf(int64_t layer) const {
    return layer_windows.empty() ? 0 : layer_windows[static_cast<size_t>(layer)];
  }
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
