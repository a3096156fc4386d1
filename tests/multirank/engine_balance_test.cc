// How evenly the work of a real model at 32K tokens falls on the ranks.

#include <algorithm>
#include <functional>
#include <limits>
#include <list>
#include <numeric>

#include "kernels/api/backend.h"
#include "kernels/sparse/coverage.h"
#include "models/transformer.h"
#include "parallel/head_placement.h"
#include "tests/multirank/engine_group.h"
#include "tests/multirank/needle_32k.h"

namespace longfill {
namespace {

constexpr HeadPattern kPatterns[] = {VerticalSlash{1000, 6096}, VerticalSlash{500, 700}};
constexpr int kSizes[] = {2, 4, 8};

// Q and K of the first layer, which depend on no attention.
class FirstLayer {
 public:
  void Compute() {
    LF_ASSERT_OK_AND_ASSIGN(config_, LoadModelConfig(NeedleModel()));
    LF_ASSERT_OK_AND_ASSIGN(const auto weights, ModelWeights::Load(NeedleModel(), config_));
    LF_ASSERT_OK_AND_ASSIGN(rotary_, BuildRotaryTable(config_.rope, kBalanceTokens));
    const std::vector<int32_t> ids = FillerIds();
    std::vector<float> hidden(kBalanceTokens * config_.hidden_size);
    LF_ASSERT_OK(kernels().Embed({.ids = ids.data(),
                                  .num_rows = kBalanceTokens,
                                  .table = weights->embedding().weight,
                                  .table_dtype = weights->embedding().dtype,
                                  .vocab_size = config_.vocab_size,
                                  .width = config_.hidden_size,
                                  .out = hidden.data()},
                                 backend_->stream()));
    LF_ASSERT_OK(kernels().RmsNorm({.x = hidden.data(),
                                    .weight = weights->layer(0).input_norm,
                                    .epsilon = static_cast<float>(config_.rms_norm_eps),
                                    .num_rows = kBalanceTokens,
                                    .width = config_.hidden_size,
                                    .out = hidden.data()},
                                   backend_->stream()));
    Project(weights->layer(0).q_proj, hidden, &q_);
    Project(weights->layer(0).k_proj, hidden, &k_);
  }

  // Its lists live as long as this object.
  LayerIndex Index(const HeadPattern& pattern) {
    auto created = SparseIndexBuilder::Create(*backend_, *world_, GeometryOf(config_), Coverage::kTiles);
    EXPECT_THAT(created, IsOk());
    SparseIndexBuilder& builder = builders_.emplace_back(*std::move(created));
    const std::vector<HeadPattern> patterns(config_.num_q_heads, pattern);
    const int64_t head_stride = kBalanceTokens * config_.head_dim;
    auto index = builder.Build(ShardPlan({1, 1}, kBalanceTokens), {q_.data(), head_stride, config_.head_dim},
                               {k_.data(), head_stride, config_.head_dim}, patterns);
    EXPECT_THAT(index, IsOk());
    return *std::move(index);
  }

 private:
  void Project(const LinearWeights& linear, const std::vector<float>& x, std::vector<float>* heads) {
    std::vector<float> projected(kBalanceTokens * linear.out_width);
    heads->resize(projected.size());
    LF_ASSERT_OK_AND_ASSIGN(
        const Buffer workspace,
        backend_->memory().Allocate(
            kernels().GemmWorkspaceBytes(kBalanceTokens, linear.in_width, linear.out_width), "GEMM"));
    LF_ASSERT_OK(kernels().Gemm({.x = x.data(),
                                 .x_stride = linear.in_width,
                                 .weight = linear.weight,
                                 .weight_dtype = linear.dtype,
                                 .bias = linear.bias,
                                 .num_rows = kBalanceTokens,
                                 .in_width = linear.in_width,
                                 .out_width = linear.out_width,
                                 .out = projected.data(),
                                 .out_stride = linear.out_width},
                                {workspace.data(), workspace.size_bytes()}, backend_->stream()));
    LF_ASSERT_OK(kernels().Rotary({.x = projected.data(),
                                   .x_stride = linear.out_width,
                                   .inv_freq = rotary_.inv_freq,
                                   .attention_scale = static_cast<float>(rotary_.attention_scale),
                                   .form = config_.rope.form,
                                   .rotary_dim = config_.rope.rotary_dim,
                                   .positions = ShardPlan({1, 1}, kBalanceTokens).TokenPositions(0),
                                   .num_rows = kBalanceTokens,
                                   .num_heads = linear.out_width / config_.head_dim,
                                   .head_dim = config_.head_dim,
                                   .out = heads->data(),
                                   .head_stride = kBalanceTokens * config_.head_dim},
                                  backend_->stream()));
  }

  KernelSet& kernels() { return backend_->kernels(); }

  const std::unique_ptr<Backend> backend_ = CreateCpuBackend(2);
  const std::unique_ptr<Communicator> world_ = CreateSingleCommunicator();
  std::list<SparseIndexBuilder> builders_;
  ModelConfig config_;
  RotaryTable rotary_;
  std::vector<float> q_, k_;  // [heads, tokens, head_dim]
};

// Covered pairs of each rank of a sequence-parallel mesh.
std::vector<int64_t> SequenceLoads(const LayerIndex& index, int size) {
  const ShardPlan plan({size, 1}, kBalanceTokens);
  std::vector<int64_t> loads(size);
  for (const IndexView& head : index.heads) {
    for (int64_t m = 0; m * kRowBlock < kBalanceTokens; ++m) {
      loads[plan.RankOfToken(m * kRowBlock)] += CountRowBlockPairs(head, m, m + 1, kBalanceTokens).covered;
    }
  }
  return loads;
}

// The smallest possible maximum load, by trying every way to deal whole heads to `size` equal ranks.
int64_t BestMaxLoad(const std::vector<int64_t>& costs, int size) {
  int64_t best = std::numeric_limits<int64_t>::max();
  std::vector<int64_t> loads;
  const std::function<void(size_t)> deal = [&](size_t head) {
    if (head == costs.size()) {
      best = std::min(best, *std::max_element(loads.begin(), loads.end()));
      return;
    }
    for (size_t rank = 0; rank < loads.size(); ++rank) {
      loads[rank] += costs[head];
      deal(head + 1);
      loads[rank] -= costs[head];
    }
    if (static_cast<int>(loads.size()) == size) return;
    loads.push_back(costs[head]);  // the empty ranks are alike
    deal(head + 1);
    loads.pop_back();
  };
  deal(0);
  return best;
}

std::vector<int64_t> HeadCosts(const LayerIndex& index) {
  std::vector<int64_t> costs;
  for (const PairCounts& pairs : index.pairs) costs.push_back(pairs.covered);
  return costs;
}

double MaxOverMean(const std::vector<int64_t>& loads) {
  return static_cast<double>(*std::max_element(loads.begin(), loads.end())) *
         static_cast<double>(loads.size()) /
         static_cast<double>(std::accumulate(loads.begin(), loads.end(), int64_t{0}));
}

class BalanceAt32K : public testing::Test {
 protected:
  void SetUp() override {
    if (!HasNeedle()) GTEST_SKIP() << "needs " << NeedleModel() << " and " << FillerFile();
    layer_.Compute();
  }
  FirstLayer layer_;
};

TEST_F(BalanceAt32K, SelectionOfTheFirstLayerFallsEvenlyOnSequenceRanks) {
  for (const HeadPattern& pattern : kPatterns) {
    const LayerIndex index = layer_.Index(pattern);
    for (const int size : kSizes) {
      EXPECT_LE(MaxOverMean(SequenceLoads(index, size)), 1.10)
          << ToString(pattern) << " on " << size << " ranks";
    }
  }
}

TEST_F(BalanceAt32K, HeadsOfTheFirstLayerArePlacedAsWellAsPossible) {
  const std::vector<int32_t> kv_head = {0, 0, 0, 0, 1, 1, 1, 1};
  for (const HeadPattern& pattern : kPatterns) {
    const std::vector<int64_t> costs = HeadCosts(layer_.Index(pattern));
    ASSERT_EQ(costs.size(), kv_head.size());
    for (const int size : kSizes) {
      EXPECT_EQ(PlaceHeads(costs, kv_head, size).max_load, BestMaxLoad(costs, size))
          << ToString(pattern) << " on " << size << " ranks";
    }
  }
}

// The engine's own figures, on the first layer as a model, are those loads. Q and K may differ in their last
// bits with the number of rows of a GEMM, and with them a selected entry.
TEST_F(BalanceAt32K, EngineReachesTheLoadsOfTheSelection) {
  const FirstLayersOfNeedle model(1);
  const LayerIndex index = layer_.Index(VerticalSlash{500, 700});
  for (const Mesh& mesh : {Mesh{4, 1}, Mesh{1, 4}}) {
    Recorder recorder;
    WithEngine({.model_dir = model.path(), .mesh = mesh}, recorder, [&](PrefillEngine& engine) {
      LF_ASSERT_OK_AND_ASSIGN(
          const PrefillResult result,
          Prefill(engine, recorder, MakeRequest("balance", FillerIds(), "vertical-slash:500,700")));
      const PrefillFigures& figures = result.figures;
      ASSERT_EQ(figures.rank_covered_pairs.size(), 4u);
      EXPECT_NEAR(figures.imbalance, MaxOverMean(figures.rank_covered_pairs), 1e-9);
      const std::vector<int64_t> expected = SequenceLoads(index, 4);
      const int64_t most =
          *std::max_element(figures.rank_covered_pairs.begin(), figures.rank_covered_pairs.end());
      if (mesh.head == 1) {
        EXPECT_LE(figures.imbalance, 1.10);
        for (size_t rank = 0; rank < expected.size(); ++rank) {
          EXPECT_NEAR(static_cast<double>(figures.rank_covered_pairs[rank]),
                      static_cast<double>(expected[rank]), 1e-3 * static_cast<double>(expected[rank]));
        }
      } else {
        const double best = static_cast<double>(BestMaxLoad(HeadCosts(index), mesh.head));
        EXPECT_NEAR(static_cast<double>(most), best, 1e-3 * best);
      }
    });
  }
}

}  // namespace
}  // namespace longfill
