#include "models/device_weights.h"
#include "models/weight_fill.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <set>

#include "models/weight_layout.h"
#include "tests/contract/backend_fixture.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// The norms of a model, then its matrices and biases, in an order that depends on its config alone.
void ForEachNorm(const ModelWeights& weights,
                 const std::function<void(const float* norm, bool of_head)>& visit) {
  visit(weights.final_norm(), false);
  for (int64_t i = 0; i < weights.num_layers(); ++i) {
    const LayerWeights& layer = weights.layer(i);
    visit(layer.input_norm, false);
    visit(layer.post_attention_norm, false);
    visit(layer.q_norm, true);
    visit(layer.k_norm, true);
  }
}

std::vector<const LinearWeights*> Linears(const ModelWeights& weights) {
  std::vector<const LinearWeights*> linears = {&weights.embedding(), &weights.lm_head()};
  for (int64_t i = 0; i < weights.num_layers(); ++i) {
    const LayerWeights& layer = weights.layer(i);
    linears.insert(linears.end(), {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj,
                                   &layer.gate_proj, &layer.up_proj, &layer.down_proj});
  }
  return linears;
}

// Elements of `from` rounded to `to` one by one.
std::vector<uint8_t> Narrowed(const void* data, DType from, int64_t count, DType to) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count * DTypeBytes(to)));
  for (int64_t i = 0; i < count; ++i) {
    float value = 0;
    std::memcpy(&value, static_cast<const char*>(data) + i * DTypeBytes(from),
                from == DType::kFloat32 ? 4 : 2);
    uint16_t bits = 0;
    std::memcpy(&bits, static_cast<const char*>(data) + i * DTypeBytes(from), 2);
    if (from == DType::kBFloat16) value = BFloat16ToFloat(bits);
    if (from == DType::kFloat16) value = Float16ToFloat(bits);
    bits = to == DType::kBFloat16 ? FloatToBFloat16(value) : FloatToFloat16(value);
    const void* rounded = to == DType::kFloat32 ? static_cast<const void*>(&value) : &bits;
    std::memcpy(bytes.data() + i * DTypeBytes(to), rounded, static_cast<size_t>(DTypeBytes(to)));
  }
  return bytes;
}

std::string GoldenModel(const char* name) {
  return std::string(LONGFILL_SOURCE_DIR) + "/tests/golden/data/" + name;
}

class DeviceWeightsTest : public BackendTest {
 protected:
  void ExpectEqual(const ModelWeights& got, const ModelWeights& host, const ModelConfig& config,
                   DType dtype) {
    const auto got_linears = Linears(got);
    const auto host_linears = Linears(host);
    ASSERT_EQ(got_linears.size(), host_linears.size());
    for (size_t i = 0; i < got_linears.size(); ++i) {
      const LinearWeights& mine = *got_linears[i];
      const LinearWeights& theirs = *host_linears[i];
      ASSERT_EQ(mine.dtype, dtype);
      ASSERT_EQ(mine.out_width, theirs.out_width);
      ASSERT_EQ(mine.in_width, theirs.in_width);
      const int64_t count = mine.out_width * mine.in_width;
      EXPECT_EQ(Download<uint8_t>(mine.weight, count * DTypeBytes(dtype)),
                Narrowed(theirs.weight, theirs.dtype, count, dtype))
          << "matrix " << i;
      ASSERT_EQ(mine.bias != nullptr, theirs.bias != nullptr);
      if (mine.bias == nullptr) continue;
      EXPECT_EQ(Download<uint8_t>(mine.bias, mine.out_width * DTypeBytes(dtype)),
                Narrowed(theirs.bias, DType::kFloat32, mine.out_width, dtype))
          << "bias " << i;
    }
    std::vector<const float*> host_norms;
    ForEachNorm(host, [&](const float* norm, bool) { host_norms.push_back(norm); });
    size_t next = 0;
    ForEachNorm(got, [&](const float* norm, bool of_head) {
      const float* theirs = host_norms[next++];
      ASSERT_EQ(norm != nullptr, theirs != nullptr);
      if (norm == nullptr) return;
      const int64_t width = of_head ? config.head_dim : config.hidden_size;
      EXPECT_EQ(Download<float>(norm, width), std::vector<float>(theirs, theirs + width));
    });
  }
};

TEST_P(DeviceWeightsTest, ConversionRoundsEveryTensor) {
  for (const char* name :
       {"llama-all-biases-fp32", "llama-gqa4", "llama-mha-tied-fp16", "llama-sharded-v5"}) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
      SCOPED_TRACE(std::string(name) + " to " + std::string(DTypeName(dtype)));
      LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(GoldenModel(name)));
      LF_ASSERT_OK_AND_ASSIGN(const auto host, ModelWeights::Load(GoldenModel(name), config));
      const int64_t before = backend().memory().bytes_in_use();
      LF_ASSERT_OK_AND_ASSIGN(const auto weights, ConvertWeights(*host, config, dtype, backend()));
      EXPECT_EQ(backend().memory().bytes_in_use() - before, DeviceWeightsBytes(config, dtype));
      EXPECT_EQ(weights->bytes(), DeviceWeightsBytes(config, dtype));
      EXPECT_EQ(weights->mapped_bytes(), 0);
      EXPECT_EQ(weights->num_parameters(), host->num_parameters());
      EXPECT_TRUE(weights->files().empty());
      EXPECT_EQ(weights->lm_head().weight == weights->embedding().weight, config.tie_word_embeddings);
      ExpectEqual(*weights, *host, config, dtype);
    }
  }
}

TEST_P(DeviceWeightsTest, TensorsAreAlignedAndDisjoint) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(GoldenModel("llama-all-biases-fp32")));
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, RandomWeights(config, backend(), 1));
  const auto* base = static_cast<const char*>(weights->embedding().weight);
  std::set<std::pair<int64_t, int64_t>> ranges;
  const auto add = [&](const void* data, int64_t bytes) {
    if (data == nullptr) return;
    const int64_t offset = static_cast<const char*>(data) - base;
    EXPECT_EQ(offset % kWeightAlignment, 0);
    EXPECT_EQ(on_gpu() ? reinterpret_cast<uintptr_t>(data) % 256 : 0, 0u);
    ranges.emplace(offset, offset + bytes);
  };
  const int64_t element = DTypeBytes(compute_dtype());
  for (const LinearWeights* linear : Linears(*weights)) {
    add(linear->weight, linear->out_width * linear->in_width * element);
    add(linear->bias, linear->out_width * element);
  }
  ForEachNorm(*weights, [&](const float* norm, bool) { add(norm, config.hidden_size * 4); });
  EXPECT_EQ(ranges.size(), 2u + 7 * 2 + 1 + 2);
  int64_t end = 0;
  for (const auto& [from, to] : ranges) {
    EXPECT_GE(from, end);
    end = to;
  }
  EXPECT_LE(end, DeviceWeightsBytes(config, compute_dtype()));
}

TEST_P(DeviceWeightsTest, TensorsLargerThanTheStagingGoInPieces) {
  const TempDir dir;
  nlohmann::json json = TinyLlamaConfig();
  json["vocab_size"] = 1'500'001;
  json["tie_word_embeddings"] = true;
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, ParseModelConfig(json.dump(), "config.json"));
  std::vector<TestTensor> tensors = TinyLlamaTensors("BF16");
  tensors[0].shape[0] = config.vocab_size;
  tensors.erase(tensors.begin() + 2);  // lm_head
  WriteText(dir.File("model.safetensors"), SafetensorsOf(tensors));
  LF_ASSERT_OK_AND_ASSIGN(const auto host, ModelWeights::Load(dir.path(), config));
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    ASSERT_GT(config.vocab_size * config.hidden_size * DTypeBytes(dtype), kWeightStagingBytes);
    LF_ASSERT_OK_AND_ASSIGN(const auto weights, ConvertWeights(*host, config, dtype, backend()));
    ExpectEqual(*weights, *host, config, dtype);
  }
}

// A fp32 checkpoint in which every weight is 0.5 but for `value` as element 3 of the second layer's up_proj.
std::unique_ptr<const ModelWeights> WithOneWeight(float value, const ModelConfig& config) {
  const TempDir dir;  // a mapping outlives the name of its file
  std::string bytes = SafetensorsOf(TinyLlamaTensors());
  WriteText(dir.File("places.safetensors"), bytes);
  const auto places = SafetensorsFile::Open(dir.File("places.safetensors"));
  EXPECT_THAT(places, IsOk());
  const float half = 0.5F;
  for (const SafetensorsTensor& tensor : (*places)->tensors()) {
    for (size_t i = 0; i < tensor.bytes.size(); i += 4) {
      std::memcpy(bytes.data() + tensor.file_offset + i, &half, 4);
    }
  }
  const SafetensorsTensor* up = (*places)->Find("model.layers.1.mlp.up_proj.weight");
  std::memcpy(bytes.data() + up->file_offset + 3 * 4, &value, 4);
  WriteText(dir.File("model.safetensors"), bytes);
  auto weights = ModelWeights::Load(dir.path(), config);
  EXPECT_THAT(weights, IsOk());
  return *std::move(weights);
}

TEST_P(DeviceWeightsTest, AFiniteWeightThatWouldBecomeInfiniteIsNamed) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config,
                          ParseModelConfig(TinyLlamaConfig().dump(), "config.json"));
  const int64_t before = backend().memory().bytes_in_use();
  const auto large = WithOneWeight(70000.0F, config);
  EXPECT_THAT(ConvertWeights(*large, config, DType::kFloat16, backend()),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("'model.layers.1.mlp.up_proj.weight'"), HasSubstr("70000"),
                             HasSubstr("element 3 of 240"), HasSubstr("float16"), HasSubstr("65504"))));
  LF_EXPECT_OK(ConvertWeights(*large, config, DType::kBFloat16, backend()));
  EXPECT_EQ(backend().memory().bytes_in_use(), before);

  const auto largest = WithOneWeight(std::numeric_limits<float>::max(), config);
  EXPECT_THAT(ConvertWeights(*largest, config, DType::kBFloat16, backend()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bfloat16")));
  // 65519 still rounds to 65504; what was no number or infinite before is the checkpoint's own matter.
  for (const float value : {65519.0F, std::numeric_limits<float>::infinity(), std::nanf("")}) {
    const auto weights = WithOneWeight(value, config);
    LF_EXPECT_OK(ConvertWeights(*weights, config, DType::kFloat16, backend()));
  }
}

TEST_P(DeviceWeightsTest, UploadGivesWhatTheBackendComputesWith) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(GoldenModel("llama-all-biases-fp32")));
  LF_ASSERT_OK_AND_ASSIGN(const auto host, ModelWeights::Load(GoldenModel("llama-all-biases-fp32"), config));
  LF_ASSERT_OK_AND_ASSIGN(auto given, ModelWeights::Load(GoldenModel("llama-all-biases-fp32"), config));
  const ModelWeights* const given_object = given.get();
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, UploadWeights(std::move(given), config, backend()));
  EXPECT_EQ(weights.get() == given_object, !on_gpu());
  if (on_gpu()) ExpectEqual(*weights, *host, config, compute_dtype());
}

TEST_P(DeviceWeightsTest, RandomWeightsAreNormalWithUnitNormsAndNoBiases) {
  LF_ASSERT_OK_AND_ASSIGN(ModelConfig config, LoadModelConfig(GoldenModel("llama-all-biases-fp32")));
  config.vocab_size = 3001;
  config.initializer_range = 0.25;
  const int64_t before = backend().memory().bytes_in_use();
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, RandomWeights(config, backend(), 42));
  EXPECT_EQ(backend().memory().bytes_in_use() - before, DeviceWeightsBytes(config, compute_dtype()));

  const LinearWeights& table = weights->embedding();
  const std::vector<float> values = DownloadCompute(table.weight, table.out_width * table.in_width);
  double sum = 0;
  double squares = 0;
  for (const float value : values) {
    sum += value;
    squares += static_cast<double>(value) * value;
  }
  const auto count = static_cast<double>(values.size());
  // Six standard errors of the mean and of the variance.
  EXPECT_NEAR(sum / count, 0, 6 * 0.25 / std::sqrt(count));
  EXPECT_NEAR(squares / count, 0.0625, 6 * 0.0625 * std::sqrt(2 / count));

  for (const LinearWeights* linear : Linears(*weights)) {
    if (linear->bias == nullptr) continue;
    EXPECT_EQ(DownloadCompute(linear->bias, linear->out_width),
              std::vector<float>(static_cast<size_t>(linear->out_width)));
  }
  ForEachNorm(*weights, [&](const float* norm, bool) {
    if (norm == nullptr) return;
    EXPECT_EQ(Download<float>(norm, config.hidden_size),
              std::vector<float>(static_cast<size_t>(config.hidden_size), 1.0F));
  });
}

TEST_P(DeviceWeightsTest, RandomMatricesDependOnSeedRoleAndLayer) {
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(GoldenModel("llama-gqa4")));
  std::set<std::vector<float>> seen;
  size_t matrices = 0;
  for (const uint64_t seed : {0, 1}) {
    LF_ASSERT_OK_AND_ASSIGN(const auto first, RandomWeights(config, backend(), seed));
    LF_ASSERT_OK_AND_ASSIGN(const auto again, RandomWeights(config, backend(), seed));
    const auto once = Linears(*first);
    const auto twice = Linears(*again);
    for (size_t i = 0; i < once.size(); ++i, ++matrices) {
      constexpr int64_t kSome = 48;
      const std::vector<float> values = DownloadCompute(once[i]->weight, kSome);
      EXPECT_EQ(values, DownloadCompute(twice[i]->weight, kSome));
      seen.insert(values);
    }
  }
  EXPECT_EQ(seen.size(), matrices);
}

LF_INSTANTIATE_BACKENDS(DeviceWeightsTest);

}  // namespace
}  // namespace longfill
