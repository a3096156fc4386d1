#include "models/geometry.h"

#include "models/device_weights.h"
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
  } models[] = {{"llama3-8b", 8030261248, 65 * 4096},
                {"llama3-70b", 70553706496, 161 * 8192},
                {"qwen2.5-7b", 7615616512, 57 * 3584}};
  for (const auto& model : models) {
    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, GeometryConfig(model.name));
    EXPECT_EQ(DeviceWeightsBytes(config, DType::kBFloat16), 2 * (model.parameters + model.norm_parameters))
        << model.name;
  }
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
