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
