#include "models/geometry.h"

#include <string_view>

#include "absl/strings/str_cat.h"
#include "models/json_input.h"

namespace longfill {
namespace {

struct Geometry {
  std::string_view name;
  std::string_view config;  // what the published config.json says of the shapes
};

constexpr Geometry kGeometries[] = {
    {"llama3-8b", R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
      "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 1048576, "rms_norm_eps": 1e-05,
      "rope_theta": 3580165449.0, "tie_word_embeddings": false, "attention_bias": false, "initializer_range": 0.02})"},
    {"llama3-70b", R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
      "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 1048576, "rms_norm_eps": 1e-05,
      "rope_theta": 3580165449.0, "tie_word_embeddings": false, "attention_bias": false, "initializer_range": 0.02})"},
    {"qwen2.5-7b", R"({
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
      "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 1010000, "rms_norm_eps": 1e-05,
      "rope_theta": 10000000.0, "tie_word_embeddings": false, "use_sliding_window": false,
      "initializer_range": 0.02})"},
    {"llama3.1-8b", R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
      "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
      "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "tie_word_embeddings": false})"},
    {"llama3.1-70b", R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
      "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
      "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "tie_word_embeddings": false})"},
    {"yi-9b-200k", R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 48, "num_attention_heads": 32,
      "num_key_value_heads": 4, "vocab_size": 64000, "max_position_embeddings": 262144, "rms_norm_eps": 1e-06,
      "rope_theta": 10000000.0, "rope_scaling": null, "tie_word_embeddings": false})"},
    {"mistral-7b", R"({
      "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
      "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
      "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false})"},
    {"qwen2-7b", R"({
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
      "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
      "rope_theta": 1000000.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
      "tie_word_embeddings": false, "sliding_window": 131072, "use_sliding_window": false, "max_window_layers": 28})"},
    {"qwen2.5-14b", R"({
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
      "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 1010000, "rms_norm_eps": 1e-05,
      "rope_theta": 10000000.0, "tie_word_embeddings": false, "use_sliding_window": false})"},
    {"qwen2.5-32b", R"({
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
      "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
      "rope_theta": 1000000.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
      "tie_word_embeddings": false, "sliding_window": 131072, "use_sliding_window": false, "max_window_layers": 70})"},
    {"qwen2.5-72b", R"({
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
      "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
      "rope_theta": 1000000.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
      "tie_word_embeddings": false, "sliding_window": 131072, "use_sliding_window": false, "max_window_layers": 70})"},
    {"phi3-mini-128k", R"({
      "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
      "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 131072,
      "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
      "rope_scaling": {"type": "longrope",
        "short_factor": [
          1.05, 1.05, 1.05, 1.1, 1.1, 1.1, 1.25, 1.25, 1.4, 1.45, 1.55, 1.85, 1.9, 2.0, 2.0, 2.0, 2.0,
          2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.1, 2.1,
          2.2, 2.35, 2.35, 2.35, 2.35, 2.4, 2.4, 2.65, 2.7, 2.9, 2.95, 3.05, 3.05, 3.05],
        "long_factor": [
          1.03, 1.05, 1.05, 1.08, 1.23, 1.23, 1.3, 1.45, 1.6, 1.65, 1.9, 2.86, 3.69, 5.42, 5.49, 5.49,
          9.09, 11.58, 15.66, 15.77, 15.79, 18.36, 21.99, 23.08, 30.01, 32.35, 32.59, 35.56,
          39.95, 53.84, 56.2, 57.95, 59.29, 59.77, 59.92, 61.19, 61.96, 62.5, 63.37, 63.48,
          63.48, 63.66, 63.85, 64.08, 64.76, 64.8, 64.81, 64.81]},
      "sliding_window": 262144, "tie_word_embeddings": false, "attention_bias": false})"},
    {"qwen3-8b", R"({
      "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "torch_dtype": "bfloat16",
      "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
      "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
      "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_scaling": null, "tie_word_embeddings": false,
      "attention_bias": false, "sliding_window": null, "use_sliding_window": false, "max_window_layers": 36})"},
    {"glm4-9b-1m", R"({
      "architectures": ["ChatGLMModel"], "model_type": "chatglm", "torch_dtype": "bfloat16", "num_layers": 40,
      "hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32, "kv_channels": 128,
      "multi_query_attention": true, "multi_query_group_num": 4, "padded_vocab_size": 151552, "seq_length": 1048576,
      "layernorm_epsilon": 1.5625e-07, "rmsnorm": true, "post_layer_norm": true, "add_bias_linear": false,
      "add_qkv_bias": true, "apply_residual_connection_post_layernorm": false, "original_rope": true,
      "rope_ratio": 10000, "tie_word_embeddings": false})"},
};

}  // namespace

std::string GeometryNames() {
  std::string names;
  for (const Geometry& geometry : kGeometries) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", std::string(geometry.name));
  }
  return names;
}

absl::StatusOr<ModelConfig> GeometryConfig(const std::string& name_or_file) {
  for (const Geometry& geometry : kGeometries) {
    if (geometry.name == name_or_file) return ParseModelConfig(geometry.config, geometry.name);
  }
  const absl::StatusOr<std::string> text = ReadSmallFile(name_or_file, kMaxModelConfigBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::InvalidArgumentError(absl::StrCat("geometry ", QuoteForMessage(name_or_file), " is none of ",
                                                   GeometryNames(), ", nor the path of a config.json"));
  }
  LF_RETURN_IF_ERROR(text.status());
  return ParseModelConfig(*text, name_or_file);
}

}  // namespace longfill
