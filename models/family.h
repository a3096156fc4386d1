#ifndef LONGFILL_MODELS_FAMILY_H_
#define LONGFILL_MODELS_FAMILY_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/api/kernel_set.h"

namespace longfill {

// What a tensor is for. The loader derives each role's shape from the config alone.
enum class WeightRole : uint8_t {
  kEmbedding,          // [vocab_size, hidden_size]
  kFinalNorm,          // [hidden_size]
  kLmHead,             // [vocab_size, hidden_size]
  kInputNorm,          // [hidden_size], one a layer from here on
  kQProj,              // [num_q_heads * head_dim, hidden_size]
  kKProj,              // [num_kv_heads * head_dim, hidden_size]
  kVProj,              // [num_kv_heads * head_dim, hidden_size]
  kQNorm,              // [head_dim]
  kKNorm,              // [head_dim]
  kOProj,              // [hidden_size, num_q_heads * head_dim]
  kPostAttentionNorm,  // [hidden_size]
  kGateProj,           // [intermediate_size, hidden_size]
  kUpProj,             // [intermediate_size, hidden_size]
  kDownProj,           // [hidden_size, intermediate_size]
};
inline constexpr int kNumWeightRoles = 14;

enum class WeightCondition : uint8_t {
  kAlways,
  kAttentionBias,  // config key attention_bias is true
  kMlpBias,        // config key mlp_bias is true
  kUntied,         // tie_word_embeddings is false
};

// One stored tensor. Several roles in one rule: their rows follow one another in that order (Phi-3's qkv_proj
// is {kQProj, kKProj, kVProj}), and the loader hands out row slices.
struct TensorRule {
  std::string_view name;  // "{layer}" stands for the layer number
  std::vector<WeightRole> roles;
  bool is_bias = false;  // a vector of the roles' output widths
  WeightCondition condition = WeightCondition::kAlways;
};

// Which layers see only a window of keys where config.json has a sliding_window.
enum class WindowRule : uint8_t {
  kNone,  // the family has no windows; a config that asks for one is refused
  kAllLayers,
  // Those of layer_types; without that key those from max_window_layers on. None of them unless
  // use_sliding_window is true.
  kUpperLayers,
};

// A key of config.json that would change the model if it had another value than the one supported.
struct FixedKey {
  std::string_view key;
  bool value = false;
  bool absent = false;  // what the family takes where the key is absent
};

// A model family as data. Adding one is adding an entry to the table in family.cc; see models/README.md.
struct Family {
  std::string_view name;
  std::vector<std::string_view> architectures;
  std::vector<std::string_view> model_types;  // decides where config.json has no architectures
  std::vector<TensorRule> tensors;
  std::vector<std::string_view> ignored_tensors;  // templates of stored tensors that nothing needs
  std::vector<std::string_view>
      weight_prefixes;  // any other tensor under one of these is refused: it would count
  // Config keys that the family spells differently: {usual key, its key}.
  std::vector<std::pair<std::string_view, std::string_view>> renamed_keys;
  RotaryForm rotary_form = RotaryForm::kHalfSplit;
  bool partial_rotary = false;  // partial_rotary_factor other than 1 is meaningful
  double default_rotary_fraction = 1.0;
  double default_rms_norm_eps = 1e-6;
  int64_t default_max_position_embeddings = 2048;
  int64_t default_num_kv_heads = 0;  // 0: one for each query head
  int64_t default_head_dim = 0;      // 0: hidden_size / num_attention_heads
  bool default_attention_bias = false;
  bool default_tie_word_embeddings = false;
  std::vector<FixedKey> fixed_keys;

  WindowRule window_rule = WindowRule::kNone;
  std::optional<int64_t> default_sliding_window;
  int64_t default_max_window_layers = 28;  // kUpperLayers

  bool dual_chunk_attention = false;  // dual_chunk_attention_config is meaningful

  // RoPE: other names of kinds of scaling, {name, usual name}; the original length that stands in for an
  // absent top-level key (0: none does); a key whose value multiplies theta (empty: none does).
  std::vector<std::pair<std::string_view, std::string_view>> rope_type_aliases;
  int64_t default_original_max_position_embeddings = 0;
  std::string_view theta_factor_key;

  // Whether the architecture, or the model_type where that is empty, is one of these.
  bool Matches(std::string_view architecture, std::string_view model_type) const;
};

const std::vector<Family>& Families();

// By config.json's architecture (may be empty) and model_type; nullptr: unknown.
const Family* FindFamily(std::string_view architecture, std::string_view model_type);
const Family* FindFamilyByName(std::string_view name);

std::string KnownArchitectures();  // "LlamaForCausalLM, ...", for messages

bool IsLayerTemplate(std::string_view name_template);  // has "{layer}"
// The template with "{layer}" replaced.
std::string TensorName(std::string_view name_template, int64_t layer);
// Whether the name is the template with some number for "{layer}".
bool MatchesTemplate(std::string_view name, std::string_view name_template);

}  // namespace longfill

#endif  // LONGFILL_MODELS_FAMILY_H_
