#include "models/geometry.h"

#include <filesystem>
#include <set>
#include <utility>

#include "models/device_weights.h"
#include "models/pattern_directory.h"
#include "models/pattern_file.h"
#include "models/sharded_weights.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(Geometry, Llama3Of8B) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, GeometryConfig("llama3-8b"));
  EXPECT_EQ(config.family, "llama");
  EXPECT_EQ(config.num_layers, 32);
  EXPECT_EQ(config.hidden_size, 4096);
  EXPECT_EQ(config.num_q_heads, 32);
  EXPECT_EQ(config.num_kv_heads, 8);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.intermediate_size, 14336);
  EXPECT_EQ(config.vocab_size, 128256);
  EXPECT_EQ(config.max_position_embeddings, 1048576);
  EXPECT_EQ(config.rope.theta, 3580165449.0);
  EXPECT_EQ(config.rope.rotary_dim, 128);
  EXPECT_EQ(config.rope.scaling, RopeScaling::kNone);
  EXPECT_EQ(config.rms_norm_eps, 1e-5);
  EXPECT_EQ(config.dtype, DType::kBFloat16);
  EXPECT_FALSE(config.tie_word_embeddings);
}

TEST(Geometry, Llama3Of70B) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, GeometryConfig("llama3-70b"));
  EXPECT_EQ(config.num_layers, 80);
  EXPECT_EQ(config.hidden_size, 8192);
  EXPECT_EQ(config.num_q_heads, 64);
  EXPECT_EQ(config.num_kv_heads, 8);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.intermediate_size, 28672);
  EXPECT_EQ(config.max_position_embeddings, 1048576);
}

TEST(Geometry, Qwen25Of7B) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, GeometryConfig("qwen2.5-7b"));
  EXPECT_EQ(config.family, "qwen2");
  EXPECT_EQ(config.num_layers, 28);
  EXPECT_EQ(config.hidden_size, 3584);
  EXPECT_EQ(config.num_q_heads, 28);
  EXPECT_EQ(config.num_kv_heads, 4);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.intermediate_size, 18944);
  EXPECT_EQ(config.vocab_size, 152064);
  EXPECT_EQ(config.max_position_embeddings, 1010000);
  EXPECT_EQ(config.rope.theta, 1e7);
}

// The published numbers of parameters, two bytes each, and the norms' two bytes more; every width is a
// multiple of 128, so that nothing is padded.
TEST(Geometry, WeightsTakeWhatThePublishedModelsDo) {
  const struct {
    const char* name;
    int64_t parameters;
    int64_t norm_parameters;
  } models[] = {{"llama3-8b", 8030261248, 65 * 4096},          {"llama3-70b", 70553706496, 161 * 8192},
                {"qwen2.5-7b", 7615616512, 57 * 3584},         {"llama3.1-8b", 8030261248, 65 * 4096},
                {"llama3.1-70b", 70553706496, 161 * 8192},     {"yi-9b-200k", 8829407232, 97 * 4096},
                {"mistral-7b", 7241732096, 65 * 4096},         {"qwen2-7b", 7615616512, 57 * 3584},
                {"qwen2.5-14b", 14770033664, 97 * 5120},       {"qwen2.5-32b", 32763876352, 129 * 5120},
                {"qwen2.5-72b", 72706203648, 161 * 8192},      {"phi3-mini-128k", 3821079552, 65 * 3072},
                {"qwen3-8b", 8190735360, 73 * 4096 + 72 * 128}};
  for (const auto& model : models) {
    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, GeometryConfig(model.name));
    EXPECT_EQ(DeviceWeightsBytes(config, DType::kBFloat16), 2 * (model.parameters + model.norm_parameters))
        << model.name;
  }
}

// Eight ranks: an eighth of 80 equal layers and two whole ones in place of 80; embedding, LM head and final
// norm everywhere.
TEST(Geometry, ShardedWeightsOfLlama3Of70BFitCardsOf80GB) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, GeometryConfig("llama3-70b"));
  constexpr int64_t kOutside = 2 * 128256LL * 8192 * 2 + 8192 * 4;
  constexpr int64_t kAll = 2 * (70553706496LL + 161 * 8192);
  constexpr int64_t kLayer = (kAll - kOutside) / 80;
  static_assert((kAll - kOutside) % 80 == 0 && kLayer % (8 * 256) == 0);
  EXPECT_EQ(ShardedWeights::PlanBytes(config, {DType::kBFloat16, DType::kBFloat16}, 8),
            kOutside + 80 * kLayer / 8 + 2 * kLayer);
  EXPECT_GT(kAll, int64_t{80} << 30);
  EXPECT_LT(ShardedWeights::PlanBytes(config, {DType::kBFloat16, DType::kBFloat16}, 8), int64_t{25} << 30);
  // One more than divides a layer: shares are whole units, and the last rank's is padded.
  EXPECT_EQ(ShardedWeights::PlanBytes(config, {DType::kBFloat16, DType::kBFloat16}, 7),
            kOutside + (80 + 2 * 7) * ((kLayer / 7 / 256 + 1) * 256));
}

// glm-4-9b-chat is published with 2 groups of keys and 32 numbers of a rotary table that nothing needs.
TEST(Geometry, Glm4Of9B) {
  LF_ASSERT_OK_AND_ASSIGN(ModelConfig config, GeometryConfig("glm4-9b-1m"));
  EXPECT_EQ(config.family, "chatglm");
  EXPECT_EQ(config.num_layers, 40);
  EXPECT_EQ(config.num_kv_heads, 4);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.max_position_embeddings, 1048576);
  EXPECT_EQ(config.rope.theta, 1e8);
  EXPECT_EQ(config.rope.rotary_dim, 64);
  EXPECT_EQ(config.rope.form, RotaryForm::kInterleaved);
  EXPECT_TRUE(config.attention_bias);
  config.num_kv_heads = 2;
  EXPECT_EQ(DeviceWeightsBytes(config, DType::kBFloat16), 2 * (9399951392 - 32 + 81 * 4096));
}

TEST(Geometry, Phi3MiniOf128K) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, GeometryConfig("phi3-mini-128k"));
  EXPECT_EQ(config.family, "phi3");
  EXPECT_EQ(config.head_dim, 96);
  EXPECT_EQ(config.rope.scaling, RopeScaling::kLongRope);
  EXPECT_EQ(config.rope.original_max_position_embeddings, 4096);
  EXPECT_EQ(config.rope.factor, 32.0);
  EXPECT_EQ(config.rope.short_factor.size(), 48u);
  EXPECT_EQ(config.rope.long_factor.back(), 64.81);
  EXPECT_EQ(config.WindowOf(0), 262144);
}

// As their cards say: a config with yarn, whose max_position_embeddings stays at the original length, takes
// 131,072 tokens.
TEST(Geometry, Qwen2WithYarnTakesMorePositionsThanItsConfigNames) {
  for (const char* name : {"qwen2-7b", "qwen2.5-32b", "qwen2.5-72b"}) {
    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, GeometryConfig(name));
    EXPECT_EQ(config.rope.scaling, RopeScaling::kYarn);
    EXPECT_EQ(config.max_position_embeddings, 131072);
    EXPECT_TRUE(config.layer_windows.empty());
  }
}

// Found in the folder by the name of the model, and of its shape. The first file for Llama-3.1-8B, which
// nothing uses any more, is the only one without a model.
TEST(Geometry, EveryPublishedPatternFileIsFoundForItsModel) {
  const std::string folder = std::string(LONGFILL_SHARED_DIR) + "/patterns";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << folder << " is absent (LONGFILL_SHARED_DIR)";
  const std::pair<const char*, const char*> models[] = {
      {"gradientai/Llama-3-8B-Instruct-262k", "llama3-8b"},
      {"gradientai/Llama-3-8B-Instruct-Gradient-1048k", "llama3-8b"},
      {"gradientai/Llama-3-70B-Instruct-Gradient-262k", "llama3-70b"},
      {"gradientai/Llama-3-70B-Instruct-Gradient-1048k", "llama3-70b"},
      {"meta-llama/Meta-Llama-3.1-8B-Instruct", "llama3.1-8b"},
      {"meta-llama/Llama-3.1-8B-Instruct", "llama3.1-8b"},
      {"meta-llama/Llama-3.1-70B-Instruct", "llama3.1-70b"},
      {"01-ai/Yi-9B-200K", "yi-9b-200k"},
      {"microsoft/Phi-3-mini-128k-instruct", "phi3-mini-128k"},
      {"THUDM/glm-4-9b-chat-1m", "glm4-9b-1m"},
      {"Qwen/Qwen2-7B-Instruct", "qwen2-7b"},
      {"Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"},
      {"Qwen/Qwen2.5-32B-Instruct", "qwen2.5-32b"},
      {"Qwen/Qwen2.5-72B-Instruct", "qwen2.5-72b"},
      {"Qwen/Qwen2.5-7B-Instruct-1M", "qwen2.5-7b"},
      {"Qwen/Qwen2.5-14B-Instruct-1M", "qwen2.5-14b"},
  };
  std::set<std::string> found;
  for (const auto& [model, geometry] : models) {
    SCOPED_TRACE(model);
    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, GeometryConfig(geometry));
    LF_ASSERT_OK_AND_ASSIGN(const std::string file, FindPatternFile(folder, ModelNames("/models/x", model)));
    LF_EXPECT_OK(LoadPatternFile(file, config.num_layers, config.num_q_heads).status());
    found.insert(file);
  }
  std::set<std::string> unused;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string path = entry.path().string();
    if (path.ends_with(".json") && !found.contains(path)) unused.insert(entry.path().filename().string());
  }
  EXPECT_EQ(found.size(), 13u);
  EXPECT_EQ(unused, std::set<std::string>{"Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern.json"});
}

TEST(Geometry, AFileIsAConfigJson) {
  const TempDir dir;
  nlohmann::json json = TinyLlamaConfig();
  json["initializer_range"] = 0.5;
  WriteText(dir.File("tiny.json"), json.dump());
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, GeometryConfig(dir.File("tiny.json")));
  EXPECT_EQ(config.hidden_size, 12);
  EXPECT_EQ(config.initializer_range, 0.5);
  json["hidden_size"] = 0;
  WriteText(dir.File("tiny.json"), json.dump());
  EXPECT_THAT(GeometryConfig(dir.File("tiny.json")),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("tiny.json"), HasSubstr("hidden_size is 0"))));
}

TEST(Geometry, AnUnknownNameListsTheKnownOnes) {
  EXPECT_THAT(GeometryConfig("llama4"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("llama4"), HasSubstr("llama3-8b, llama3-70b, qwen2.5-7b"))));
}

}  // namespace
}  // namespace longfill
