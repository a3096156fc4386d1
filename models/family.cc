#include "models/family.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace longfill {
namespace {

constexpr std::string_view kLayer = "{layer}";

Family LlamaFamily() {
  using Role = WeightRole;
  using When = WeightCondition;
  Family family;
  family.name = "llama";
  family.architectures = {"LlamaForCausalLM"};
  family.model_types = {"llama"};
  family.tensors = {
      {"model.embed_tokens.weight", {Role::kEmbedding}},
      {"model.norm.weight", {Role::kFinalNorm}},
      {"lm_head.weight", {Role::kLmHead}, false, When::kUntied},
      {"model.layers.{layer}.input_layernorm.weight", {Role::kInputNorm}},
      {"model.layers.{layer}.self_attn.q_proj.weight", {Role::kQProj}},
      {"model.layers.{layer}.self_attn.k_proj.weight", {Role::kKProj}},
      {"model.layers.{layer}.self_attn.v_proj.weight", {Role::kVProj}},
      {"model.layers.{layer}.self_attn.o_proj.weight", {Role::kOProj}},
      {"model.layers.{layer}.self_attn.q_proj.bias", {Role::kQProj}, true, When::kAttentionBias},
      {"model.layers.{layer}.self_attn.k_proj.bias", {Role::kKProj}, true, When::kAttentionBias},
      {"model.layers.{layer}.self_attn.v_proj.bias", {Role::kVProj}, true, When::kAttentionBias},
      {"model.layers.{layer}.self_attn.o_proj.bias", {Role::kOProj}, true, When::kAttentionBias},
      {"model.layers.{layer}.post_attention_layernorm.weight", {Role::kPostAttentionNorm}},
      {"model.layers.{layer}.mlp.gate_proj.weight", {Role::kGateProj}},
      {"model.layers.{layer}.mlp.up_proj.weight", {Role::kUpProj}},
      {"model.layers.{layer}.mlp.down_proj.weight", {Role::kDownProj}},
      {"model.layers.{layer}.mlp.gate_proj.bias", {Role::kGateProj}, true, When::kMlpBias},
      {"model.layers.{layer}.mlp.up_proj.bias", {Role::kUpProj}, true, When::kMlpBias},
      {"model.layers.{layer}.mlp.down_proj.bias", {Role::kDownProj}, true, When::kMlpBias},
  };
  family.ignored_tensors = {
      "model.layers.{layer}.self_attn.rotary_emb.inv_freq",  // written by transformers before 4.32
      "model.rotary_emb.inv_freq",
  };
  family.weight_prefixes = {"model.", "lm_head."};
  return family;
}

// Qwen2 and Qwen2.5: Llama with biases of Q, K and V whatever the config says, and none elsewhere.
Family Qwen2Family() {
  Family family = LlamaFamily();
  family.name = "qwen2";
  family.architectures = {"Qwen2ForCausalLM"};
  family.model_types = {"qwen2"};
  std::erase_if(family.tensors, [](const TensorRule& rule) {
    return rule.condition == WeightCondition::kMlpBias ||
           (rule.is_bias && rule.roles.front() == WeightRole::kOProj);
  });
  for (TensorRule& rule : family.tensors) {
    if (rule.condition == WeightCondition::kAttentionBias) rule.condition = WeightCondition::kAlways;
  }
  family.default_max_position_embeddings = 32768;
  family.default_num_kv_heads = 32;
  family.window_rule = WindowRule::kUpperLayers;
  family.default_sliding_window = 4096;
  family.dual_chunk_attention = true;
  return family;
}

void EraseBiases(Family& family) {
  std::erase_if(family.tensors, [](const TensorRule& rule) { return rule.is_bias; });
}

// Mistral: Llama without biases, every layer with a sliding window.
Family MistralFamily() {
  Family family = LlamaFamily();
  family.name = "mistral";
  family.architectures = {"MistralForCausalLM"};
  family.model_types = {"mistral"};
  EraseBiases(family);
  family.default_max_position_embeddings = 131072;
  family.default_num_kv_heads = 8;
  family.window_rule = WindowRule::kAllLayers;
  family.default_sliding_window = 4096;
  return family;
}

// Puts `fused` in place of the matrices that it holds.
void Fuse(Family& family, TensorRule fused) {
  std::erase_if(family.tensors, [&](const TensorRule& rule) {
    return !rule.is_bias &&
           std::find(fused.roles.begin(), fused.roles.end(), rule.roles.front()) != fused.roles.end();
  });
  family.tensors.push_back(std::move(fused));
}

constexpr std::string_view kFusedMlp = "model.layers.{layer}.mlp.gate_up_proj.weight";

// Phi-3 (mini and medium, and Phi-4): fused projections, LongRoPE under three names, a window that usually is
// longer than its prompts.
Family Phi3Family() {
  using Role = WeightRole;
  Family family = LlamaFamily();
  family.name = "phi3";
  family.architectures = {"Phi3ForCausalLM"};
  family.model_types = {"phi3"};
  EraseBiases(family);
  Fuse(family,
       {"model.layers.{layer}.self_attn.qkv_proj.weight", {Role::kQProj, Role::kKProj, Role::kVProj}});
  Fuse(family, {kFusedMlp, {Role::kGateProj, Role::kUpProj}});
  family.partial_rotary = true;
  family.default_rms_norm_eps = 1e-5;
  family.default_max_position_embeddings = 4096;
  family.window_rule = WindowRule::kAllLayers;
  family.rope_type_aliases = {{"su", "longrope"}, {"yarn", "longrope"}};
  family.default_original_max_position_embeddings = 4096;
  return family;
}

// Qwen3, dense: Qwen2 with norms of each query and key head before the rotary embedding, and with biases
// where the config says so.
Family Qwen3Family() {
  Family family = LlamaFamily();
  family.name = "qwen3";
  family.architectures = {"Qwen3ForCausalLM"};
  family.model_types = {"qwen3"};
  std::erase_if(family.tensors,
                [](const TensorRule& rule) { return rule.condition == WeightCondition::kMlpBias; });
  family.tensors.push_back({"model.layers.{layer}.self_attn.q_norm.weight", {WeightRole::kQNorm}});
  family.tensors.push_back({"model.layers.{layer}.self_attn.k_norm.weight", {WeightRole::kKNorm}});
  family.default_max_position_embeddings = 32768;
  family.default_num_kv_heads = 32;
  family.default_head_dim = 128;
  family.window_rule = WindowRule::kUpperLayers;
  family.default_sliding_window = 4096;
  return family;
}

// GLM-4 (glm-4-9b) as transformers has it: the first half of each head is rotated, in interleaved pairs.
Family GlmFamily() {
  using Role = WeightRole;
  Family family = LlamaFamily();
  family.name = "glm";
  family.architectures = {"GlmForCausalLM"};
  family.model_types = {"glm"};
  std::erase_if(family.tensors, [](const TensorRule& rule) {
    return rule.condition == WeightCondition::kMlpBias ||
           (rule.is_bias && rule.roles.front() == Role::kOProj);
  });
  Fuse(family, {kFusedMlp, {Role::kGateProj, Role::kUpProj}});
  family.rotary_form = RotaryForm::kInterleaved;
  family.partial_rotary = true;
  family.default_rotary_fraction = 0.5;
  family.default_rms_norm_eps = 1.5625e-07;
  family.default_max_position_embeddings = 131072;
  family.default_num_kv_heads = 2;
  family.default_head_dim = 128;
  family.default_attention_bias = true;
  return family;
}

// The same models, and ChatGLM3, in the form of their own (remote) code. rope_ratio multiplies theta there;
// ChatGLM2-6B-32K, whose code divides positions by it and whose config does not tell, is not this family.
Family ChatGlmFamily() {
  using Role = WeightRole;
  using When = WeightCondition;
  Family family;
  family.name = "chatglm";
  family.architectures = {"ChatGLMModel", "ChatGLMForConditionalGeneration"};
  family.model_types = {"chatglm"};
  family.tensors = {
      {"transformer.embedding.word_embeddings.weight", {Role::kEmbedding}},
      {"transformer.encoder.final_layernorm.weight", {Role::kFinalNorm}},
      {"transformer.output_layer.weight", {Role::kLmHead}, false, When::kUntied},
      {"transformer.encoder.layers.{layer}.input_layernorm.weight", {Role::kInputNorm}},
      {"transformer.encoder.layers.{layer}.self_attention.query_key_value.weight",
       {Role::kQProj, Role::kKProj, Role::kVProj}},
      {"transformer.encoder.layers.{layer}.self_attention.query_key_value.bias",
       {Role::kQProj, Role::kKProj, Role::kVProj},
       true,
       When::kAttentionBias},
      {"transformer.encoder.layers.{layer}.self_attention.dense.weight", {Role::kOProj}},
      {"transformer.encoder.layers.{layer}.post_attention_layernorm.weight", {Role::kPostAttentionNorm}},
      {"transformer.encoder.layers.{layer}.mlp.dense_h_to_4h.weight", {Role::kGateProj, Role::kUpProj}},
      {"transformer.encoder.layers.{layer}.mlp.dense_4h_to_h.weight", {Role::kDownProj}},
  };
  family.ignored_tensors = {"transformer.rotary_pos_emb.inv_freq"};
  family.weight_prefixes = {"transformer."};
  family.renamed_keys = {
      {"num_hidden_layers", "num_layers"},   {"num_key_value_heads", "multi_query_group_num"},
      {"head_dim", "kv_channels"},           {"intermediate_size", "ffn_hidden_size"},
      {"vocab_size", "padded_vocab_size"},   {"max_position_embeddings", "seq_length"},
      {"rms_norm_eps", "layernorm_epsilon"}, {"attention_bias", "add_qkv_bias"}};
  family.fixed_keys = {{.key = "rmsnorm", .value = true, .absent = true},
                       {.key = "post_layer_norm", .value = true, .absent = true},
                       {.key = "apply_residual_connection_post_layernorm", .value = false, .absent = false},
                       {.key = "add_bias_linear", .value = false, .absent = false},
                       {.key = "multi_query_attention", .value = true, .absent = false},
                       {.key = "original_rope", .value = true, .absent = true}};
  family.rotary_form = RotaryForm::kInterleaved;
  family.partial_rotary = true;
  family.default_rotary_fraction = 0.5;
  family.theta_factor_key = "rope_ratio";
  family.default_rms_norm_eps = 1e-5;
  family.default_num_kv_heads = 1;
  family.default_head_dim = 128;
  return family;
}

}  // namespace

const std::vector<Family>& Families() {
  static const std::vector<Family> families = {LlamaFamily(), Qwen2Family(), MistralFamily(), Phi3Family(),
                                               Qwen3Family(), GlmFamily(),   ChatGlmFamily()};
  return families;
}

bool Family::Matches(std::string_view architecture, std::string_view model_type) const {
  const auto& known = architecture.empty() ? model_types : architectures;
  return std::find(known.begin(), known.end(), architecture.empty() ? model_type : architecture) !=
         known.end();
}

const Family* FindFamily(std::string_view architecture, std::string_view model_type) {
  for (const Family& family : Families()) {
    if (family.Matches(architecture, model_type)) return &family;
  }
  return nullptr;
}

const Family* FindFamilyByName(std::string_view name) {
  for (const Family& family : Families()) {
    if (family.name == name) return &family;
  }
  return nullptr;
}

std::string KnownArchitectures() {
  std::vector<std::string> names;
  for (const Family& family : Families()) {
    names.insert(names.end(), family.architectures.begin(), family.architectures.end());
  }
  return absl::StrJoin(names, ", ");
}

bool IsLayerTemplate(std::string_view name_template) {
  return name_template.find(kLayer) != std::string_view::npos;
}

std::string TensorName(std::string_view name_template, int64_t layer) {
  std::string name(name_template);
  const size_t place = name.find(kLayer);
  if (place != std::string::npos) name.replace(place, kLayer.size(), absl::StrCat(layer));
  return name;
}

bool MatchesTemplate(std::string_view name, std::string_view name_template) {
  const size_t place = name_template.find(kLayer);
  if (place == std::string_view::npos) return name == name_template;
  const std::string_view head = name_template.substr(0, place);
  const std::string_view tail = name_template.substr(place + kLayer.size());
  if (name.size() <= head.size() + tail.size() || !name.starts_with(head) || !name.ends_with(tail))
    return false;
  const std::string_view layer = name.substr(head.size(), name.size() - head.size() - tail.size());
  return std::all_of(layer.begin(), layer.end(), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace longfill
