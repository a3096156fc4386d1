// The forward pass of one rank on every backend of the machine. Meshes are the matter of tests/multirank.

#include "models/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <set>

#include "kernels/sparse/sparse_index.h"
#include "models/device_weights.h"
#include "models/safetensors.h"
#include "tests/contract/backend_fixture.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

std::string GoldenModel(const std::string& name) {
  return std::string(LONGFILL_SOURCE_DIR) + "/tests/golden/data/" + name;
}

std::vector<int32_t> CountingIds(int64_t num_tokens, int32_t modulus) {
  std::vector<int32_t> ids(static_cast<size_t>(num_tokens));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i) % modulus;
  return ids;
}

// Over the largest wanted value, since small ones drown in the sums that they come from.
double RelativeError(const std::vector<float>& got, const std::vector<float>& want) {
  EXPECT_EQ(got.size(), want.size());
  double worst = 0;
  double largest = 0;
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(got[i]) - want[i]));
    largest = std::max(largest, std::abs(static_cast<double>(want[i])));
  }
  return worst / largest;
}

class TransformerTest : public BackendTest {
 protected:
  struct Run {
    std::unique_ptr<const ModelWeights> weights;
    std::unique_ptr<Transformer> transformer;
    std::vector<std::vector<float>> keys, values;  // of each layer, [num_kv_heads, tokens, head_dim]
    LayerFigures figures;
  };

  void Load(const std::string& directory) {
    LF_ASSERT_OK_AND_ASSIGN(config_, LoadModelConfig(directory));
    LF_ASSERT_OK_AND_ASSIGN(host_, ModelWeights::Load(directory, config_));
  }

  void Create(int64_t num_tokens, Run* run) {
    plan_.emplace(Mesh{1, 1}, num_tokens);
    LF_ASSERT_OK_AND_ASSIGN(run->weights, ConvertWeights(*host_, config_, compute_dtype(), backend()));
    LF_ASSERT_OK_AND_ASSIGN(run->transformer,
                            Transformer::Create(config_, *run->weights, backend(), *plan_, 0));
  }

  // The callbacks of a layer. Keys and values are fetched as late as they may be.
  LayerCallbacks Callbacks(Run* run) {
    LayerCallbacks callbacks;
    callbacks.on_kv = [this](int64_t begin, int64_t end, HeadsView<const void> key,
                             HeadsView<const void> value) {
      EXPECT_EQ(begin, seen_.empty() ? 0 : seen_.back().end);
      seen_.push_back({begin, end, key, value});
      return absl::OkStatus();
    };
    callbacks.before_kv_overwrite = [this, run] {
      Fetch(run);
      return absl::OkStatus();
    };
    callbacks.should_stop = [] { return absl::OkStatus(); };
    callbacks.agree = [](const absl::Status& mine) { return mine; };
    return callbacks;
  }

  void Fetch(Run* run) {
    if (seen_.empty()) return;
    EXPECT_EQ(seen_.back().end, plan_->num_tokens());
    std::vector<float> key, value;
    for (int64_t head = 0; head < config_.num_kv_heads; ++head) {
      for (const Piece& piece : seen_) {
        for (const auto& [view, all] : {std::pair(piece.key, &key), std::pair(piece.value, &value)}) {
          const std::vector<float> rows =
              DownloadCompute(Advance(view.data, head * view.head_stride, compute_dtype()),
                              (piece.end - piece.begin) * config_.head_dim);
          all->insert(all->end(), rows.begin(), rows.end());
        }
      }
    }
    run->keys.push_back(key);
    run->values.push_back(value);
    seen_.clear();
  }

  // All layers of a prompt.
  void Prefill(const std::vector<int32_t>& ids, const HeadPattern& pattern, Run* run,
               const std::function<absl::Status(int64_t layer, LayerIndex* index)>& replace_index = nullptr) {
    ASSERT_NO_FATAL_FAILURE(Create(static_cast<int64_t>(ids.size()), run));
    LF_ASSERT_OK(run->transformer->Embed(ids));
    const std::unique_ptr<Communicator> world = CreateSingleCommunicator();
    LF_ASSERT_OK_AND_ASSIGN(
        SparseIndexBuilder builder,
        SparseIndexBuilder::Create(backend(), *world, GeometryOf(config_), Coverage::kTiles));
    LF_ASSERT_OK_AND_ASSIGN(const auto attention,
                            ParallelAttention::Create(backend(), *world, Mesh{1, 1}, GeometryOf(config_)));
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
      const std::vector<HeadPattern> patterns(
          static_cast<size_t>(config_.num_q_heads),
          BoundByWindow(pattern, config_.WindowOf(layer), static_cast<int64_t>(ids.size())));
      LF_ASSERT_OK(run->transformer->RunLayer(
          layer, patterns,
          {.index_builder = &builder, .attention = attention.get(), .replace_index = replace_index},
          Callbacks(run)));
    }
    Fetch(run);
    LF_ASSERT_OK_AND_ASSIGN(run->figures, run->transformer->Figures());
  }

  std::vector<float> Logits(const Run& run, const std::vector<int64_t>& rows) {
    std::vector<float> logits(rows.size() * static_cast<size_t>(config_.vocab_size));
    LF_EXPECT_OK(run.transformer->Logits(rows, logits));
    return logits;
  }

  // Head dims that every backend has attention for.
  static constexpr const char* kModel = "llama-attention-bias";

  ModelConfig config_;
  std::unique_ptr<const ModelWeights> host_;
  std::optional<ShardPlan> plan_;

 private:
  struct Piece {
    int64_t begin, end;
    HeadsView<const void> key, value;
  };
  std::vector<Piece> seen_;  // of the layer that was last projected
};

std::vector<float> Floats(const SafetensorsFile& file, const std::string& name) {
  const SafetensorsTensor* tensor = file.Find(name);
  EXPECT_NE(tensor, nullptr) << name;
  std::vector<float> values(tensor == nullptr ? 0 : tensor->bytes.size() / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), tensor->bytes.data(), tensor->bytes.size());
  return values;
}

// On a GPU: transformers' own bfloat16 runs of these models differ from its fp32 ones by up to 8.5 epsilon of
// the largest value, measured on a CPU; twice that.
TEST_P(TransformerTest, DenseEqualsTransformers) {
  const double bound = on_gpu() ? 17 * epsilon() : 1e-4;
  for (const std::string& folder : GoldenModels()) {
    SCOPED_TRACE(folder);
    ASSERT_NO_FATAL_FAILURE(Load(folder));
    if (on_gpu() && config_.head_dim < 64) continue;
    LF_ASSERT_OK_AND_ASSIGN(const auto golden, SafetensorsFile::Open(folder + "/golden.safetensors"));
    const std::string tokens = ReadText(folder + "/tokens.i32");
    std::vector<int32_t> ids(tokens.size() / 4);
    std::memcpy(ids.data(), tokens.data(), tokens.size());
    const SafetensorsTensor* positions = golden->Find("positions");
    ASSERT_NE(positions, nullptr);
    std::vector<int64_t> rows(positions->bytes.size() / 8);
    std::memcpy(rows.data(), positions->bytes.data(), positions->bytes.size());

    Run run;
    ASSERT_NO_FATAL_FAILURE(Prefill(ids, Dense{}, &run));
    EXPECT_LE(RelativeError(Logits(run, rows), Floats(*golden, "logits")), bound);
    ASSERT_EQ(run.keys.size(), static_cast<size_t>(config_.num_layers));
    for (size_t layer = 0; layer < run.keys.size(); ++layer) {
      const std::string name = "layer." + std::to_string(layer);
      EXPECT_LE(RelativeError(run.keys[layer], Floats(*golden, name + ".key")), bound) << name;
      EXPECT_LE(RelativeError(run.values[layer], Floats(*golden, name + ".value")), bound) << name;
    }
  }
}

// Lengths on both sides of the chunk of the linear layers.
TEST_P(TransformerTest, PlanIsExact) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenModel(kModel)));
  const int64_t chunk = kernels().preferred_rows();
  for (const int64_t num_tokens : {int64_t{0}, int64_t{1}, int64_t{127}, chunk - 1, chunk, 3 * chunk + 1}) {
    SCOPED_TRACE(num_tokens);
    Run run;
    LF_ASSERT_OK_AND_ASSIGN(run.weights, ConvertWeights(*host_, config_, compute_dtype(), backend()));
    const int64_t before = backend().memory().bytes_in_use();
    backend().memory().ResetPeak();
    const ShardPlan plan(Mesh{1, 1}, num_tokens);
    LF_ASSERT_OK_AND_ASSIGN(run.transformer, Transformer::Create(config_, *run.weights, backend(), plan, 0));
    const int64_t planned = Transformer::PlanBytes(config_, kernels(), plan);
    EXPECT_EQ(backend().memory().bytes_in_use() - before, planned);
    if (num_tokens > 0) {
      LF_ASSERT_OK(run.transformer->Embed(std::vector<int32_t>(static_cast<size_t>(num_tokens), 3)));
      Logits(run, {num_tokens - 1});
    }
    EXPECT_EQ(backend().memory().peak_bytes() - before, planned);
    int64_t sum = 0;
    for (const auto& buffer : Transformer::PlanBuffers(config_, kernels(), num_tokens)) sum += buffer.bytes;
    EXPECT_EQ(sum, planned);
    run = {};
    EXPECT_EQ(backend().memory().bytes_in_use(), before - DeviceWeightsBytes(config_, compute_dtype()));
  }
}

TEST_P(TransformerTest, PlanIsOfTheRankWithTheMostTokens) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenModel(kModel)));
  const auto bytes = [&](const Mesh& mesh, int64_t num_tokens) {
    return Transformer::PlanBytes(config_, kernels(), ShardPlan(mesh, num_tokens));
  };
  EXPECT_EQ(bytes({3, 1}, 300), bytes({1, 1}, 128));
  EXPECT_EQ(bytes({2, 2}, 513), bytes({1, 1}, 129));
}

// Values of the first layer depend on the token alone: every chunk finds its ids, rows and places.
TEST_P(TransformerTest, ChunksCoverAPrompt) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenModel(kModel)));
  const int64_t num_tokens = 2 * kernels().preferred_rows() + 77;
  constexpr int32_t kIds = 89;
  Run run;
  ASSERT_NO_FATAL_FAILURE(Prefill(CountingIds(num_tokens, kIds), AShape{64, 256}, &run));
  const auto& values = run.values[0];
  ASSERT_EQ(values.size(), static_cast<size_t>(config_.num_kv_heads * num_tokens * config_.head_dim));
  double worst = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const auto row = static_cast<int64_t>(i) / config_.head_dim % num_tokens;
    const size_t same = i - static_cast<size_t>(row / kIds * kIds * config_.head_dim);
    worst = std::max(worst, std::abs(static_cast<double>(values[i]) - values[same]));
  }
  const float largest = *std::max_element(values.begin(), values.end());
  EXPECT_LE(worst, 4 * epsilon() * largest);
}

// A row's logits do not depend on what else is asked; more rows are asked than fit the buffers at a time.
TEST_P(TransformerTest, LogitsOfManyRowsComeInPieces) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenModel(kModel)));
  constexpr int64_t kTokens = 53;
  Run run;
  ASSERT_NO_FATAL_FAILURE(Prefill(CountingIds(kTokens, 97), Dense{}, &run));
  std::vector<int64_t> rows(4 * kTokens);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int64_t>(i) * i / 7 % kTokens;
  std::iota(rows.begin(), rows.begin() + kTokens, 0);
  const std::vector<float> all = Logits(run, rows);
  const auto vocab = static_cast<std::ptrdiff_t>(config_.vocab_size);
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(i) * vocab;
    EXPECT_LE(RelativeError(std::vector<float>(begin, begin + vocab), Logits(run, {rows[i]})), 4 * epsilon())
        << "row " << i << ", token " << rows[i];
  }
  EXPECT_TRUE(Logits(run, {}).empty());
}

TEST_P(TransformerTest, FiguresAddUp) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenModel(kModel)));
  constexpr int64_t kTokens = 301;
  Run run;
  ASSERT_NO_FATAL_FAILURE(Prefill(CountingIds(kTokens, 97), Dense{}, &run));
  const int64_t pairs = config_.num_layers * config_.num_q_heads * kTokens * (kTokens + 1) / 2;
  EXPECT_EQ(run.figures.pairs.published, pairs);
  EXPECT_EQ(run.figures.pairs.covered, pairs);
  EXPECT_EQ(run.figures.rank_covered_pairs, pairs);
  EXPECT_GE(run.figures.rank_computed_pairs, pairs);
  EXPECT_GT(run.figures.gemm_seconds, 0);
  EXPECT_GT(run.figures.other_seconds, 0);
  EXPECT_GT(run.figures.attention_seconds, 0);
  EXPECT_GE(run.figures.index_seconds, 0);

  LF_ASSERT_OK_AND_ASSIGN(const LayerFigures again, run.transformer->Figures());
  EXPECT_EQ(again.gemm_seconds, run.figures.gemm_seconds);
  Logits(run, {0, 1});
  LF_ASSERT_OK_AND_ASSIGN(const LayerFigures more, run.transformer->Figures());
  EXPECT_GT(more.gemm_seconds, run.figures.gemm_seconds);
  EXPECT_GT(more.other_seconds, run.figures.other_seconds);
  EXPECT_EQ(more.attention_seconds, run.figures.attention_seconds);
}

TEST_P(TransformerTest, AReplacedIndexIsTheOneThatCounts) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenModel(kModel)));
  const std::vector<int32_t> ids = CountingIds(700, 97);
  const auto num_tokens = static_cast<int64_t>(ids.size());
  constexpr AShape kNarrow{16, 64};
  Run expected;
  ASSERT_NO_FATAL_FAILURE(Prefill(ids, kNarrow, &expected));

  const std::vector<SparseIndex> lowered(static_cast<size_t>(config_.num_q_heads),
                                         MakeAShapeIndex(kNarrow, num_tokens));
  const std::vector<IndexView> views = UploadIndices(lowered);
  std::vector<int64_t> asked;
  Run replaced;
  ASSERT_NO_FATAL_FAILURE(Prefill(ids, Dense{}, &replaced, [&](int64_t layer, LayerIndex* index) {
    asked.push_back(layer);
    EXPECT_EQ(index->pairs[0].covered, num_tokens * (num_tokens + 1) / 2);  // the dense one was built
    index->heads = views;
    index->pairs.assign(views.size(), PairCounts{5, 7});
    return absl::OkStatus();
  }));
  EXPECT_EQ(asked.size(), static_cast<size_t>(config_.num_layers));
  EXPECT_EQ(replaced.figures.pairs.published, 5 * config_.num_layers * config_.num_q_heads);
  EXPECT_EQ(replaced.figures.pairs.covered, 7 * config_.num_layers * config_.num_q_heads);
  EXPECT_EQ(replaced.figures.rank_covered_pairs, expected.figures.rank_covered_pairs);
  const std::vector<int64_t> rows = {num_tokens - 1, 300};
  EXPECT_LE(RelativeError(Logits(replaced, rows), Logits(expected, rows)), 4 * epsilon());
}

TEST_P(TransformerTest, ErrorsOfCallbacksEndTheLayer) {
  ASSERT_NO_FATAL_FAILURE(Load(GoldenModel(kModel)));
  Run run;
  const std::vector<int32_t> ids = CountingIds(65, 97);
  ASSERT_NO_FATAL_FAILURE(Prefill(ids, Dense{}, &run));
  const std::unique_ptr<Communicator> world = CreateSingleCommunicator();
  LF_ASSERT_OK_AND_ASSIGN(
      SparseIndexBuilder builder,
      SparseIndexBuilder::Create(backend(), *world, GeometryOf(config_), Coverage::kTiles));
  LF_ASSERT_OK_AND_ASSIGN(const auto attention,
                          ParallelAttention::Create(backend(), *world, Mesh{1, 1}, GeometryOf(config_)));
  const std::vector<HeadPattern> patterns(static_cast<size_t>(config_.num_q_heads), Dense{});
  LayerParallelism parallel = {.index_builder = &builder, .attention = attention.get()};
  const auto layer = [&](const LayerCallbacks& callbacks) {
    return run.transformer->RunLayer(0, patterns, parallel, callbacks);
  };
  const auto says = [](const char* text) { return StatusIs(absl::StatusCode::kDataLoss, HasSubstr(text)); };

  LayerCallbacks callbacks = Callbacks(&run);
  callbacks.on_kv = [](int64_t, int64_t, HeadsView<const void>, HeadsView<const void>) {
    return absl::DataLossError("sink");
  };
  EXPECT_THAT(layer(callbacks), says("sink"));

  callbacks = Callbacks(&run);
  callbacks.before_kv_overwrite = [] { return absl::DataLossError("ring"); };
  callbacks.on_kv = [](int64_t, int64_t, HeadsView<const void>, HeadsView<const void>) {
    ADD_FAILURE() << "projected over keys that are still read";
    return absl::OkStatus();
  };
  EXPECT_THAT(layer(callbacks), says("ring"));

  // Whenever the wish to stop comes, it is what the layer says.
  int polls = 0;
  callbacks = Callbacks(&run);
  callbacks.on_kv = [](int64_t, int64_t, HeadsView<const void>, HeadsView<const void>) {
    return absl::OkStatus();
  };
  callbacks.should_stop = [&] {
    ++polls;
    return absl::OkStatus();
  };
  LF_EXPECT_OK(layer(callbacks));
  ASSERT_GE(polls, 3);
  for (int last = polls; last > 0; --last) {
    int left = last;
    callbacks.should_stop = [&] { return --left > 0 ? absl::OkStatus() : absl::DataLossError("stop"); };
    EXPECT_THAT(layer(callbacks), says("stop")) << "poll " << last << " of " << polls;
  }

  callbacks.should_stop = [] { return absl::OkStatus(); };
  parallel.replace_index = [](int64_t, LayerIndex*) { return absl::DataLossError("replay"); };
  EXPECT_THAT(layer(callbacks), says("replay"));
}

LF_INSTANTIATE_BACKENDS(TransformerTest);

}  // namespace
}  // namespace longfill
