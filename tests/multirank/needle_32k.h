#ifndef LONGFILL_TESTS_MULTIRANK_NEEDLE_32K_H_
#define LONGFILL_TESTS_MULTIRANK_NEEDLE_32K_H_

// needle-20m on 32,768 tokens of its filler text, for the tests of balance. They skip where the shared folder
// is absent.

#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "models/safetensors.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {

inline constexpr int64_t kBalanceTokens = 32768;

inline std::string NeedleModel() { return absl::StrCat(LONGFILL_SHARED_DIR, "/models/needle-20m"); }
inline std::string FillerFile() { return absl::StrCat(LONGFILL_SHARED_DIR, "/eval/filler.u16"); }
inline bool HasNeedle() {
  return std::filesystem::exists(NeedleModel() + "/config.json") && std::filesystem::exists(FillerFile());
}

inline std::vector<int32_t> FillerIds() {
  const std::string bytes = ReadText(FillerFile());
  std::vector<uint16_t> ids(kBalanceTokens);
  EXPECT_GE(bytes.size(), ids.size() * sizeof(uint16_t));
  std::memcpy(ids.data(), bytes.data(), ids.size() * sizeof(uint16_t));
  return {ids.begin(), ids.end()};
}

// The first layers of needle-20m as a model of its own.
class FirstLayersOfNeedle {
 public:
  explicit FirstLayersOfNeedle(int num_layers) {
    nlohmann::json config = nlohmann::json::parse(ReadText(NeedleModel() + "/config.json"));
    config["num_hidden_layers"] = num_layers;
    WriteText(directory_.File("config.json"), config.dump());
    WriteWeights(num_layers);
  }
  const std::string& path() const { return directory_.path(); }

 private:
  void WriteWeights(int num_layers) {
    const std::string prefix = "model.layers.";
    std::vector<std::shared_ptr<const SafetensorsFile>> files;
    std::vector<SafetensorsSpec> specs;
    std::vector<std::span<const std::byte>> bytes;
    for (const auto& entry : std::filesystem::directory_iterator(NeedleModel())) {
      if (entry.path().extension() != ".safetensors") continue;
      LF_ASSERT_OK_AND_ASSIGN(auto file, SafetensorsFile::Open(entry.path().string()));
      for (const SafetensorsTensor& tensor : file->tensors()) {
        const bool in_layer = tensor.name.starts_with(prefix);
        if (in_layer && std::stoi(tensor.name.substr(prefix.size())) >= num_layers) continue;
        specs.push_back({tensor.name, tensor.dtype.value(), tensor.shape});
        bytes.push_back(tensor.bytes);
      }
      files.push_back(std::move(file));
    }
    LF_ASSERT_OK_AND_ASSIGN(const auto writer,
                            SafetensorsWriter::Create(directory_.File("model.safetensors"), specs, {}));
    for (size_t i = 0; i < specs.size(); ++i) LF_ASSERT_OK(writer->Append(specs[i].name, bytes[i]));
    LF_ASSERT_OK(writer->Close());
  }

  TempDir directory_;
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_MULTIRANK_NEEDLE_32K_H_
