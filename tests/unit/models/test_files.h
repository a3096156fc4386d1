#ifndef LONGFILL_TESTS_UNIT_MODELS_TEST_FILES_H_
#define LONGFILL_TESTS_UNIT_MODELS_TEST_FILES_H_

// Small model files made on the spot, for the tests of this folder.

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "nlohmann/json.hpp"

namespace longfill {

// A fresh folder, removed with everything in it at the end.
class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "longfill-models-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) ADD_FAILURE() << "cannot make " << name;
    path_ = name;
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  std::string File(std::string_view name) const { return path_ + "/" + std::string(name); }
  std::vector<std::string> List() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path_))
      names.push_back(entry.path().filename());
    return names;
  }

 private:
  std::string path_;
};

inline void WriteText(const std::string& path, std::string_view text) {
  std::ofstream out(path, std::ios::binary);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  ASSERT_TRUE(out.good()) << path;
}

inline std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// Length prefix, header as given, data.
inline std::string SafetensorsBytes(std::string_view header, std::string_view data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + std::string(header) +
         std::string(data);
}

struct TestTensor {
  std::string name;
  std::string dtype;  // "F32", "BF16", "F16", "F64"
  std::vector<int64_t> shape;
};

inline int64_t TestTensorBytes(const TestTensor& tensor) {
  int64_t bytes = tensor.dtype == "F64" ? 8 : tensor.dtype == "F32" ? 4 : 2;
  for (const int64_t extent : tensor.shape) bytes *= extent;
  return bytes;
}

// A valid file; byte i of the data is a small number that depends on i, so that every float is finite. The
// data begins `padding` bytes after a multiple of 8.
inline std::string SafetensorsOf(const std::vector<TestTensor>& tensors, int padding = 0) {
  nlohmann::json header = nlohmann::json::object();
  int64_t end = 0;
  for (const TestTensor& tensor : tensors) {
    const int64_t begin = end;
    end += TestTensorBytes(tensor);
    header[tensor.name] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
  }
  std::string data(static_cast<size_t>(end), '\0');
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i * 7 % 61);
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8 + static_cast<size_t>(padding), ' ');
  return SafetensorsBytes(text, data);
}

inline nlohmann::json TinyLlamaConfig() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_size", 12},
          {"intermediate_size", 20},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 4},
          {"vocab_size", 11},
          {"max_position_embeddings", 256},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 10000.0},
          {"tie_word_embeddings", false},
          {"hidden_act", "silu"},
          {"torch_dtype", "float32"}};
}

// The tensors of TinyLlamaConfig(), all of one dtype.
inline std::vector<TestTensor> TinyLlamaTensors(const std::string& dtype = "F32") {
  std::vector<TestTensor> tensors = {{"model.embed_tokens.weight", dtype, {11, 12}},
                                     {"model.norm.weight", dtype, {12}},
                                     {"lm_head.weight", dtype, {11, 12}}};
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    tensors.push_back({prefix + "input_layernorm.weight", dtype, {12}});
    tensors.push_back({prefix + "self_attn.q_proj.weight", dtype, {16, 12}});
    tensors.push_back({prefix + "self_attn.k_proj.weight", dtype, {8, 12}});
    tensors.push_back({prefix + "self_attn.v_proj.weight", dtype, {8, 12}});
    tensors.push_back({prefix + "self_attn.o_proj.weight", dtype, {12, 16}});
    tensors.push_back({prefix + "post_attention_layernorm.weight", dtype, {12}});
    tensors.push_back({prefix + "mlp.gate_proj.weight", dtype, {20, 12}});
    tensors.push_back({prefix + "mlp.up_proj.weight", dtype, {20, 12}});
    tensors.push_back({prefix + "mlp.down_proj.weight", dtype, {12, 20}});
  }
  return tensors;
}

// Folders of tests/golden/data, sorted.
inline std::vector<std::string> GoldenModels() {
  std::vector<std::string> folders;
  const std::filesystem::path root = std::filesystem::path(LONGFILL_SOURCE_DIR) / "tests/golden/data";
  if (!std::filesystem::exists(root)) return folders;
  for (const auto& entry : std::filesystem::directory_iterator(root)) {
    if (entry.is_directory()) folders.push_back(entry.path().string());
  }
  std::sort(folders.begin(), folders.end());
  return folders;
}

}  // namespace longfill

#endif  // LONGFILL_TESTS_UNIT_MODELS_TEST_FILES_H_
