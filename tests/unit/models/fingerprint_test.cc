#include "models/fingerprint.h"

#include <set>
#include <utility>

#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using Json = nlohmann::json;
using ::testing::HasSubstr;

std::string FingerprintOf(const Json& json, const std::vector<TestTensor>& tensors, int padding = 0,
                          size_t changed_byte = SIZE_MAX) {
  const TempDir dir;
  WriteText(dir.File("config.json"), json.dump());
  std::string bytes = SafetensorsOf(tensors, padding);
  if (changed_byte != SIZE_MAX) bytes[bytes.size() - 1 - changed_byte] ^= 1;
  WriteText(dir.File("model.safetensors"), bytes);
  const auto config = LoadModelConfig(dir.path());
  if (!config.ok()) return config.status().ToString();
  const auto weights = ModelWeights::Load(dir.path(), *config);
  if (!weights.ok()) return weights.status().ToString();
  const auto fingerprint = ModelFingerprint(*config, **weights);
  return fingerprint.ok() ? *fingerprint : fingerprint.status().ToString();
}

TEST(ModelFingerprint, IsTheSameForTheSameModel) {
  const std::string fingerprint = FingerprintOf(TinyLlamaConfig(), TinyLlamaTensors());
  EXPECT_EQ(fingerprint.size(), 64u);
  EXPECT_EQ(fingerprint.find_first_not_of("0123456789abcdef"), std::string::npos);
  EXPECT_EQ(FingerprintOf(TinyLlamaConfig(), TinyLlamaTensors()), fingerprint);
  EXPECT_EQ(FingerprintOf(TinyLlamaConfig(), TinyLlamaTensors(), /*padding=*/8), fingerprint);
  Json json = TinyLlamaConfig();
  json["max_position_embeddings"] = 512;
  json["eos_token_id"] = 3;
  EXPECT_EQ(FingerprintOf(json, TinyLlamaTensors()), fingerprint);
}

TEST(ModelFingerprint, ChangesWithConfigAndWeights) {
  const std::string fingerprint = FingerprintOf(TinyLlamaConfig(), TinyLlamaTensors());
  const std::pair<const char*, Json> changes[] = {
      {"rope_theta", 20000.0},
      {"rms_norm_eps", 1e-6},
      {"hidden_act", "gelu_pytorch_tanh"},
      {"rope_scaling", {{"rope_type", "linear"}, {"factor", 2.0}}},
  };
  for (const auto& [key, value] : changes) {
    Json json = TinyLlamaConfig();
    json[key] = value;
    const std::string changed = FingerprintOf(json, TinyLlamaTensors());
    EXPECT_EQ(changed.size(), 64u) << changed;
    EXPECT_NE(changed, fingerprint) << key;
  }
  EXPECT_NE(FingerprintOf(TinyLlamaConfig(), TinyLlamaTensors("BF16")), fingerprint);
  for (const size_t byte : {0, 1, 500, 2000}) {  // small tensors are sampled whole
    EXPECT_NE(FingerprintOf(TinyLlamaConfig(), TinyLlamaTensors(), 0, byte), fingerprint) << byte;
  }
}

TEST(ModelFingerprint, ChangesWithDualChunks) {
  const TempDir dir;
  WriteText(dir.File("config.json"), TinyLlamaConfig().dump());
  WriteText(dir.File("model.safetensors"), SafetensorsOf(TinyLlamaTensors()));
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig plain, LoadModelConfig(dir.path()));
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, ModelWeights::Load(dir.path(), plain));
  std::set<std::string> fingerprints;
  for (const auto& [dual_chunk, original] : {std::pair(DualChunk{}, 0),
                                             {DualChunk{160, 32}, 0},
                                             {DualChunk{192, 64}, 0},
                                             {DualChunk{160, 32}, 160}}) {
    ModelConfig config = plain;
    config.rope.dual_chunk = dual_chunk;
    config.rope.dual_chunk_original_tokens = original;
    LF_ASSERT_OK_AND_ASSIGN(const std::string fingerprint, ModelFingerprint(config, *weights));
    EXPECT_TRUE(fingerprints.insert(fingerprint).second) << dual_chunk.chunk_size << " " << original;
  }
  EXPECT_TRUE(fingerprints.contains(FingerprintOf(TinyLlamaConfig(), TinyLlamaTensors())));
}

TEST(ModelFingerprint, ShardingDoesNotMatter) {
  const std::string whole = FingerprintOf(TinyLlamaConfig(), TinyLlamaTensors());
  const TempDir dir;
  WriteText(dir.File("config.json"), TinyLlamaConfig().dump());
  const std::string bytes = SafetensorsOf(TinyLlamaTensors());
  WriteText(dir.File("all"), bytes);
  LF_ASSERT_OK_AND_ASSIGN(const auto all, SafetensorsFile::Open(dir.File("all")));
  Json index;
  for (const bool norms : {false, true}) {
    std::vector<SafetensorsSpec> specs;
    for (const SafetensorsTensor& tensor : all->tensors()) {
      if ((tensor.shape.size() == 1) == norms) specs.push_back({tensor.name, *tensor.dtype, tensor.shape});
    }
    const std::string name = norms ? "norms.safetensors" : "rest.safetensors";
    LF_ASSERT_OK_AND_ASSIGN(auto writer, SafetensorsWriter::Create(dir.File(name), specs, {}));
    for (const SafetensorsSpec& spec : specs) {
      LF_ASSERT_OK(writer->Append(spec.name, all->Find(spec.name)->bytes));
      index["weight_map"][spec.name] = name;
    }
    LF_ASSERT_OK(writer->Close());
  }
  WriteText(dir.File("model.safetensors.index.json"), index.dump());
  LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(dir.path()));
  LF_ASSERT_OK_AND_ASSIGN(const auto weights, ModelWeights::Load(dir.path(), config));
  EXPECT_EQ(weights->files().size(), 2u);
  LF_ASSERT_OK_AND_ASSIGN(const std::string sharded, ModelFingerprint(config, *weights));
  EXPECT_EQ(sharded, whole);
}

TEST(ModelFingerprint, SamplesBothEndsOfLargeTensors) {
  Json json = TinyLlamaConfig();
  json["vocab_size"] = 4000;  // embedding and head of 192,000 bytes
  std::vector<TestTensor> tensors = TinyLlamaTensors();
  tensors[0].shape = tensors[2].shape = {4000, 12};
  const std::vector<TestTensor> head_last = {tensors.rbegin(),
                                             tensors.rend()};  // the embedding ends the file
  const std::string fingerprint = FingerprintOf(json, head_last);
  EXPECT_EQ(fingerprint.size(), 64u) << fingerprint;
  for (const size_t byte : {0, 4095, 191999, 191999 - 4095, 100}) {
    EXPECT_NE(FingerprintOf(json, head_last, 0, byte), fingerprint) << byte;
  }
}

// Values from Python's hashlib over the definition in the header.
TEST(TokenHashChain, EqualsRecordedHashes) {
  std::vector<int32_t> ids(300);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 7919 % 32000);
  LF_ASSERT_OK_AND_ASSIGN(const auto chain, TokenHashChain(ids));
  EXPECT_EQ(chain,
            (std::vector<std::string>{"c79a49109f4814c90d9eaeb31a2d39e23ecee619d4c8f326adb1db987b9adae1",
                                      "b726631b4e8dba2c3609f432b1abc77774339fabb8737273c346c63b6c053757",
                                      "a99a3803a86bf989365e6f04348b8f82b9158f0f64ad8dc651cd415d681a6c81"}));
}

TEST(TokenHashChain, SharesExactlyTheCommonPrefix) {
  std::vector<int32_t> ids(10, 5);
  LF_ASSERT_OK_AND_ASSIGN(const auto before, TokenHashChain(ids, 2));
  ASSERT_EQ(before.size(), 5u);
  ids[5] = 6;
  LF_ASSERT_OK_AND_ASSIGN(const auto after, TokenHashChain(ids, 2));
  for (size_t page = 0; page < 5; ++page) EXPECT_EQ(before[page] == after[page], page < 2) << page;
}

TEST(TokenHashChain, CountsPages) {
  const std::pair<size_t, size_t> cases[] = {{0, 0}, {1, 1}, {127, 1}, {128, 1}, {129, 2}, {256, 2}};
  for (const auto& [num_ids, num_pages] : cases) {
    LF_ASSERT_OK_AND_ASSIGN(const auto chain, TokenHashChain(std::vector<int32_t>(num_ids, 1)));
    EXPECT_EQ(chain.size(), num_pages) << num_ids;
  }
  EXPECT_THAT(TokenHashChain({}, 0),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("page of 0 tokens")));
}

}  // namespace
}  // namespace longfill
