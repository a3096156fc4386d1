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
  return family;
}

}  // namespace

const std::vector<Family>& Families() {
  static const std::vector<Family> families = {LlamaFamily(), Qwen2Family()};
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
