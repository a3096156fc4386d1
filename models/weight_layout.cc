#include "models/weight_layout.h"

#include "absl/strings/str_cat.h"
#include "models/json_input.h"

namespace longfill {

absl::StatusOr<const Family*> FamilyOf(const ModelConfig& config) {
  const Family* family = FindFamilyByName(config.family);
  if (family != nullptr) return family;
  return absl::UnimplementedError(
      absl::StrCat("model family ", QuoteForMessage(config.family), " is not known"));
}

bool IsNorm(WeightRole role) {
  switch (role) {
    case WeightRole::kFinalNorm:
    case WeightRole::kInputNorm:
    case WeightRole::kQNorm:
    case WeightRole::kKNorm:
    case WeightRole::kPostAttentionNorm:
      return true;
    default:
      return false;
  }
}

RoleShape ShapeOf(WeightRole role, const ModelConfig& config) {
  const int64_t hidden = config.hidden_size;
  switch (role) {
    case WeightRole::kEmbedding:
    case WeightRole::kLmHead:
      return {config.vocab_size, hidden};
    case WeightRole::kFinalNorm:
    case WeightRole::kInputNorm:
    case WeightRole::kPostAttentionNorm:
      return {hidden, 0};
    case WeightRole::kQNorm:
    case WeightRole::kKNorm:
      return {config.head_dim, 0};
    case WeightRole::kQProj:
      return {config.num_q_heads * config.head_dim, hidden};
    case WeightRole::kKProj:
    case WeightRole::kVProj:
      return {config.num_kv_heads * config.head_dim, hidden};
    case WeightRole::kOProj:
      return {hidden, config.num_q_heads * config.head_dim};
    case WeightRole::kGateProj:
    case WeightRole::kUpProj:
      return {config.intermediate_size, hidden};
    case WeightRole::kDownProj:
      return {hidden, config.intermediate_size};
  }
  return {};
}

bool Applies(WeightCondition condition, const ModelConfig& config) {
  switch (condition) {
    case WeightCondition::kAlways:
      return true;
    case WeightCondition::kAttentionBias:
      return config.attention_bias;
    case WeightCondition::kMlpBias:
      return config.mlp_bias;
    case WeightCondition::kUntied:
      return !config.tie_word_embeddings;
  }
  return false;
}

WeightLayout LayOutWeights(const ModelConfig& config, const Family& family, const WeightDTypes& dtypes) {
  WeightLayout layout;
  const auto add = [&](const TensorRule& rule, int64_t layer) {
    for (const WeightRole role : rule.roles) {
      const RoleShape shape = ShapeOf(role, config);
      const bool is_vector = rule.is_bias || IsNorm(role);
      WeightSlot slot = {.rule = &rule, .role = role, .layer = layer};
      slot.count = is_vector ? shape.out_width : shape.out_width * shape.in_width;
      slot.dtype = IsNorm(role) ? DType::kFloat32 : rule.is_bias ? dtypes.biases : dtypes.matrices;
      slot.offset_bytes = layout.size_bytes;
      layout.size_bytes += (slot.size_bytes() + kWeightAlignment - 1) / kWeightAlignment * kWeightAlignment;
      layout.num_parameters += slot.count;
      layout.slots.push_back(slot);
    }
  };
  for (const TensorRule& rule : family.tensors) {
    if (Applies(rule.condition, config) && !IsLayerTemplate(rule.name)) add(rule, 0);
  }
  layout.layers_begin = layout.size_bytes;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    for (const TensorRule& rule : family.tensors) {
      if (Applies(rule.condition, config) && IsLayerTemplate(rule.name)) add(rule, layer);
    }
    if (layer == 0) layout.layer_bytes = layout.size_bytes - layout.layers_begin;
  }
  return layout;
}

}  // namespace longfill
