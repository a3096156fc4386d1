// Whole models: every mesh gives what one rank gives, and one rank gives what Hugging Face transformers
// gives.

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/cpu/oracle/oracle.h"
#include "kernels/sparse/coverage.h"
#include "models/safetensors.h"
#include "tests/multirank/engine_group.h"
#include "tests/multirank/ranks.h"
#include "tests/testing/sanitized.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {

void PrintTo(const Mesh& mesh, std::ostream* out) { *out << ToString(mesh); }

namespace {

constexpr int64_t kLengths[] = {1, 3, 200, 389, 1337};
constexpr AShape kAShape{7, 70};
struct Attention {
  const char* spec;
  Coverage coverage;
};
constexpr Attention kAttentions[] = {
    {"dense", Coverage::kTiles},
    {"dense", Coverage::kParity},
    {"a-shape:7,70", Coverage::kTiles},
    {"vertical-slash:40,120", Coverage::kTiles},
    {"vertical-slash:40,120", Coverage::kParity},
    {"block-sparse:3", Coverage::kTiles},
    {"block-sparse:3", Coverage::kParity},
    {"block-share:3,0.3", Coverage::kTiles},
};
constexpr const char* kModels[] = {"llama-gqa4",          "llama-gqa7-tied",
                                   "llama-mha-tied-fp16", "llama-all-biases-fp32",
                                   "mistral-window",      "qwen2-window-of-upper-layers",
                                   "phi3-su-window",      "qwen3-tied",
                                   "glm-native"};

std::vector<Mesh> AllMeshes() {
  std::vector<Mesh> meshes;
  for (const int size : GroupSizes()) {
    for (const Mesh& mesh : Factorisations(size)) meshes.push_back(mesh);
  }
  return meshes;
}

// A golden checkpoint that takes longer prompts than its golden ones, so that 8 ranks have tokens each; no
// weight depends on the length.
class LongerModel {
 public:
  explicit LongerModel(const std::string& name, int64_t max_tokens = 4096) {
    nlohmann::json config = nlohmann::json::parse(ReadText(GoldenModel(name) + "/config.json"));
    config["max_position_embeddings"] = max_tokens;
    WriteText(directory_.File("config.json"), config.dump());
    std::filesystem::create_symlink(GoldenModel(name) + "/model.safetensors",
                                    directory_.File("model.safetensors"));
  }
  const std::string& path() const { return directory_.path(); }

 private:
  TempDir directory_;
};

struct Prefilled {
  std::string name;
  PrefillResult result;
  PromptKv kv;
};

// Last, first, middle and repeated positions, of different ranks where the prompt has several blocks.
std::vector<int64_t> LogitsPositions(int64_t num_tokens) {
  const int64_t last = num_tokens - 1;
  return {last, 0, last / 2, last, std::min<int64_t>(last, 128), std::min<int64_t>(last, 127), 0};
}

std::vector<Prefilled> RunAll(const std::string& model_dir, const Mesh& mesh) {
  std::vector<Prefilled> runs;
  Recorder recorder;
  const auto served =
      WithEngine({.model_dir = model_dir, .mesh = mesh}, recorder, [&](PrefillEngine& engine) {
        for (const int64_t num_tokens : kLengths) {
          if (kSanitized && num_tokens != 3 && num_tokens != 389) continue;
          for (const Attention& attention : kAttentions) {
            Prefilled run;
            run.name = absl::StrCat(num_tokens, " tokens, ", attention.spec, ", ",
                                    std::string(CoverageName(attention.coverage)), ", mesh ", ToString(mesh));
            PrefillRequest request =
                MakeRequest(run.name, RandomIds(num_tokens, engine.config().vocab_size, num_tokens),
                            attention.spec, attention.coverage);
            request.logits_positions = LogitsPositions(num_tokens);
            auto result = Prefill(engine, recorder, request);
            ASSERT_THAT(result, IsOk()) << run.name;
            run.result = *std::move(result);
            run.kv = recorder.Join(run.name);
            runs.push_back(std::move(run));
          }
        }
        EXPECT_TRUE(engine.healthy());
      });
  for (const absl::Status& status : served) LF_EXPECT_OK(status);
  return runs;
}

void ExpectSame(const Prefilled& got, const Prefilled& expected) {
  SCOPED_TRACE(got.name);
  EXPECT_EQ(got.result.positions, expected.result.positions);
  ExpectNear(got.result.logits, expected.result.logits, 1e-3, "logits");
  const auto layer_of = [&](const std::vector<float>& values, int64_t layer) {
    const int64_t size = static_cast<int64_t>(values.size()) / expected.kv.num_layers;
    return std::vector<float>(values.begin() + layer * size, values.begin() + (layer + 1) * size);
  };
  for (int64_t layer = 0; layer < expected.kv.num_layers; ++layer) {
    ExpectNear(layer_of(got.kv.key, layer), layer_of(expected.kv.key, layer), 1e-3, "key");
    ExpectNear(layer_of(got.kv.value, layer), layer_of(expected.kv.value, layer), 1e-3, "value");
  }
  for (size_t i = 0; i < got.kv.owners.size(); ++i) ASSERT_EQ(got.kv.owners[i], 1) << "layer and token " << i;
  const PrefillFigures& figures = got.result.figures;
  EXPECT_EQ(std::accumulate(figures.rank_covered_pairs.begin(), figures.rank_covered_pairs.end(), int64_t{0}),
            figures.covered_pairs);
  EXPECT_GE(figures.computed_pairs, figures.covered_pairs);
  EXPECT_EQ(figures.covered_pairs, expected.result.figures.covered_pairs);
  EXPECT_EQ(figures.published_pairs, expected.result.figures.published_pairs);
  EXPECT_EQ(figures.kv_bytes, static_cast<int64_t>(2 * sizeof(float) * got.kv.key.size()));
  EXPECT_EQ(figures.rank_covered_pairs.size(), static_cast<size_t>(figures.mesh.size()));
}

class EngineOnMesh : public testing::TestWithParam<Mesh> {};

TEST_P(EngineOnMesh, EqualsOneRankForEveryPatternAndLength) {
  const Mesh mesh = GetParam();
  for (const char* name : kModels) {
    if (kSanitized && !absl::StartsWith(name, "llama-gqa4") && !absl::StartsWith(name, "glm")) continue;
    SCOPED_TRACE(name);
    const LongerModel longer(name);
    const std::vector<Prefilled> expected = RunAll(longer.path(), {1, 1});
    const std::vector<Prefilled> got = RunAll(longer.path(), mesh);
    ASSERT_EQ(got.size(), expected.size());
    ASSERT_EQ(got.size(), (kSanitized ? 2 : std::size(kLengths)) * std::size(kAttentions));
    for (size_t i = 0; i < got.size(); ++i) ExpectSame(got[i], expected[i]);
  }
}

INSTANTIATE_TEST_SUITE_P(, EngineOnMesh, testing::ValuesIn(AllMeshes()), [](const auto& test) {
  return absl::StrCat("Sequence", test.param.sequence, "Head", test.param.head);
});

TEST(Engine, ReportsTheDensityOfThePattern) {
  const LongerModel longer("llama-gqa4");
  for (const Prefilled& run : RunAll(longer.path(), {2, 1})) {
    SCOPED_TRACE(run.name);
    const PrefillFigures& figures = run.result.figures;
    const int64_t causal = CausalPairs(figures.tokens);
    if (figures.attention == "dense") {
      EXPECT_EQ(figures.density, 1.0);
    } else if (figures.attention == ToString(HeadPattern(kAShape))) {
      const int64_t pairs = oracle::AShapeMask(kAShape, figures.tokens).CountPairs();
      EXPECT_EQ(figures.covered_pairs, pairs * 8 * 2);  // query heads, layers
      EXPECT_DOUBLE_EQ(figures.density, static_cast<double>(pairs) / static_cast<double>(causal));
    } else {
      EXPECT_GT(figures.density, 0);
      EXPECT_LE(figures.density, figures.tokens == 1337 ? 0.9 : 1.0);
      if (run.name.find("parity") != std::string::npos) {
        EXPECT_EQ(figures.covered_pairs, figures.published_pairs);
      }
    }
    EXPECT_LE(figures.density, 1.0);
  }
}

TEST(Engine, GivesLogitsInTheOrderAsked) {
  const LongerModel longer("llama-all-biases-fp32");
  const int64_t num_tokens = 1200;
  Recorder recorder;
  std::vector<float> all, last;
  PrefillRequest request = MakeRequest("all", RandomIds(num_tokens, 97, 5), "dense");
  WithEngine({.model_dir = longer.path(), .mesh = {1, 1}}, recorder, [&](PrefillEngine& engine) {
    request.logits_positions.resize(num_tokens);
    std::iota(request.logits_positions.begin(), request.logits_positions.end(), 0);
    LF_ASSERT_OK_AND_ASSIGN(const PrefillResult result, Prefill(engine, recorder, request));
    all = result.logits;
  });
  const std::vector<int64_t> asked = {1199, 0, 130, 0, 1199, 300, 127, 128, 1023, 1024, 1, 899, 700, 515};
  WithEngine({.model_dir = longer.path(), .mesh = {4, 2}}, recorder, [&](PrefillEngine& engine) {
    request.request_id = "some";
    request.logits_positions = asked;
    LF_ASSERT_OK_AND_ASSIGN(const PrefillResult some, Prefill(engine, recorder, request));
    EXPECT_EQ(some.positions, asked);
    std::vector<float> expected;
    for (const int64_t position : asked) {
      expected.insert(expected.end(), all.begin() + position * 97, all.begin() + (position + 1) * 97);
    }
    ExpectNear(some.logits, expected, 1e-3, "logits");
    request.request_id = "none asked";
    request.logits_positions.clear();
    LF_ASSERT_OK_AND_ASSIGN(const PrefillResult none, Prefill(engine, recorder, request));
    EXPECT_EQ(none.positions, std::vector<int64_t>{num_tokens - 1});
    ExpectNear(none.logits, std::vector<float>(all.end() - 97, all.end()), 1e-3, "last logits");
  });
}

TEST(Engine, PlaysPatternsOfHeadsAndAutoAlikeOnAllRanks) {
  const LongerModel longer("llama-all-biases-fp32");  // one layer, two query heads
  const char* json = R"([{"0": ["vertical_and_slash", 40, 120, 1.0], "1": ["stream_llm", 7, 70, 1.0]}])";
  std::vector<float> expected;
  for (const Mesh& mesh : {Mesh{1, 1}, Mesh{2, 2}, Mesh{1, 3}}) {
    Recorder recorder;
    GroupOptions options{.model_dir = longer.path(), .mesh = mesh};
    options.attention.dense_below = 900;
    options.attention.patterns = AttentionSpec{"heads.json", json};
    WithEngine(options, recorder, [&](PrefillEngine& engine) {
      PrefillRequest request = MakeRequest("long", RandomIds(1000, 97, 5), "auto");
      std::string accepted;
      PrefillCallbacks callbacks;
      callbacks.on_accepted = [&](const ResolvedAttention& attention) { accepted = attention.resolved; };
      LF_ASSERT_OK_AND_ASSIGN(const PrefillResult sparse, Prefill(engine, recorder, request, callbacks));
      EXPECT_EQ(sparse.figures.attention, "heads.json (auto)");
      EXPECT_EQ(accepted, sparse.figures.attention);
      EXPECT_LT(sparse.figures.density, 1);
      if (expected.empty()) expected = sparse.logits;
      ExpectNear(sparse.logits, expected, 1e-3, "logits");
      request = MakeRequest("short", RandomIds(899, 97, 5), "auto");
      LF_ASSERT_OK_AND_ASSIGN(const PrefillResult dense, Prefill(engine, recorder, request));
      EXPECT_EQ(dense.figures.attention, "dense (auto: 899 tokens < 900)");
      EXPECT_EQ(dense.figures.density, 1);
    });
  }
}

// Lists of all blocks of so long a prompt are more than there is room for.
TEST(Engine, HeadsWhoseListsHaveNoRoomAreDenseWhereNobodyNamedThePattern) {
  if (kSanitized) GTEST_SKIP() << "takes minutes under a sanitizer";
  const LongerModel longer("llama-all-biases-fp32", 65'700);  // one layer, two query heads
  const std::vector<int32_t> ids(65'700, 3);                  // of equal tokens no block has a small share
  Recorder recorder;
  WithEngine({.model_dir = longer.path(), .mesh = {2, 1}}, recorder, [&](PrefillEngine& engine) {
    PrefillRequest request = MakeRequest("named", ids, "block-share:0,0.000001");
    EXPECT_THAT(Prefill(engine, recorder, request).status(),
                StatusIs(absl::StatusCode::kResourceExhausted, testing::HasSubstr("there is room for")));
    request.request_id = "not named";
    request.attention.dense_without_room = true;
    LF_ASSERT_OK_AND_ASSIGN(const PrefillResult result, Prefill(engine, recorder, request));
    EXPECT_EQ(result.figures.attention, "block-share:0,0.000001, 2 heads dense: no room for their lists");
    EXPECT_EQ(result.figures.heads_without_room, 2);
    EXPECT_EQ(result.figures.density, 1);
  });
}

TEST(Engine, ReportsProgressLayerByLayer) {
  Recorder recorder;
  WithEngine({.model_dir = GoldenModel("llama-gqa4"), .mesh = {2, 1}}, recorder, [&](PrefillEngine& engine) {
    std::vector<PrefillProgress> seen;
    PrefillCallbacks callbacks;
    callbacks.on_progress = [&](const PrefillProgress& progress) { seen.push_back(progress); };
    LF_ASSERT_OK(
        Prefill(engine, recorder, MakeRequest("a", RandomIds(201, 97, 1), "dense"), callbacks).status());
    ASSERT_EQ(seen.size(), 2u);
    for (int64_t layer = 0; layer < 2; ++layer) {
      EXPECT_EQ(seen[layer].layers_done, layer + 1);
      EXPECT_EQ(seen[layer].num_layers, 2);
      EXPECT_EQ(seen[layer].total_tokens, 201);
      EXPECT_EQ(seen[layer].processed_tokens, layer == 0 ? 100 : 201);
      EXPECT_GT(seen[layer].seconds, layer == 0 ? 0 : seen[0].seconds);
    }
  });
}

std::vector<float> Floats(const SafetensorsFile& file, const std::string& name) {
  const SafetensorsTensor* tensor = file.Find(name);
  EXPECT_NE(tensor, nullptr) << name;
  std::vector<float> values(tensor == nullptr ? 0 : tensor->bytes.size() / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), tensor->bytes.data(), tensor->bytes.size());
  return values;
}

TEST(Engine, DenseOnOneRankEqualsTransformers) {
  const std::vector<std::string> folders = GoldenModels();
  ASSERT_FALSE(folders.empty());
  for (const std::string& folder : folders) {
    SCOPED_TRACE(folder);
    LF_ASSERT_OK_AND_ASSIGN(const auto golden, SafetensorsFile::Open(folder + "/golden.safetensors"));
    const SafetensorsTensor* positions = golden->Find("positions");
    ASSERT_NE(positions, nullptr);
    const std::string tokens = ReadText(folder + "/tokens.i32");
    PrefillRequest request = MakeRequest("golden", std::vector<int32_t>(tokens.size() / 4), "dense");
    std::memcpy(request.token_ids.data(), tokens.data(), tokens.size());
    request.logits_positions.resize(positions->bytes.size() / 8);
    std::memcpy(request.logits_positions.data(), positions->bytes.data(), positions->bytes.size());
    Recorder recorder;
    WithEngine({.model_dir = folder, .mesh = {1, 1}}, recorder, [&](PrefillEngine& engine) {
      LF_ASSERT_OK_AND_ASSIGN(const PrefillResult result, Prefill(engine, recorder, request));
      ExpectNear(result.logits, Floats(*golden, "logits"), 1e-4, "logits");
      const PromptKv kv = recorder.Join("golden");
      std::vector<float> key, value;
      for (int64_t layer = 0; layer < kv.num_layers; ++layer) {
        const int64_t size = static_cast<int64_t>(kv.key.size()) / kv.num_layers;
        const auto slice = [&](const std::vector<float>& all) {
          return std::vector<float>(all.begin() + layer * size, all.begin() + (layer + 1) * size);
        };
        ExpectNear(slice(kv.key), Floats(*golden, absl::StrCat("layer.", layer, ".key")), 1e-4, "key");
        ExpectNear(slice(kv.value), Floats(*golden, absl::StrCat("layer.", layer, ".value")), 1e-4, "value");
      }
    });
  }
}

}  // namespace
}  // namespace longfill
