#include "models/config.h"

#include "models/family.h"
#include "models/json_input.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using Json = nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

absl::StatusOr<ModelConfig> Parse(const Json& json) { return ParseModelConfig(json.dump(), "config.json"); }

Json With(const char* key, Json value) {
  Json json = TinyLlamaConfig();
  json[key] = std::move(value);
  return json;
}

Json Without(const char* key) {
  Json json = TinyLlamaConfig();
  json.erase(key);
  return json;
}

TEST(ModelConfig, ReadsEveryField) {
  Json json = TinyLlamaConfig();
  json["attention_bias"] = true;
  json["mlp_bias"] = true;
  json["tie_word_embeddings"] = true;
  json["hidden_act"] = "gelu_pytorch_tanh";
  json["torch_dtype"] = "bfloat16";
  json["initializer_range"] = 0.015;
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, Parse(json));
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.family, "llama");
  EXPECT_EQ(config.num_layers, 2);
  EXPECT_EQ(config.hidden_size, 12);
  EXPECT_EQ(config.num_q_heads, 4);
  EXPECT_EQ(config.num_kv_heads, 2);
  EXPECT_EQ(config.head_dim, 4);
  EXPECT_EQ(config.intermediate_size, 20);
  EXPECT_EQ(config.vocab_size, 11);
  EXPECT_EQ(config.max_position_embeddings, 256);
  EXPECT_EQ(config.rms_norm_eps, 1e-5);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_TRUE(config.attention_bias);
  EXPECT_TRUE(config.mlp_bias);
  EXPECT_EQ(config.activation, Activation::kGeluTanh);
  EXPECT_EQ(config.dtype, DType::kBFloat16);
  EXPECT_EQ(config.rope.theta, 10000.0);
  EXPECT_EQ(config.rope.rotary_dim, 4);
  EXPECT_EQ(config.rope.form, RotaryForm::kHalfSplit);
  EXPECT_EQ(config.rope.scaling, RopeScaling::kNone);
  EXPECT_EQ(config.initializer_range, 0.015);
}

TEST(ModelConfig, AbsentKeysTakeTheDefaultsOfTransformers) {
  Json json = TinyLlamaConfig();
  for (const char* key : {"num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
                          "tie_word_embeddings", "hidden_act", "torch_dtype", "max_position_embeddings"}) {
    json.erase(key);
  }
  json["num_attention_heads"] = 3;
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, Parse(json));
  EXPECT_EQ(config.num_kv_heads, 3);
  EXPECT_EQ(config.head_dim, 4);
  EXPECT_EQ(config.rms_norm_eps, 1e-6);
  EXPECT_EQ(config.rope.theta, 10000.0);
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_EQ(config.activation, Activation::kSilu);
  EXPECT_EQ(config.dtype, DType::kFloat32);
  EXPECT_EQ(config.max_position_embeddings, 2048);
  EXPECT_EQ(config.initializer_range, 0.02);
}

TEST(ModelConfig, NullIsAbsent) {
  Json json = TinyLlamaConfig();
  for (const char* key : {"num_key_value_heads", "rope_scaling", "sliding_window", "quantization_config"}) {
    json[key] = nullptr;
  }
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, Parse(json));
  EXPECT_EQ(config.num_kv_heads, 4);
}

TEST(ModelConfig, ModelTypeDecidesWithoutArchitectures) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, Parse(Without("architectures")));
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
}

TEST(ModelConfig, BothSpellingsGiveTheSameConfig) {
  const Json scalings[] = {
      Json{{"rope_type", "default"}},
      Json{{"rope_type", "linear"}, {"factor", 4.0}},
      Json{{"rope_type", "llama3"},
           {"factor", 8},
           {"low_freq_factor", 1.0},
           {"high_freq_factor", 4.0},
           {"original_max_position_embeddings", 64}},
      Json{{"rope_type", "yarn"},
           {"factor", 4.0},
           {"original_max_position_embeddings", 64},
           {"beta_fast", 16},
           {"beta_slow", 2},
           {"mscale", 1.0},
           {"mscale_all_dim", 0.7},
           {"truncate", false}},
      Json{{"rope_type", "yarn"}, {"factor", 4.0}, {"attention_factor", 1.5}},
  };
  for (const Json& scaling : scalings) {
    SCOPED_TRACE(scaling.dump());
    Json old_spelling = With("rope_scaling", scaling);
    old_spelling["rope_theta"] = 5e5;

    Json old_type_key = old_spelling;
    old_type_key["rope_scaling"].erase("rope_type");
    old_type_key["rope_scaling"]["type"] = scaling["rope_type"];

    Json new_spelling = Without("rope_theta");
    new_spelling.erase("torch_dtype");
    new_spelling["dtype"] = "float32";
    new_spelling["rope_parameters"] = scaling;
    new_spelling["rope_parameters"]["rope_theta"] = 5e5;

    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig first, Parse(old_spelling));
    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig second, Parse(old_type_key));
    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig third, Parse(new_spelling));
    EXPECT_EQ(first.rope.theta, 5e5);
    EXPECT_TRUE(first.rope == second.rope);
    EXPECT_TRUE(first.rope == third.rope);
    EXPECT_EQ(first.dtype, third.dtype);
  }
}

TEST(ModelConfig, ReadsEveryFieldOfYarn) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config,
                          Parse(With("rope_scaling", {{"rope_type", "yarn"},
                                                      {"factor", 4.0},
                                                      {"original_max_position_embeddings", 64},
                                                      {"beta_fast", 16},
                                                      {"beta_slow", 2},
                                                      {"attention_factor", 1.25},
                                                      {"mscale", 1.5},
                                                      {"mscale_all_dim", 0.5},
                                                      {"truncate", false}})));
  EXPECT_EQ(config.rope.scaling, RopeScaling::kYarn);
  EXPECT_EQ(config.rope.factor, 4.0);
  EXPECT_EQ(config.rope.original_max_position_embeddings, 64);
  EXPECT_EQ(config.rope.beta_fast, 16.0);
  EXPECT_EQ(config.rope.beta_slow, 2.0);
  EXPECT_EQ(config.rope.attention_factor, 1.25);
  EXPECT_EQ(config.rope.mscale, 1.5);
  EXPECT_EQ(config.rope.mscale_all_dim, 0.5);
  EXPECT_FALSE(config.rope.truncate);
}

TEST(ModelConfig, YarnWithoutItsOriginalLengthTakesMaxPositionEmbeddings) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config,
                          Parse(With("rope_scaling", {{"type", "yarn"}, {"factor", 4.0}})));
  EXPECT_EQ(config.rope.original_max_position_embeddings, 256);
}

TEST(ModelConfig, RefusesRopeSpellingsThatContradict) {
  Json json = With("rope_scaling", {{"rope_type", "linear"}, {"factor", 2.0}});
  json["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 4.0}, {"rope_theta", 10000.0}};
  EXPECT_THAT(Parse(json),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("contradicts rope_parameters")));
  json["rope_parameters"]["factor"] = 2.0;
  LF_EXPECT_OK(Parse(json));
}

TEST(ModelConfig, RefusesUnknownArchitectureNamingTheKnownOnes) {
  EXPECT_THAT(Parse(With("architectures", {"MambaForCausalLM"})),
              StatusIs(absl::StatusCode::kUnimplemented,
                       AllOf(HasSubstr("MambaForCausalLM"), HasSubstr("LlamaForCausalLM"),
                             HasSubstr("config.json"))));
  Json json = Without("architectures");
  json["model_type"] = "mamba";
  EXPECT_THAT(Parse(json), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("mamba")));
  EXPECT_THAT(Parse(Json::object()),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("LlamaForCausalLM")));
}

struct Refusal {
  const char* key;
  Json value;
  const char* in_message;
};

TEST(ModelConfig, RefusesUnsupportedFeaturesByNameAndValue) {
  const Refusal refusals[] = {
      {"rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}, "rope_scaling.type is 'dynamic'"},
      {"rope_parameters", {{"rope_type", "proportional"}}, "rope_parameters.rope_type is 'proportional'"},
      {"rope_parameters",
       {{"full_attention", {{"rope_type", "default"}}}},
       "rope_parameters differs between"},
      {"sliding_window", 4096, "sliding_window is 4096: the family llama has no"},
      {"dual_chunk_attention_config",
       {{"chunk_size", 262144}},
       "dual_chunk_attention_config is not supported for llama"},
      {"layer_types", {"full_attention", "sliding_attention"}, "layer_types holds \"sliding_attention\""},
      {"quantization_config", {{"quant_method", "gptq"}}, "gptq"},
      {"hidden_act", "relu", "hidden_act is 'relu'"},
      {"hidden_act", "gelu", "hidden_act is 'gelu'"},
      {"partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"},
      {"num_local_experts", 8, "num_local_experts is 8"},
      {"attn_logit_softcapping", 50.0, "attn_logit_softcapping"},
      {"torch_dtype", "float64", "torch_dtype is 'float64'"},
      {"dtype", "int64", "dtype is 'int64'"},
  };
  for (const Refusal& refusal : refusals) {
    EXPECT_THAT(Parse(With(refusal.key, refusal.value)),
                StatusIs(absl::StatusCode::kUnimplemented, HasSubstr(refusal.in_message)));
  }
}

TEST(ModelConfig, AcceptsFeaturesThatAreSwitchedOff) {
  Json json = TinyLlamaConfig();
  json["sliding_window"] = 4096;
  json["use_sliding_window"] = false;
  json["attention_dropout"] = 0.1;
  json["layer_types"] = {"full_attention", "full_attention"};
  json["partial_rotary_factor"] = 1.0;
  json["pretraining_tp"] = 1;
  LF_EXPECT_OK(Parse(json));
}

TEST(ModelConfig, RefusesBadValuesNamingKeyAndValue) {
  const Refusal refusals[] = {
      {"num_hidden_layers", 0, "num_hidden_layers is 0"},
      {"num_hidden_layers", -3, "num_hidden_layers is -3"},
      {"num_hidden_layers", 100000, "num_hidden_layers is 100000"},
      {"num_hidden_layers", "8", "num_hidden_layers is \"8\""},
      {"num_hidden_layers", 2.0, "num_hidden_layers is 2.0"},
      {"num_hidden_layers", true, "num_hidden_layers is true"},
      {"hidden_size", 0, "hidden_size is 0"},
      {"hidden_size", 18446744073709551615u, "hidden_size is 18446744073709551615"},
      {"hidden_size", int64_t{1} << 40, "hidden_size is 1099511627776"},
      {"num_attention_heads", 0, "num_attention_heads is 0"},
      {"num_key_value_heads", 0, "num_key_value_heads is 0"},
      {"num_key_value_heads", 3, "num_key_value_heads is 3, must divide num_attention_heads 4"},
      {"num_key_value_heads", 8, "num_key_value_heads is 8"},
      {"head_dim", 5, "head_dim is 5, must be even"},
      {"head_dim", 0, "head_dim is 0"},
      {"intermediate_size", -1, "intermediate_size is -1"},
      {"vocab_size", 0, "vocab_size is 0"},
      {"vocab_size", int64_t{1} << 32, "vocab_size is 4294967296"},
      {"max_position_embeddings", 0, "max_position_embeddings is 0"},
      {"rms_norm_eps", 0.0, "rms_norm_eps is 0"},
      {"rms_norm_eps", -1e-5, "rms_norm_eps is -1e-05"},
      {"rms_norm_eps", "small", "rms_norm_eps is \"small\""},
      {"initializer_range", -0.02, "initializer_range is -0.02"},
      {"tie_word_embeddings", 1, "tie_word_embeddings is 1"},
      {"rope_theta", 0.0, "theta 0"},
      {"rope_theta", "x", "rope_theta is \"x\""},
      {"architectures", "LlamaForCausalLM", "architectures is \"LlamaForCausalLM\""},
      {"architectures", {"LlamaForCausalLM", "Other"}, "architectures"},
      {"rope_scaling", {{"rope_type", "linear"}}, "rope_scaling.factor is missing"},
      {"rope_scaling", {{"rope_type", "linear"}, {"factor", 0.5}}, "factor 0.5"},
      {"rope_scaling", {{"rope_type", "linear"}, {"factor", "2"}}, "rope_scaling.factor is \"2\""},
      {"rope_scaling",
       {{"rope_type", "llama3"}, {"factor", 8.0}},
       "original_max_position_embeddings is missing"},
      {"rope_scaling",
       {{"rope_type", "llama3"},
        {"factor", 8.0},
        {"low_freq_factor", 4.0},
        {"high_freq_factor", 4.0},
        {"original_max_position_embeddings", 64}},
       "high_freq_factor 4 must be above low_freq_factor 4"},
      {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 2.0}, {"beta_slow", 0}}, "beta_slow 0"},
      {"rope_scaling", {{"rope_type", "yarn"}, {"factor", 2.0}, {"beta_fast", 0.5}}, "beta_fast 0.5"},
      {"rope_scaling",
       {{"rope_type", "yarn"}, {"factor", 2.0}, {"attention_factor", -1}},
       "attention_factor -1"},
      {"rope_scaling", {{"rope_type", 7}}, "rope_scaling.rope_type is 7"},
      {"rope_scaling", {{"rope_type", "longrope"}}, "rope_scaling.short_factor is missing"},
      {"rope_scaling",
       {{"rope_type", "longrope"}, {"short_factor", {1.0, "2"}}, {"long_factor", {1.0, 2.0}}},
       "rope_scaling.short_factor is [1.0,\"2\"]"},
      {"rope_scaling",
       {{"rope_type", "longrope"}, {"short_factor", {1.0, 2.0}}, {"long_factor", 3}},
       "rope_scaling.long_factor is 3"},
      {"rope_scaling",
       {{"rope_type", "longrope"}, {"short_factor", {1.0, 2.0}}, {"long_factor", {1.0, 2.0, 3.0}}},
       "long_factor has 3 numbers"},
      {"layer_types", {"full_attention"}, "layer_types is [\"full_attention\"], must be a list of 2"},
      {"rope_scaling", "linear", "rope_scaling is \"linear\", must be an object"},
  };
  for (const Refusal& refusal : refusals) {
    EXPECT_THAT(Parse(With(refusal.key, refusal.value)),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("config.json"), HasSubstr(refusal.in_message))))
        << refusal.key << " = " << refusal.value.dump();
  }
  for (const char* key :
       {"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"}) {
    EXPECT_THAT(Parse(Without(key)),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(std::string(key) + " is missing")));
  }
  Json json = Without("head_dim");
  json["num_attention_heads"] = 5;
  json["num_key_value_heads"] = 5;
  EXPECT_THAT(Parse(json), StatusIs(absl::StatusCode::kInvalidArgument,
                                    HasSubstr("head_dim is missing and hidden_size 12")));
}

// TinyLlamaConfig() as another family.
Json TinyOf(const char* architecture, const Json& changes) {
  Json json = With("architectures", {architecture});
  json.update(changes);
  return json;
}

TEST(ModelConfig, MistralHasItsWindowInEveryLayer) {
  LF_ASSERT_OK_AND_ASSIGN(ModelConfig config, Parse(TinyOf("MistralForCausalLM", {{"sliding_window", 64}})));
  EXPECT_EQ(config.layer_windows, (std::vector<int64_t>{64, 64}));
  EXPECT_EQ(config.WindowOf(1), 64);
  LF_ASSERT_OK_AND_ASSIGN(config, Parse(TinyOf("MistralForCausalLM", {{"sliding_window", nullptr}})));
  EXPECT_TRUE(config.layer_windows.empty());
  EXPECT_EQ(config.WindowOf(1), 0);
  // absent keys: as MistralConfig has them
  Json json = TinyOf("MistralForCausalLM", {{"num_attention_heads", 8}});
  json.erase("num_key_value_heads");
  LF_ASSERT_OK_AND_ASSIGN(config, Parse(json));
  EXPECT_EQ(config.layer_windows, (std::vector<int64_t>{4096, 4096}));
  EXPECT_EQ(config.num_kv_heads, 8);
  EXPECT_THAT(Parse(TinyOf("MistralForCausalLM", {{"sliding_window", 0}})),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sliding_window is 0")));
}

TEST(ModelConfig, Qwen2AndQwen3HaveWindowsInUpperLayersWhereTheyAreUsed) {
  for (const char* architecture : {"Qwen2ForCausalLM", "Qwen3ForCausalLM"}) {
    SCOPED_TRACE(architecture);
    Json json = TinyOf(architecture, {{"sliding_window", 64}, {"max_window_layers", 1}});
    LF_ASSERT_OK_AND_ASSIGN(ModelConfig config, Parse(json));
    EXPECT_TRUE(config.layer_windows.empty());  // use_sliding_window is false by default
    json["use_sliding_window"] = true;
    LF_ASSERT_OK_AND_ASSIGN(config, Parse(json));
    EXPECT_EQ(config.layer_windows, (std::vector<int64_t>{0, 64}));
    json["layer_types"] = {"sliding_attention", "full_attention"};
    LF_ASSERT_OK_AND_ASSIGN(config, Parse(json));
    EXPECT_EQ(config.layer_windows, (std::vector<int64_t>{64, 0}));
    json["layer_types"] = {"chunked_attention", "full_attention"};
    EXPECT_THAT(Parse(json), StatusIs(absl::StatusCode::kUnimplemented,
                                      HasSubstr("layer_types holds \"chunked_attention\"")));
    json["layer_types"] = {"sliding_attention", "full_attention"};
    json["use_sliding_window"] = false;
    EXPECT_THAT(Parse(json),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("without a sliding_window in use")));
    json.erase("layer_types");
    json["use_sliding_window"] = true;
    json["max_window_layers"] = 28;
    LF_ASSERT_OK_AND_ASSIGN(config, Parse(json));
    EXPECT_TRUE(config.layer_windows.empty());
  }
}

TEST(ModelConfig, YarnBeyondMaxPositionEmbeddingsTakesLongerPrompts) {
  Json json =
      With("rope_scaling", {{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 256}});
  LF_ASSERT_OK_AND_ASSIGN(ModelConfig config, Parse(json));
  EXPECT_EQ(config.max_position_embeddings, 1024);
  json["max_position_embeddings"] = 2000;
  LF_ASSERT_OK_AND_ASSIGN(config, Parse(json));
  EXPECT_EQ(config.max_position_embeddings, 2000);
  json["rope_scaling"]["factor"] = 1e300;
  LF_ASSERT_OK_AND_ASSIGN(config, Parse(json));
  EXPECT_EQ(config.max_position_embeddings, 1 << 28);
}

TEST(ModelConfig, DualChunkAttentionIsReadAndChecked) {
  Json json = TinyOf(
      "Qwen2ForCausalLM",
      {{"max_position_embeddings", 1010000},
       {"dual_chunk_attention_config",
        {{"chunk_size", 262144}, {"local_size", 8192}, {"original_max_position_embeddings", 262144}}}});
  LF_ASSERT_OK_AND_ASSIGN(ModelConfig config, Parse(json));
  EXPECT_EQ(config.rope.dual_chunk, (DualChunk{262144, 8192}));
  EXPECT_EQ(config.rope.dual_chunk_original_tokens, 262144);
  EXPECT_EQ(config.max_position_embeddings, 1010000);
  json["dual_chunk_attention_config"].erase("original_max_position_embeddings");
  LF_ASSERT_OK_AND_ASSIGN(config, Parse(json));
  EXPECT_EQ(config.rope.dual_chunk_original_tokens, 0);

  const auto expect = [&](const Json& changes, absl::StatusCode code, const char* text) {
    Json broken = json;
    broken.merge_patch(changes);
    EXPECT_THAT(Parse(broken), StatusIs(code, HasSubstr(text)));
  };
  const auto inner = [](const Json& changes) { return Json{{"dual_chunk_attention_config", changes}}; };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  const auto unsupported = absl::StatusCode::kUnimplemented;
  expect(inner({{"local_size", 262144}}), invalid, "dual_chunk_attention_config.local_size is 262144");
  expect(inner({{"local_size", 0}}), invalid, "dual_chunk_attention_config.local_size is 0");
  expect(inner({{"chunk_size", nullptr}}), invalid, "chunk_size is missing");
  expect(inner({{"original_max_position_embeddings", 0}}), invalid, "original_max_position_embeddings is 0");
  expect(inner({{"local_size", 8193}}), unsupported, "253951, supported: multiples of 128");
  expect({{"rope_scaling", {{"type", "linear"}, {"factor", 2.0}}}}, unsupported, "with rope scaling linear");
  expect({{"use_sliding_window", true}, {"sliding_window", 64}, {"max_window_layers", 0}}, unsupported,
         "with a sliding window");
}

TEST(ModelConfig, Phi3TakesLongRopeUnderItsThreeNames) {
  for (const char* name : {"longrope", "su", "yarn"}) {
    Json json = TinyOf(
        "Phi3ForCausalLM",
        {{"original_max_position_embeddings", 64},
         {"rope_scaling", {{"type", name}, {"short_factor", {1.0, 1.5}}, {"long_factor", {2.0, 9.0}}}}});
    LF_ASSERT_OK_AND_ASSIGN(ModelConfig config, Parse(json));
    EXPECT_EQ(config.rope.scaling, RopeScaling::kLongRope);
    EXPECT_EQ(config.rope.original_max_position_embeddings, 64);
    EXPECT_EQ(config.rope.factor, 4.0);  // 256 / 64
    EXPECT_EQ(config.rope.short_factor, (std::vector<double>{1.0, 1.5}));
    EXPECT_EQ(config.rope.long_factor, (std::vector<double>{2.0, 9.0}));
    EXPECT_EQ(config.rope.attention_factor, std::nullopt);
    json["rope_scaling"]["original_max_position_embeddings"] = 128;  // the top level counts
    json["rope_scaling"]["attention_factor"] = 1.25;
    json["rope_scaling"]["factor"] = 3.0;
    LF_ASSERT_OK_AND_ASSIGN(config, Parse(json));
    EXPECT_EQ(config.rope.original_max_position_embeddings, 64);
    EXPECT_EQ(config.rope.factor, 3.0);
    EXPECT_EQ(config.rope.attention_factor, 1.25);
    json.erase("original_max_position_embeddings");  // Phi3Config has 4096
    LF_ASSERT_OK_AND_ASSIGN(config, Parse(json));
    EXPECT_EQ(config.rope.original_max_position_embeddings, 4096);
  }
  EXPECT_THAT(Parse(With("rope_scaling", {{"type", "su"}})),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("rope_scaling.type is 'su'")));
}

TEST(ModelConfig, Qwen3HasItsOwnHeadDim) {
  Json json = With("architectures", {"Qwen3ForCausalLM"});
  json.erase("head_dim");
  LF_ASSERT_OK_AND_ASSIGN(ModelConfig config, Parse(json));
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_FALSE(config.attention_bias);
}

TEST(ModelConfig, GlmRotatesHalfOfAHeadInPairs) {
  Json json = With("architectures", {"GlmForCausalLM"});
  json.erase("rms_norm_eps");
  LF_ASSERT_OK_AND_ASSIGN(ModelConfig config, Parse(json));
  EXPECT_EQ(config.rope.form, RotaryForm::kInterleaved);
  EXPECT_EQ(config.rope.rotary_dim, 2);
  EXPECT_EQ(config.rms_norm_eps, 1.5625e-07);
  EXPECT_TRUE(config.attention_bias);
  json["partial_rotary_factor"] = 1.0;
  LF_ASSERT_OK_AND_ASSIGN(config, Parse(json));
  EXPECT_EQ(config.rope.rotary_dim, 4);
}

TEST(ModelConfig, ChatGlmOfRemoteCodeIsReadInItsOwnSpelling) {
  const Json remote = Json::parse(
      ReadText(std::string(LONGFILL_SOURCE_DIR) + "/tests/golden/data/chatglm-remote-code/config.json"));
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, Parse(remote));
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig native, LoadModelConfig(std::string(LONGFILL_SOURCE_DIR) +
                                                                    "/tests/golden/data/glm-native"));
  EXPECT_EQ(config.family, "chatglm");
  EXPECT_EQ(config.num_layers, native.num_layers);
  EXPECT_EQ(config.num_kv_heads, native.num_kv_heads);
  EXPECT_EQ(config.head_dim, native.head_dim);
  EXPECT_EQ(config.intermediate_size, native.intermediate_size);
  EXPECT_EQ(config.vocab_size, native.vocab_size);
  EXPECT_EQ(config.max_position_embeddings, native.max_position_embeddings);
  EXPECT_EQ(config.rms_norm_eps, native.rms_norm_eps);
  EXPECT_EQ(config.attention_bias, native.attention_bias);
  EXPECT_EQ(config.rope, native.rope);  // rope_ratio 500 is theta 5,000,000
  const std::pair<const char*, bool> refused[] = {{"rmsnorm", false},
                                                  {"post_layer_norm", false},
                                                  {"apply_residual_connection_post_layernorm", true},
                                                  {"add_bias_linear", true},
                                                  {"multi_query_attention", false},
                                                  {"original_rope", false}};
  for (const auto& [key, value] : refused) {
    Json other = remote;
    other[key] = value;
    EXPECT_THAT(Parse(other), StatusIs(absl::StatusCode::kUnimplemented,
                                       AllOf(HasSubstr(std::string(key) + " is "), HasSubstr("chatglm"))));
  }
}

TEST(ModelConfig, RefusesTextThatIsNotAStrictJsonObject) {
  const std::string valid = TinyLlamaConfig().dump();
  const std::pair<std::string, const char*> texts[] = {
      {"", "not valid JSON"},
      {"[]", "not a JSON object"},
      {valid.substr(0, valid.size() / 2), "not valid JSON"},
      {valid + "x", "not valid JSON"},
      {R"({"vocab_size": 1, "vocab_size": 2})", "duplicate key 'vocab_size'"},
      {std::string(100000, '['), "nested deeper than"},
      {"{\"a\": \"\xff\"}", "not valid JSON"},
      {R"({"hidden_size": 1e999})", "not valid JSON"},
  };
  for (const auto& [text, message] : texts) {
    EXPECT_THAT(
        ParseModelConfig(text, "config.json"),
        StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("config.json"), HasSubstr(message))));
  }
}

TEST(ModelConfig, MissingFolderOrOddFileIsNamed) {
  const TempDir dir;
  EXPECT_THAT(LoadModelConfig(dir.File("none")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none/config.json")));
  std::filesystem::create_directory(dir.File("config.json"));
  EXPECT_THAT(LoadModelConfig(dir.path()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not a plain file")));
}

TEST(ModelConfig, ReadsGoldenModels) {
  const std::vector<std::string> folders = GoldenModels();
  if (folders.empty()) GTEST_SKIP() << "tests/golden/data is absent";
  for (const std::string& folder : folders) {
    SCOPED_TRACE(folder);
    LF_EXPECT_OK(LoadModelConfig(folder));
  }
}

TEST(ModelConfig, ReadsNeedle20m) {
  const std::string folder = std::string(LONGFILL_SHARED_DIR) + "/models/needle-20m";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << folder << " is absent";
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(folder));
  EXPECT_EQ(config.num_layers, 8);
  EXPECT_EQ(config.hidden_size, 384);
  EXPECT_EQ(config.num_q_heads, 8);
  EXPECT_EQ(config.num_kv_heads, 2);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.vocab_size, 8192);
  EXPECT_EQ(config.max_position_embeddings, 1 << 20);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_EQ(config.rope.theta, 1e7);
  EXPECT_EQ(config.dtype, DType::kBFloat16);
}

// Every role that a layer cannot do without has a rule in every family.
TEST(Family, TableIsComplete) {
  for (const Family& family : Families()) {
    for (const WeightRole role : {WeightRole::kEmbedding, WeightRole::kFinalNorm, WeightRole::kLmHead,
                                  WeightRole::kInputNorm, WeightRole::kQProj, WeightRole::kKProj,
                                  WeightRole::kVProj, WeightRole::kOProj, WeightRole::kPostAttentionNorm,
                                  WeightRole::kGateProj, WeightRole::kUpProj, WeightRole::kDownProj}) {
      int rules = 0;
      for (const TensorRule& rule : family.tensors) {
        if (!rule.is_bias) rules += static_cast<int>(std::count(rule.roles.begin(), rule.roles.end(), role));
      }
      EXPECT_EQ(rules, 1) << family.name << " role " << static_cast<int>(role);
    }
    EXPECT_EQ(FindFamilyByName(family.name), &family);
    for (const auto architecture : family.architectures) EXPECT_EQ(FindFamily(architecture, ""), &family);
  }
}

TEST(Family, TemplatesMatchNumbersOnly) {
  EXPECT_EQ(TensorName("a.{layer}.b", 17), "a.17.b");
  EXPECT_TRUE(MatchesTemplate("a.17.b", "a.{layer}.b"));
  EXPECT_FALSE(MatchesTemplate("a..b", "a.{layer}.b"));
  EXPECT_FALSE(MatchesTemplate("a.x.b", "a.{layer}.b"));
  EXPECT_FALSE(MatchesTemplate("a.1.c", "a.{layer}.b"));
  EXPECT_FALSE(MatchesTemplate("a.b", "a.{layer}.b"));
  EXPECT_TRUE(MatchesTemplate("a.b", "a.b"));
}

TEST(JsonInput, LimitsTheNumberOfValues) {
  EXPECT_THAT(ParseJson("[1,2,3,4]", "list", {.max_depth = 2, .max_values = 4}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more than 4 values")));
  LF_EXPECT_OK(ParseJson("[1,2,3]", "list", {.max_depth = 2, .max_values = 4}));
}

}  // namespace
}  // namespace longfill
