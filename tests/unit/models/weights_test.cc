#include "models/weights.h"

#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "models/family.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using Json = nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

// A model folder with TinyLlamaConfig() and its tensors, to be bent before Load().
struct TinyModel {
  TempDir dir;
  Json config = TinyLlamaConfig();
  std::vector<TestTensor> tensors = TinyLlamaTensors();
  int padding = 0;

  TestTensor& Tensor(const std::string& name) {
    for (TestTensor& tensor : tensors) {
      if (tensor.name == name) return tensor;
    }
    ADD_FAILURE() << name;
    return tensors.front();
  }
  void Remove(const std::string& name) {
    std::erase_if(tensors, [&](const TestTensor& tensor) { return tensor.name == name; });
  }
  absl::StatusOr<std::unique_ptr<const ModelWeights>> Load() {
    WriteText(dir.File("model.safetensors"), SafetensorsOf(tensors, padding));
    return LoadStored();
  }
  absl::StatusOr<std::unique_ptr<const ModelWeights>> LoadStored() {
    LF_ASSIGN_OR_RETURN(const ModelConfig parsed, ParseModelConfig(config.dump(), "config.json"));
    return ModelWeights::Load(dir.path(), parsed);
  }
  // Splits the tensors into two files by `first` and writes the index.
  Json Shard(const std::set<std::string>& first) {
    std::vector<TestTensor> parts[2];
    Json index;
    for (const TestTensor& tensor : tensors) {
      const int part = first.contains(tensor.name) ? 0 : 1;
      parts[part].push_back(tensor);
      index["weight_map"][tensor.name] = part == 0 ? "first.safetensors" : "second.safetensors";
    }
    WriteText(dir.File("first.safetensors"), SafetensorsOf(parts[0]));
    WriteText(dir.File("second.safetensors"), SafetensorsOf(parts[1]));
    WriteIndex(index);
    return index;
  }
  void WriteIndex(const Json& index) { WriteText(dir.File("model.safetensors.index.json"), index.dump()); }
};

void ExpectLinear(const LinearWeights& linear, int64_t out_width, int64_t in_width, DType dtype, bool bias) {
  EXPECT_NE(linear.weight, nullptr);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(linear.weight) % static_cast<uintptr_t>(DTypeBytes(dtype)), 0u);
  EXPECT_EQ(linear.out_width, out_width);
  EXPECT_EQ(linear.in_width, in_width);
  EXPECT_EQ(linear.dtype, dtype);
  EXPECT_EQ(linear.bias != nullptr, bias);
}

bool Inside(const void* pointer, const ModelWeights& weights) {
  for (const auto& file : weights.files()) {
    const auto mapping = file->mapping();
    if (pointer >= mapping.data() && pointer < mapping.data() + mapping.size()) return true;
  }
  return false;
}

TEST(ModelWeights, ExposesEveryTensorInItsStoredDType) {
  for (const auto& [name, dtype] : {std::pair("F32", DType::kFloat32), std::pair("BF16", DType::kBFloat16),
                                    std::pair("F16", DType::kFloat16)}) {
    SCOPED_TRACE(name);
    TinyModel model;
    model.tensors = TinyLlamaTensors(name);
    LF_ASSERT_OK_AND_ASSIGN(const auto weights, model.Load());
    ExpectLinear(weights->embedding(), 11, 12, dtype, false);
    ExpectLinear(weights->lm_head(), 11, 12, dtype, false);
    EXPECT_NE(weights->lm_head().weight, weights->embedding().weight);
    EXPECT_NE(weights->final_norm(), nullptr);
    ASSERT_EQ(weights->num_layers(), 2);
    int64_t parameters = 2 * 11 * 12 + 12;
    for (int64_t layer = 0; layer < 2; ++layer) {
      const LayerWeights& w = weights->layer(layer);
      ExpectLinear(w.q_proj, 16, 12, dtype, false);
      ExpectLinear(w.k_proj, 8, 12, dtype, false);
      ExpectLinear(w.v_proj, 8, 12, dtype, false);
      ExpectLinear(w.o_proj, 12, 16, dtype, false);
      ExpectLinear(w.gate_proj, 20, 12, dtype, false);
      ExpectLinear(w.up_proj, 20, 12, dtype, false);
      ExpectLinear(w.down_proj, 12, 20, dtype, false);
      EXPECT_NE(w.input_norm, nullptr);
      EXPECT_NE(w.post_attention_norm, nullptr);
      EXPECT_EQ(w.q_norm, nullptr);
      EXPECT_EQ(w.k_norm, nullptr);
      parameters += 12 * (16 + 8 + 8 + 16 + 20 + 20 + 20) + 2 * 12;
    }
    EXPECT_EQ(weights->num_parameters(), parameters);
    const int64_t vectors = 5 * 12;
    EXPECT_EQ(weights->owned_bytes(), vectors * 4);
    EXPECT_EQ(weights->mapped_bytes(), (parameters - vectors) * DTypeBytes(dtype));
    EXPECT_EQ(weights->bytes(), weights->owned_bytes() + weights->mapped_bytes());
  }
}

TEST(ModelWeights, MatricesAreViewsAndNormsAreWidened) {
  TinyModel model;
  model.tensors = TinyLlamaTensors("BF16");
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, model.Load());
  const SafetensorsTensor* q = weights->files()[0]->Find("model.layers.1.self_attn.q_proj.weight");
  EXPECT_EQ(weights->layer(1).q_proj.weight, q->bytes.data());
  const SafetensorsTensor* norm = weights->files()[0]->Find("model.layers.1.input_layernorm.weight");
  for (size_t i = 0; i < 12; ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, norm->bytes.data() + 2 * i, 2);
    EXPECT_EQ(weights->layer(1).input_norm[i], BFloat16ToFloat(bits));
  }
}

TEST(ModelWeights, UnalignedTensorsAreCopiedAndCounted) {
  TinyModel model;
  LF_ASSERT_OK_AND_ASSIGN(const auto aligned_size, model.Load());
  for (int padding = 0; padding < 4; ++padding) {
    model.padding = padding;
    LF_ASSERT_OK_AND_ASSIGN(const auto weights, model.Load());
    const SafetensorsTensor* q = weights->files()[0]->Find("model.layers.0.self_attn.q_proj.weight");
    const bool aligned = q->file_offset % 4 == 0;
    ExpectLinear(weights->layer(0).q_proj, 16, 12, DType::kFloat32, false);
    EXPECT_EQ(Inside(weights->layer(0).q_proj.weight, *weights), aligned);
    EXPECT_EQ(std::memcmp(weights->layer(0).q_proj.weight, q->bytes.data(), q->bytes.size()), 0);
    EXPECT_EQ(weights->mapped_bytes() == 0, !aligned);
    EXPECT_EQ(weights->bytes(), aligned_size->bytes());
    float norm = 0;
    std::memcpy(&norm, weights->files()[0]->Find("model.norm.weight")->bytes.data(), 4);
    EXPECT_EQ(weights->final_norm()[0], norm);
  }
}

TEST(ModelWeights, TiedModelsUseTheEmbeddingAsHead) {
  TinyModel model;
  model.config["tie_word_embeddings"] = true;
  LF_ASSERT_OK_AND_ASSIGN(const auto with_copy, model.Load());
  EXPECT_EQ(with_copy->lm_head().weight, with_copy->embedding().weight);
  model.Remove("lm_head.weight");
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, model.Load());
  EXPECT_EQ(weights->lm_head().weight, weights->embedding().weight);
  EXPECT_EQ(weights->bytes(), with_copy->bytes());
}

TEST(ModelWeights, BiasesAreLoadedWhereTheConfigSaysSo) {
  TinyModel model;
  model.config["attention_bias"] = true;
  model.config["mlp_bias"] = true;
  const std::pair<const char*, int64_t> biases[] = {
      {"self_attn.q_proj", 16}, {"self_attn.k_proj", 8}, {"self_attn.v_proj", 8}, {"self_attn.o_proj", 12},
      {"mlp.gate_proj", 20},    {"mlp.up_proj", 20},     {"mlp.down_proj", 12}};
  for (const char* layer : {"0", "1"}) {
    for (const auto& [name, width] : biases) {
      model.tensors.push_back({std::string("model.layers.") + layer + "." + name + ".bias", "F16", {width}});
    }
  }
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, model.Load());
  const LayerWeights& w = weights->layer(1);
  for (const LinearWeights* linear :
       {&w.q_proj, &w.k_proj, &w.v_proj, &w.o_proj, &w.gate_proj, &w.up_proj, &w.down_proj}) {
    ASSERT_NE(linear->bias, nullptr);
    EXPECT_TRUE(std::isfinite(static_cast<const float*>(linear->bias)[linear->out_width - 1]));
  }
  model.Remove("model.layers.1.mlp.up_proj.bias");
  EXPECT_THAT(model.Load(), StatusIs(absl::StatusCode::kInvalidArgument,
                                     HasSubstr("'model.layers.1.mlp.up_proj.bias' is missing")));
}

TEST(ModelWeights, MissingTensorsAreNamed) {
  for (const TestTensor& tensor : TinyLlamaTensors()) {
    TinyModel model;
    model.Remove(tensor.name);
    EXPECT_THAT(model.Load(),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("'" + tensor.name + "' is missing"), HasSubstr(model.dir.path()))));
  }
}

TEST(ModelWeights, MisshapenTensorsAreNamedWithExpectedAndFound) {
  for (const TestTensor& tensor : TinyLlamaTensors()) {
    TinyModel model;
    ++model.Tensor(tensor.name).shape.back();
    EXPECT_THAT(model.Load(),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("'" + tensor.name + "' has shape ["),
                               HasSubstr("config.json makes it"), HasSubstr("model.safetensors"))));
  }
  TinyModel model;
  model.Tensor("model.layers.1.self_attn.k_proj.weight").shape = {12, 8};
  EXPECT_THAT(model.Load(), StatusIs(absl::StatusCode::kInvalidArgument,
                                     HasSubstr("[12, 8], config.json makes it [8, 12]")));
  model.Tensor("model.layers.1.self_attn.k_proj.weight").shape = {96};
  EXPECT_THAT(model.Load(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("[96], config.json makes it [8, 12]")));
}

TEST(ModelWeights, UnexpectedDTypesAreNamed) {
  for (const char* name : {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}) {
    TinyModel model;
    model.Tensor(name).dtype = "F64";
    EXPECT_THAT(
        model.Load(),
        StatusIs(absl::StatusCode::kInvalidArgument,
                 AllOf(HasSubstr(std::string("'") + name + "' has dtype F64, expected F32, BF16 or F16"),
                       HasSubstr("model.safetensors"))));
  }
}

TEST(ModelWeights, TruncatedFilesAreNamed) {
  TinyModel model;
  LF_ASSERT_OK(model.Load());
  const std::string bytes = ReadText(model.dir.File("model.safetensors"));
  for (const size_t size : {bytes.size() - 1, bytes.size() / 2, size_t{100}, size_t{7}, size_t{0}}) {
    WriteText(model.dir.File("model.safetensors"), bytes.substr(0, size));
    EXPECT_THAT(model.LoadStored(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("model.safetensors")))
        << size;
  }
}

TEST(ModelWeights, TensorsOutsideTheFamilyAreRefusedWhereTheyWouldCount) {
  for (const char* name :
       {"model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.experts.0.w1.weight", "lm_head.bias"}) {
    TinyModel model;
    model.tensors.push_back({name, "F32", {16}});
    EXPECT_THAT(model.Load(),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr(name), HasSubstr("is not part of a LlamaForCausalLM"))));
  }
  TinyModel model;
  model.tensors.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {2}});
  model.tensors.push_back({"value_head.weight", "F64", {3}});
  LF_EXPECT_OK(model.Load());
}

TEST(ModelWeights, ShardsGiveWhatOneFileGives) {
  TinyModel model;
  model.Shard({"model.norm.weight", "model.layers.0.self_attn.q_proj.weight"});
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, model.LoadStored());
  EXPECT_EQ(weights->files().size(), 2u);
  ExpectLinear(weights->layer(0).q_proj, 16, 12, DType::kFloat32, false);
  LF_ASSERT_OK_AND_ASSIGN(const auto whole, model.Load());
  EXPECT_EQ(weights->bytes(), whole->bytes());
  EXPECT_EQ(weights->num_parameters(), whole->num_parameters());
}

TEST(ModelWeights, ATensorInTwoShardsIsRefused) {
  TinyModel model;
  model.Shard({"model.norm.weight"});
  WriteText(model.dir.File("first.safetensors"),
            SafetensorsOf({{"model.norm.weight", "F32", {12}}, {"lm_head.weight", "F32", {11, 12}}}));
  EXPECT_THAT(model.LoadStored(),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("'lm_head.weight' is stored twice"), HasSubstr("first.safetensors"),
                             HasSubstr("second.safetensors"))));
}

TEST(ModelWeights, AnIndexThatIsWrongIsRefused) {
  TinyModel model;
  const Json good = model.Shard({"model.norm.weight"});

  Json index = good;
  index["weight_map"]["model.norm.weight"] = "second.safetensors";
  model.WriteIndex(index);
  EXPECT_THAT(model.LoadStored(), StatusIs(absl::StatusCode::kInvalidArgument,
                                           AllOf(HasSubstr("'model.norm.weight' is missing in"),
                                                 HasSubstr("second.safetensors"))));

  index = good;
  index["weight_map"]["model.norm.weight"] = "third.safetensors";
  model.WriteIndex(index);
  EXPECT_THAT(model.LoadStored(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("third.safetensors")));

  for (const Json& name :
       {Json("../first.safetensors"), Json("/etc/passwd"), Json(".."), Json("."), Json(""), Json(3),
        Json("sub/first.safetensors"), Json(std::string("a\0b", 3)), Json("a\\b")}) {
    index = good;
    index["weight_map"]["model.norm.weight"] = name;
    model.WriteIndex(index);
    EXPECT_THAT(model.LoadStored(),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("no plain name"), HasSubstr("model.safetensors.index.json"))))
        << name;
  }
  for (const Json& bad :
       {Json::object(), Json::array(), Json{{"weight_map", Json::object()}}, Json{{"weight_map", 1}}}) {
    model.WriteIndex(bad);
    EXPECT_THAT(model.LoadStored(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("weight_map")))
        << bad;
  }
  WriteText(model.dir.File("model.safetensors.index.json"), "{\"weight_map\":");
  EXPECT_THAT(model.LoadStored(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not valid JSON")));
}

TEST(ModelWeights, AFolderWithoutWeightsIsNamed) {
  TinyModel model;
  EXPECT_THAT(model.LoadStored(),
              StatusIs(absl::StatusCode::kNotFound,
                       AllOf(HasSubstr(model.dir.path()), HasSubstr("model.safetensors.index.json"))));
}

// Fused projections, biases without a config key, norms of queries and keys, other spellings in config.json:
// everything that a later family states in its table entry, stated by a made-up one.
TEST(ModelWeights, AFamilyIsData) {
  using Role = WeightRole;
  Family family;
  family.name = "made-up";
  family.architectures = {"MadeUpForCausalLM"};
  family.tensors = {
      {"embed", {Role::kEmbedding}},
      {"norm", {Role::kFinalNorm}},
      {"head", {Role::kLmHead}, false, WeightCondition::kUntied},
      {"block.{layer}.norm1", {Role::kInputNorm}},
      {"block.{layer}.qkv", {Role::kQProj, Role::kKProj, Role::kVProj}},
      {"block.{layer}.qkv_bias", {Role::kQProj, Role::kKProj, Role::kVProj}, true},
      {"block.{layer}.q_norm", {Role::kQNorm}},
      {"block.{layer}.k_norm", {Role::kKNorm}},
      {"block.{layer}.out", {Role::kOProj}},
      {"block.{layer}.norm2", {Role::kPostAttentionNorm}},
      {"block.{layer}.gate_up", {Role::kGateProj, Role::kUpProj}},
      {"block.{layer}.down", {Role::kDownProj}},
  };
  family.weight_prefixes = {"block."};
  family.renamed_keys = {{"num_hidden_layers", "num_layers"}, {"vocab_size", "padded_vocab_size"}};
  family.rotary_form = RotaryForm::kInterleaved;
  family.partial_rotary = true;
  family.default_rotary_fraction = 0.5;

  Json json = TinyLlamaConfig();
  json["architectures"] = {"MadeUpForCausalLM"};
  json.erase("num_hidden_layers");
  json["num_layers"] = 1;
  json["padded_vocab_size"] = 7;
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, ParseModelConfig(json.dump(), "config.json", &family));
  EXPECT_EQ(config.num_layers, 1);
  EXPECT_EQ(config.vocab_size, 7);
  EXPECT_EQ(config.rope.rotary_dim, 2);
  EXPECT_EQ(config.rope.form, RotaryForm::kInterleaved);
  json["num_layers"] = 0;
  EXPECT_THAT(ParseModelConfig(json.dump(), "config.json", &family),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_layers is 0")));
  EXPECT_THAT(ParseModelConfig(TinyLlamaConfig().dump(), "config.json", &family),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("LlamaForCausalLM")));

  const TempDir dir;
  WriteText(dir.File("model.safetensors"), SafetensorsOf({{"embed", "BF16", {7, 12}},
                                                          {"norm", "F32", {12}},
                                                          {"head", "F32", {7, 12}},
                                                          {"block.0.norm1", "F32", {12}},
                                                          {"block.0.qkv", "F32", {32, 12}},
                                                          {"block.0.qkv_bias", "F32", {32}},
                                                          {"block.0.q_norm", "F32", {4}},
                                                          {"block.0.k_norm", "F32", {4}},
                                                          {"block.0.out", "F32", {12, 16}},
                                                          {"block.0.norm2", "F32", {12}},
                                                          {"block.0.gate_up", "F32", {40, 12}},
                                                          {"block.0.down", "F32", {12, 20}}}));
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, ModelWeights::Load(dir.path(), config, family));
  const LayerWeights& layer = weights->layer(0);
  const auto* qkv = static_cast<const float*>(layer.q_proj.weight);
  ExpectLinear(layer.q_proj, 16, 12, DType::kFloat32, true);
  ExpectLinear(layer.k_proj, 8, 12, DType::kFloat32, true);
  ExpectLinear(layer.v_proj, 8, 12, DType::kFloat32, true);
  EXPECT_EQ(qkv, static_cast<const void*>(weights->files()[0]->Find("block.0.qkv")->bytes.data()));
  EXPECT_EQ(layer.k_proj.weight, qkv + 16 * 12);
  EXPECT_EQ(layer.v_proj.weight, qkv + 24 * 12);
  const auto* qkv_bias = static_cast<const float*>(layer.q_proj.bias);
  EXPECT_EQ(layer.k_proj.bias, qkv_bias + 16);
  EXPECT_EQ(layer.v_proj.bias, qkv_bias + 24);
  EXPECT_EQ(layer.up_proj.weight, static_cast<const float*>(layer.gate_proj.weight) + 20 * 12);
  EXPECT_NE(layer.q_norm, nullptr);
  EXPECT_NE(layer.k_norm, nullptr);
  ExpectLinear(weights->embedding(), 7, 12, DType::kBFloat16, false);
  ExpectLinear(weights->lm_head(), 7, 12, DType::kFloat32, false);
}

void ExpectAllFinite(const float* values, int64_t count, const char* what) {
  for (int64_t i = 0; i < count; ++i) ASSERT_TRUE(std::isfinite(values[i])) << what << " " << i;
}

TEST(ModelWeights, GoldenModelsLoad) {
  const std::vector<std::string> folders = GoldenModels();
  if (folders.empty()) GTEST_SKIP() << "tests/golden/data is absent";
  for (const std::string& folder : folders) {
    SCOPED_TRACE(folder);
    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(folder));
    LF_ASSERT_OK_AND_ASSIGN(const auto weights, ModelWeights::Load(folder, config));
    EXPECT_EQ(weights->num_layers(), config.num_layers);
    EXPECT_EQ(weights->embedding().dtype, config.dtype);
    EXPECT_EQ(weights->lm_head().weight == weights->embedding().weight, config.tie_word_embeddings);
    for (int64_t layer = 0; layer < config.num_layers; ++layer) {
      const LayerWeights& w = weights->layer(layer);
      EXPECT_EQ(w.q_proj.bias != nullptr, config.attention_bias || config.family == "qwen2");
      EXPECT_EQ(w.v_proj.bias != nullptr, config.attention_bias || config.family == "qwen2");
      const bool glm = config.family == "glm" || config.family == "chatglm";
      EXPECT_EQ(w.o_proj.bias != nullptr, config.attention_bias && !glm);
      EXPECT_EQ(w.q_norm != nullptr, config.family == "qwen3");
      EXPECT_EQ(w.k_norm != nullptr, config.family == "qwen3");
      EXPECT_EQ(w.up_proj.bias != nullptr, config.mlp_bias);
    }
    ExpectAllFinite(weights->final_norm(), config.hidden_size, "final norm");
  }
}

TEST(ModelWeights, Needle20mLoadsFromItsThreeShards) {
  const std::string folder = std::string(LONGFILL_SHARED_DIR) + "/models/needle-20m";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << folder << " is absent";
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(folder));
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, ModelWeights::Load(folder, config));
  EXPECT_EQ(weights->files().size(), 3u);
  EXPECT_EQ(weights->num_layers(), 8);
  EXPECT_EQ(weights->num_parameters() * 2, 40907520);  // total_size of its index, all bf16
  EXPECT_EQ(weights->lm_head().weight, weights->embedding().weight);
  ExpectAllFinite(weights->layer(7).post_attention_norm, config.hidden_size, "norm");
}

}  // namespace
}  // namespace longfill
