#include "models/config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "models/family.h"
#include "models/json_input.h"
#include "models/rope.h"

namespace longfill {
namespace {

using Json = nlohmann::json;

// Bounds. 2 * 4 * kMaxLayers * kMaxHeadWidth * kMaxPositions = 2^61 bytes is the largest fp32 KV cache.
constexpr int64_t kMaxLayers = 1 << 10;
constexpr int64_t kMaxWidth = 1 << 20;  // hidden_size
constexpr int64_t kMaxHeads = 1 << 14;
constexpr int64_t kMaxHeadDim = 1 << 12;
constexpr int64_t kMaxHeadWidth = 1 << 20;  // num_q_heads * head_dim
constexpr int64_t kMaxIntermediate = 1 << 24;
constexpr int64_t kMaxVocab = 1 << 28;
constexpr int64_t kMaxPositions = 1 << 28;

std::string Show(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > 100) text = text.substr(0, 97) + "...";
  return text;
}

// One JSON object with keys read by name, and messages that name file, key and value.
class KeyReader {
 public:
  KeyReader(const Json& object, std::string_view source, std::string prefix, const Family* family)
      : object_(object), source_(source), prefix_(std::move(prefix)), family_(family) {}

  // nullptr where the key is absent or null.
  const Json* Find(std::string_view key) const {
    const auto found = object_.find(std::string(Spelled(key)));
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  // Neither a value nor null.
  bool Absent(std::string_view key) const { return !object_.contains(std::string(Spelled(key))); }

  template <typename... Parts>
  absl::Status Invalid(std::string_view key, const Parts&... parts) const {
    return absl::InvalidArgumentError(
        absl::StrCat(source_, ": ", prefix_, Text(Spelled(key)), " ", parts...));
  }
  template <typename... Parts>
  absl::Status Unsupported(std::string_view key, const Parts&... parts) const {
    return absl::UnimplementedError(absl::StrCat(source_, ": ", prefix_, Text(Spelled(key)), " ", parts...));
  }

  absl::StatusOr<int64_t> Int(std::string_view key, std::optional<int64_t> absent, int64_t least,
                              int64_t most) const {
    const Json* value = Find(key);
    if (value == nullptr) {
      if (absent.has_value()) return *absent;
      return Invalid(key, "is missing");
    }
    const bool fits = value->is_number_integer() &&
                      (!value->is_number_unsigned() ||
                       value->get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
    if (!fits || value->get<int64_t>() < least || value->get<int64_t>() > most) {
      return Invalid(key, "is ", Show(*value), ", must be a whole number from ", least, " to ", most);
    }
    return value->get<int64_t>();
  }

  absl::StatusOr<std::optional<double>> OptionalNumber(std::string_view key) const {
    const Json* value = Find(key);
    if (value == nullptr) return std::optional<double>();
    if (!value->is_number() || !std::isfinite(value->get<double>())) {
      return Invalid(key, "is ", Show(*value), ", must be a number");
    }
    return std::optional<double>(value->get<double>());
  }

  absl::StatusOr<double> Number(std::string_view key, std::optional<double> absent) const {
    LF_ASSIGN_OR_RETURN(std::optional<double> value, OptionalNumber(key));
    if (!value.has_value()) value = absent;
    if (!value.has_value()) return Invalid(key, "is missing");
    return *value;
  }

  absl::StatusOr<bool> Bool(std::string_view key, bool absent) const {
    const Json* value = Find(key);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) return Invalid(key, "is ", Show(*value), ", must be true or false");
    return value->get<bool>();
  }

  absl::StatusOr<std::string> String(std::string_view key, std::string_view absent) const {
    const Json* value = Find(key);
    if (value == nullptr) return std::string(absent);
    if (!value->is_string()) return Invalid(key, "is ", Show(*value), ", must be a string");
    return value->get<std::string>();
  }

 private:
  static absl::string_view Text(std::string_view text) { return {text.data(), text.size()}; }

  std::string_view Spelled(std::string_view key) const {
    if (family_ != nullptr) {
      for (const auto& [usual, own] : family_->renamed_keys) {
        if (usual == key) return own;
      }
    }
    return key;
  }

  const Json& object_;
  const std::string source_;
  const std::string prefix_;
  const Family* family_;
};

absl::StatusOr<std::string> ReadArchitecture(const KeyReader& keys) {
  const Json* list = keys.Find("architectures");
  if (list == nullptr) return std::string();
  if (!list->is_array() || list->size() != 1 || !list->front().is_string()) {
    return keys.Invalid("architectures", "is ", Show(*list), ", must be a list of one name");
  }
  return list->front().get<std::string>();
}

// Features that change the result and that no family here has.
absl::Status RefuseFeatures(const KeyReader& keys) {
  for (const char* key :
       {"quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "compression_config"}) {
    if (const Json* value = keys.Find(key)) return keys.Unsupported(key, "is not supported: ", Show(*value));
  }
  for (const char* key : {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}) {
    const Json* value = keys.Find(key);
    if (value != nullptr && *value != 0 && *value != 1) {
      return keys.Unsupported(key, "is ", Show(*value), ": mixture-of-experts models are not supported");
    }
  }
  return absl::OkStatus();
}

// Values under which a family would be another model than the one that its table entry describes.
absl::Status CheckFixedKeys(const KeyReader& keys, const Family& family) {
  for (const FixedKey& fixed : family.fixed_keys) {
    LF_ASSIGN_OR_RETURN(const bool value, keys.Bool(fixed.key, fixed.absent));
    if (value != fixed.value) {
      return keys.Unsupported(fixed.key, "is ", value ? "true" : "false", ", which is not supported for ",
                              std::string(family.name));
    }
  }
  return absl::OkStatus();
}

// [num_layers] which layers have a window, by layer_types; empty where that key is absent.
absl::StatusOr<std::vector<bool>> ReadLayerTypes(const KeyReader& keys, WindowRule rule, int64_t num_layers) {
  const Json* types = keys.Find("layer_types");
  if (types == nullptr) return std::vector<bool>();
  if (!types->is_array() || static_cast<int64_t>(types->size()) != num_layers) {
    return keys.Invalid("layer_types", "is ", Show(*types), ", must be a list of ", num_layers);
  }
  std::vector<bool> windowed;
  for (const Json& type : *types) {
    const bool window = type == "sliding_attention" && rule == WindowRule::kUpperLayers;
    if (!window && type != "full_attention") {
      return keys.Unsupported("layer_types", "holds ", Show(type), ", supported: full_attention",
                              rule == WindowRule::kUpperLayers ? ", sliding_attention" : "");
    }
    windowed.push_back(window);
  }
  return windowed;
}

// Where each layer has a window, as the family says; empty for none.
absl::StatusOr<std::vector<int64_t>> ReadWindows(const KeyReader& keys, const Family& family,
                                                 int64_t num_layers) {
  const WindowRule rule = family.window_rule;
  LF_ASSIGN_OR_RETURN(std::vector<bool> windowed, ReadLayerTypes(keys, rule, num_layers));
  const Json* value = keys.Find("sliding_window");
  LF_ASSIGN_OR_RETURN(const bool use, keys.Bool("use_sliding_window", rule != WindowRule::kUpperLayers));
  const bool absent = keys.Absent("sliding_window") && family.default_sliding_window.has_value();
  const bool has_window = (value != nullptr || absent) && (use || rule == WindowRule::kAllLayers);
  if (rule == WindowRule::kNone && has_window) {
    return keys.Unsupported("sliding_window", "is ", Show(*value), ": the family ", std::string(family.name),
                            " has no sliding-window attention");
  }
  if (!has_window) {
    if (std::find(windowed.begin(), windowed.end(), true) != windowed.end()) {
      return keys.Invalid("layer_types", "holds \"sliding_attention\" without a sliding_window in use");
    }
    return std::vector<int64_t>();
  }
  LF_ASSIGN_OR_RETURN(const int64_t window,
                      keys.Int("sliding_window", family.default_sliding_window, 1, kMaxPositions));
  if (rule == WindowRule::kAllLayers) windowed.assign(static_cast<size_t>(num_layers), true);
  if (windowed.empty()) {
    LF_ASSIGN_OR_RETURN(const int64_t first, keys.Int("max_window_layers", family.default_max_window_layers,
                                                      0, std::numeric_limits<int32_t>::max()));
    for (int64_t layer = 0; layer < num_layers; ++layer) windowed.push_back(layer >= first);
  }
  std::vector<int64_t> windows;
  windows.reserve(windowed.size());
  for (const bool has : windowed) windows.push_back(has ? window : 0);
  if (std::all_of(windows.begin(), windows.end(), [](int64_t w) { return w == 0; })) windows.clear();
  return windows;
}

// Dual chunk attention as vLLM and SGLang read it; parallel/dual_chunk.h says what it is. Keys of their
// sparse attention are of patterns, which come from elsewhere here. On top of `config`, whose rope and
// windows are known.
absl::Status ReadDualChunk(const KeyReader& keys, std::string_view source, const Family& family,
                           ModelConfig& config) {
  constexpr std::string_view kKey = "dual_chunk_attention_config";
  const Json* object = keys.Find(kKey);
  if (object == nullptr) return absl::OkStatus();
  if (!family.dual_chunk_attention) {
    return keys.Unsupported(kKey, "is not supported for ", std::string(family.name), ": ", Show(*object));
  }
  if (!object->is_object()) return keys.Invalid(kKey, "is ", Show(*object), ", must be an object");
  if (config.rope.scaling != RopeScaling::kNone) {
    return keys.Unsupported(kKey, "is not supported with rope scaling ",
                            std::string(RopeScalingName(config.rope.scaling)));
  }
  if (!config.layer_windows.empty()) {
    return keys.Unsupported(kKey, "is not supported with a sliding window in use");
  }
  const KeyReader inner(*object, source, "dual_chunk_attention_config.", nullptr);
  DualChunk& chunk = config.rope.dual_chunk;
  LF_ASSIGN_OR_RETURN(chunk.chunk_size, inner.Int("chunk_size", std::nullopt, 2, kMaxPositions));
  LF_ASSIGN_OR_RETURN(chunk.local_size, inner.Int("local_size", std::nullopt, 1, chunk.chunk_size - 1));
  if (chunk.chunk_len() % kTokenBlock != 0) {
    return inner.Unsupported("chunk_size", "less local_size is ", chunk.chunk_len(),
                             ", supported: multiples of ", kTokenBlock);
  }
  LF_ASSIGN_OR_RETURN(config.rope.dual_chunk_original_tokens,
                      inner.Int("original_max_position_embeddings", 0, 1, kMaxPositions));
  return absl::OkStatus();
}

absl::StatusOr<Activation> ReadActivation(const KeyReader& keys) {
  LF_ASSIGN_OR_RETURN(const std::string name, keys.String("hidden_act", "silu"));
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  return keys.Unsupported("hidden_act", "is ", QuoteForMessage(name), ", supported: silu, gelu_pytorch_tanh");
}

absl::StatusOr<DType> ReadDType(const KeyReader& keys) {
  const char* key = keys.Find("dtype") != nullptr ? "dtype" : "torch_dtype";
  LF_ASSIGN_OR_RETURN(const std::string name, keys.String(key, "float32"));
  const absl::StatusOr<DType> dtype = ParseDType(name);
  if (!dtype.ok() || !IsFloat(*dtype)) {
    return keys.Unsupported(key, "is ", QuoteForMessage(name), ", supported: float32, bfloat16, float16");
  }
  return *dtype;
}

absl::Status ReadLlama3(const KeyReader& keys, RopeConfig& rope) {
  LF_ASSIGN_OR_RETURN(rope.original_max_position_embeddings,
                      keys.Int("original_max_position_embeddings", std::nullopt, 1, kMaxPositions));
  LF_ASSIGN_OR_RETURN(rope.low_freq_factor, keys.Number("low_freq_factor", std::nullopt));
  LF_ASSIGN_OR_RETURN(rope.high_freq_factor, keys.Number("high_freq_factor", std::nullopt));
  return absl::OkStatus();
}

absl::Status ReadYarn(const KeyReader& keys, int64_t max_position_embeddings, RopeConfig& rope) {
  LF_ASSIGN_OR_RETURN(
      rope.original_max_position_embeddings,
      keys.Int("original_max_position_embeddings", max_position_embeddings, 1, kMaxPositions));
  LF_ASSIGN_OR_RETURN(rope.beta_fast, keys.Number("beta_fast", rope.beta_fast));
  LF_ASSIGN_OR_RETURN(rope.beta_slow, keys.Number("beta_slow", rope.beta_slow));
  LF_ASSIGN_OR_RETURN(rope.attention_factor, keys.OptionalNumber("attention_factor"));
  LF_ASSIGN_OR_RETURN(rope.mscale, keys.OptionalNumber("mscale"));
  LF_ASSIGN_OR_RETURN(rope.mscale_all_dim, keys.OptionalNumber("mscale_all_dim"));
  LF_ASSIGN_OR_RETURN(rope.truncate, keys.Bool("truncate", true));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<double>> ReadFactors(const KeyReader& keys, std::string_view key) {
  const Json* list = keys.Find(key);
  if (list == nullptr) return keys.Invalid(key, "is missing");
  std::vector<double> factors;
  if (list->is_array()) {
    for (const Json& factor : *list) {
      if (factor.is_number()) factors.push_back(factor.get<double>());
    }
  }
  if (factors.empty() || factors.size() != list->size()) {
    return keys.Invalid(key, "is ", Show(*list), ", must be a list of numbers");
  }
  return factors;
}

absl::Status ReadLongRope(const KeyReader& keys, int64_t max_position_embeddings, RopeConfig& rope) {
  LF_ASSIGN_OR_RETURN(
      rope.original_max_position_embeddings,
      keys.Int("original_max_position_embeddings", max_position_embeddings, 1, kMaxPositions));
  LF_ASSIGN_OR_RETURN(rope.attention_factor, keys.OptionalNumber("attention_factor"));
  LF_ASSIGN_OR_RETURN(rope.short_factor, ReadFactors(keys, "short_factor"));
  LF_ASSIGN_OR_RETURN(rope.long_factor, ReadFactors(keys, "long_factor"));
  return absl::OkStatus();
}

// One rope_scaling or rope_parameters object on top of `rope`, which holds theta, the rotary dimensions and
// the original length if config.json has that at its top level, which then counts.
absl::Status ReadRopeObject(const KeyReader& keys, const Family& family, int64_t max_position_embeddings,
                            RopeConfig& rope) {
  const int64_t given_original = std::exchange(rope.original_max_position_embeddings, 0);
  const char* kind_key = keys.Find("rope_type") != nullptr ? "rope_type" : "type";
  LF_ASSIGN_OR_RETURN(std::string kind, keys.String(kind_key, "default"));
  for (const auto& [alias, usual] : family.rope_type_aliases) {
    if (kind == alias) kind = std::string(usual);
  }
  LF_ASSIGN_OR_RETURN(rope.theta, keys.Number("rope_theta", rope.theta));
  if (kind == "default") return absl::OkStatus();
  std::optional<double> default_factor;
  if (kind == "linear") {
    rope.scaling = RopeScaling::kLinear;
  } else if (kind == "llama3") {
    rope.scaling = RopeScaling::kLlama3;
    LF_RETURN_IF_ERROR(ReadLlama3(keys, rope));
  } else if (kind == "yarn") {
    rope.scaling = RopeScaling::kYarn;
    LF_RETURN_IF_ERROR(ReadYarn(keys, max_position_embeddings, rope));
  } else if (kind == "longrope") {
    rope.scaling = RopeScaling::kLongRope;
    LF_RETURN_IF_ERROR(ReadLongRope(keys, max_position_embeddings, rope));
  } else {
    return keys.Unsupported(kind_key, "is ", QuoteForMessage(kind),
                            ", supported: default, linear, llama3, yarn, longrope");
  }
  if (rope.scaling != RopeScaling::kLinear && given_original > 0) {
    rope.original_max_position_embeddings = given_original;
  }
  if (rope.scaling == RopeScaling::kLongRope) {
    default_factor = static_cast<double>(max_position_embeddings) /
                     static_cast<double>(rope.original_max_position_embeddings);
  }
  LF_ASSIGN_OR_RETURN(rope.factor, keys.Number("factor", default_factor));
  return absl::OkStatus();
}

absl::StatusOr<RopeConfig> ReadRope(const KeyReader& keys, std::string_view source, const Family& family,
                                    const ModelConfig& config) {
  RopeConfig base;
  base.form = family.rotary_form;
  LF_ASSIGN_OR_RETURN(base.theta, keys.Number("rope_theta", base.theta));
  if (!family.theta_factor_key.empty()) {
    LF_ASSIGN_OR_RETURN(const double factor, keys.Number(family.theta_factor_key, 1.0));
    base.theta *= factor;
  }
  LF_ASSIGN_OR_RETURN(double fraction, keys.Number("partial_rotary_factor", family.default_rotary_fraction));

  std::optional<RopeConfig> rope;
  std::string rope_key;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const Json* object = keys.Find(key);
    if (object == nullptr) continue;
    if (!object->is_object()) return keys.Invalid(key, "is ", Show(*object), ", must be an object");
    if (object->contains("full_attention")) {
      return keys.Unsupported(key,
                              "differs between kinds of layers, which is not supported: ", Show(*object));
    }
    const KeyReader inner(*object, source, absl::StrCat(key, "."), nullptr);
    RopeConfig read = base;
    LF_ASSIGN_OR_RETURN(read.original_max_position_embeddings,
                        keys.Int("original_max_position_embeddings",
                                 family.default_original_max_position_embeddings, 0, kMaxPositions));
    LF_RETURN_IF_ERROR(ReadRopeObject(inner, family, config.max_position_embeddings, read));
    LF_ASSIGN_OR_RETURN(fraction, inner.Number("partial_rotary_factor", fraction));
    if (rope.has_value() && !(*rope == read)) {
      return keys.Invalid(key, "contradicts ", rope_key, ": ", Show(*object));
    }
    rope = read;
    rope_key = key;
  }
  if (!rope.has_value()) rope = base;

  if (fraction != 1.0 && !family.partial_rotary) {
    return keys.Unsupported("partial_rotary_factor", "is ", fraction, ": the family ",
                            std::string(family.name), " rotates all of head_dim");
  }
  if (!(fraction > 0.0 && fraction <= 1.0)) {
    return keys.Invalid("partial_rotary_factor", "is ", fraction, ", must be above 0 and at most 1");
  }
  rope->rotary_dim = static_cast<int64_t>(static_cast<double>(config.head_dim) * fraction);
  const absl::StatusOr<RotaryTable> table = BuildRotaryTable(*rope, 0);  // checks the ranges of all fields
  if (!table.ok()) return Annotate(table.status(), source);
  return *rope;
}

// Published configs that ask for yarn often leave max_position_embeddings at the original length.
int64_t YarnLength(const RopeConfig& rope) {
  if (rope.scaling != RopeScaling::kYarn) return 0;
  const double length = rope.factor * static_cast<double>(rope.original_max_position_embeddings);
  return static_cast<int64_t>(std::min(length, static_cast<double>(kMaxPositions)));
}

absl::Status ReadShape(const KeyReader& keys, const Family& family, ModelConfig& config) {
  LF_ASSIGN_OR_RETURN(config.num_layers, keys.Int("num_hidden_layers", std::nullopt, 1, kMaxLayers));
  LF_ASSIGN_OR_RETURN(config.hidden_size, keys.Int("hidden_size", std::nullopt, 1, kMaxWidth));
  LF_ASSIGN_OR_RETURN(config.num_q_heads, keys.Int("num_attention_heads", std::nullopt, 1, kMaxHeads));
  const bool default_kv_heads = family.default_num_kv_heads > 0 && keys.Absent("num_key_value_heads");
  LF_ASSIGN_OR_RETURN(
      config.num_kv_heads,
      keys.Int("num_key_value_heads", default_kv_heads ? family.default_num_kv_heads : config.num_q_heads, 1,
               config.num_q_heads));
  if (config.num_q_heads % config.num_kv_heads != 0) {
    return keys.Invalid("num_key_value_heads", "is ", config.num_kv_heads,
                        ", must divide num_attention_heads ", config.num_q_heads);
  }
  if (family.default_head_dim == 0 && keys.Find("head_dim") == nullptr &&
      config.hidden_size % config.num_q_heads != 0) {
    return keys.Invalid("head_dim", "is missing and hidden_size ", config.hidden_size,
                        " is no multiple of num_attention_heads ", config.num_q_heads);
  }
  LF_ASSIGN_OR_RETURN(config.head_dim,
                      keys.Int("head_dim",
                               family.default_head_dim > 0 ? family.default_head_dim
                                                           : config.hidden_size / config.num_q_heads,
                               2, kMaxHeadDim));
  if (config.head_dim < 2 || config.head_dim % 2 != 0) {
    return keys.Invalid("head_dim", "is ", config.head_dim, ", must be even and positive");
  }
  if (config.num_q_heads * config.head_dim > kMaxHeadWidth) {
    return keys.Invalid("num_attention_heads", "times head_dim is ", config.num_q_heads * config.head_dim,
                        ", must be at most ", kMaxHeadWidth);
  }
  LF_ASSIGN_OR_RETURN(config.intermediate_size,
                      keys.Int("intermediate_size", std::nullopt, 1, kMaxIntermediate));
  LF_ASSIGN_OR_RETURN(config.vocab_size, keys.Int("vocab_size", std::nullopt, 1, kMaxVocab));
  LF_ASSIGN_OR_RETURN(
      config.max_position_embeddings,
      keys.Int("max_position_embeddings", family.default_max_position_embeddings, 1, kMaxPositions));
  return absl::OkStatus();
}

}  // namespace

std::string_view RopeScalingName(RopeScaling scaling) {
  switch (scaling) {
    case RopeScaling::kNone:
      return "none";
    case RopeScaling::kLinear:
      return "linear";
    case RopeScaling::kLlama3:
      return "llama3";
    case RopeScaling::kYarn:
      return "yarn";
    case RopeScaling::kLongRope:
      return "longrope";
  }
  return "unknown";
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json_text, std::string_view source,
                                             const Family* family) {
  LF_ASSIGN_OR_RETURN(const Json json, ParseJson(json_text, source));
  const std::string file(source);
  if (!json.is_object()) return absl::InvalidArgumentError(absl::StrCat(file, ": is not a JSON object"));
  const KeyReader any_family(json, source, "", nullptr);
  LF_ASSIGN_OR_RETURN(const std::string architecture, ReadArchitecture(any_family));
  LF_ASSIGN_OR_RETURN(const std::string model_type, any_family.String("model_type", ""));
  if (family == nullptr) {
    family = FindFamily(architecture, model_type);
  } else if (!family->Matches(architecture, model_type)) {
    family = nullptr;
  }
  if (family == nullptr) {
    return absl::UnimplementedError(absl::StrCat(file, ": architecture ", QuoteForMessage(architecture),
                                                 " (model_type ", QuoteForMessage(model_type),
                                                 ") is not supported, known: ", KnownArchitectures()));
  }

  const KeyReader keys(json, source, "", family);
  ModelConfig config;
  config.architecture = architecture.empty() ? std::string(family->architectures.front()) : architecture;
  config.family = std::string(family->name);
  LF_ASSIGN_OR_RETURN(config.name_or_path, keys.String("_name_or_path", ""));
  LF_RETURN_IF_ERROR(RefuseFeatures(keys));
  LF_RETURN_IF_ERROR(CheckFixedKeys(keys, *family));
  LF_RETURN_IF_ERROR(ReadShape(keys, *family, config));
  LF_ASSIGN_OR_RETURN(config.layer_windows, ReadWindows(keys, *family, config.num_layers));
  LF_ASSIGN_OR_RETURN(config.rms_norm_eps, keys.Number("rms_norm_eps", family->default_rms_norm_eps));
  if (!(config.rms_norm_eps > 0 && config.rms_norm_eps < 1)) {
    return keys.Invalid("rms_norm_eps", "is ", config.rms_norm_eps, ", must be above 0 and below 1");
  }
  LF_ASSIGN_OR_RETURN(config.initializer_range, keys.Number("initializer_range", config.initializer_range));
  if (config.initializer_range < 0) {
    return keys.Invalid("initializer_range", "is ", config.initializer_range, ", must not be below 0");
  }
  LF_ASSIGN_OR_RETURN(config.tie_word_embeddings,
                      keys.Bool("tie_word_embeddings", family->default_tie_word_embeddings));
  LF_ASSIGN_OR_RETURN(config.attention_bias, keys.Bool("attention_bias", family->default_attention_bias));
  LF_ASSIGN_OR_RETURN(config.mlp_bias, keys.Bool("mlp_bias", false));
  LF_ASSIGN_OR_RETURN(config.activation, ReadActivation(keys));
  LF_ASSIGN_OR_RETURN(config.dtype, ReadDType(keys));
  LF_ASSIGN_OR_RETURN(config.rope, ReadRope(keys, source, *family, config));
  config.max_position_embeddings = std::max(config.max_position_embeddings, YarnLength(config.rope));
  LF_RETURN_IF_ERROR(ReadDualChunk(keys, source, *family, config));
  return config;
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& directory) {
  const std::string path = directory + "/config.json";
  LF_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMaxModelConfigBytes));
  return ParseModelConfig(text, path);
}

}  // namespace longfill
