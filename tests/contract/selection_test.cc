#include <algorithm>
#include <numeric>
#include <random>

#include "kernels/cpu/oracle/oracle.h"
#include "tests/contract/selection_chain.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kForcedKeys = 30;
constexpr int64_t kForcedDistances = 100;

class SelectionTest : public SelectionChainTest {
 protected:
  // Scores [lists][num_entries] by key or distance, dealt to ranks and selected from.
  std::vector<std::vector<int32_t>> Select(const std::vector<std::vector<float>>& scores, const Deal& deal,
                                           const std::vector<int64_t>& budgets,
                                           std::vector<size_t>* unsettled = nullptr) {
    const auto num_entries = static_cast<int64_t>(scores[0].size());
    std::vector<Buffer> buffers;
    std::vector<SelectionLists> ranks;
    for (const PositionMap& positions : deal) {
      SelectionLists lists;
      lists.num_entries = positions.RowsBelow(num_entries);
      lists.list_stride = lists.num_entries + 3;
      lists.num_lists = static_cast<int64_t>(scores.size());
      lists.positions = positions;
      lists.last_query = num_entries - 1;
      std::vector<float> own(static_cast<size_t>(lists.num_lists * lists.list_stride), kInfinity);
      for (int64_t list = 0; list < lists.num_lists; ++list) {
        for (int64_t e = 0; e < lists.num_entries; ++e) {
          const int64_t position = positions.Position(e);
          own[list * lists.list_stride + e] =
              scores[list][list % 2 == 1 ? lists.last_query - position : position];
        }
      }
      buffers.push_back(Upload(own));
      lists.scores = buffers.back().as<const float>();
      ranks.push_back(lists);
    }
    return SelectOn(ranks, budgets, unsettled);
  }

  void ChainAgainstOracle(const SelectionShape& shape, const Deal& deal,
                          const std::vector<VerticalSlash>& budgets);
};
LF_INSTANTIATE_BACKENDS(SelectionTest);

// By definition: larger scores first, then smaller indices.
std::vector<int32_t> Largest(const std::vector<float>& scores, int64_t budget) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  order.resize(static_cast<size_t>(budget));
  std::sort(order.begin(), order.end());
  return order;
}

// Lists that stop the search for the cut at every digit.
std::vector<std::vector<float>> HardLists(int64_t num_entries, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<std::vector<float>> lists;
  const auto add = [&](const auto& score) {
    std::vector<float>& list = lists.emplace_back();
    for (int64_t i = 0; i < num_entries; ++i) list.push_back(score(i));
  };
  add([&](int64_t) { return std::exp(std::normal_distribution<float>(-9, 3)(generator)); });
  add([&](int64_t) { return std::exp(std::normal_distribution<float>(-9, 3)(generator)); });
  add([](int64_t) { return 0.0F; });
  add([](int64_t) { return 0.25F; });
  add([&](int64_t) { return static_cast<float>(generator() % 3); });
  add([&](int64_t i) { return i < 100 ? kInfinity : static_cast<float>(generator() % 100000) * 1e-3F; });
  add([](int64_t i) { return static_cast<float>(i); });
  add([](int64_t i) { return 1.0F + static_cast<float>(i % 7) * 0x1p-23F; });  // differ in the last bits
  add([](int64_t i) { return i % 2 == 0 ? 0x1p-149F : 0.0F; });                // subnormal
  add([](int64_t i) { return i == 5 ? 1.0F : 0.0F; });
  return lists;
}

TEST_P(SelectionTest, TakesTheLargestAndTheLowerOfEquals) {
  for (const int64_t n : {1, 63, 64, 65, 127, 128, 129, 1000, 8192}) {
    const std::vector<std::vector<float>> lists = HardLists(n, static_cast<uint32_t>(n));
    for (const int64_t wanted : {int64_t{0}, int64_t{1}, n / 3, n - 1, n}) {
      SCOPED_TRACE(testing::Message() << wanted << " of " << n);
      const std::vector<int64_t> budgets(lists.size(), wanted);
      const auto got = Select(lists, OnePiece(), budgets);
      for (size_t list = 0; list < lists.size(); ++list) {
        EXPECT_EQ(got[list], Largest(lists[list], wanted)) << "list " << list;
      }
    }
  }
}

TEST_P(SelectionTest, DoesNotDependOnTheDeal) {
  for (const int64_t n : {1, 129, 1000, 8192}) {
    const std::vector<std::vector<float>> lists = HardLists(n, 7);
    std::vector<int64_t> budgets;
    for (size_t list = 0; list < lists.size(); ++list) {
      budgets.push_back(static_cast<int64_t>(list) * n / static_cast<int64_t>(lists.size()));
    }
    const auto one = Select(lists, OnePiece(), budgets);
    for (size_t list = 0; list < lists.size(); ++list)
      EXPECT_EQ(one[list], Largest(lists[list], budgets[list]));
    for (const int64_t ranks : {1, 2, 3, 4}) {
      EXPECT_EQ(Select(lists, ThereAndBack(ranks), budgets), one) << n << " entries, " << ranks << " ranks";
    }
    // Pieces that are no multiple of 32 or 64.
    EXPECT_EQ(Select(lists, ThereAndBack(3, 50), budgets), one) << n << " entries, pieces of 50";
    EXPECT_EQ(Select(lists, ThereAndBack(2, 1), budgets), one) << n << " entries, pieces of 1";
  }
}

TEST_P(SelectionTest, ManyListsAtOnce) {
  const int64_t n = 300, num_lists = 300;
  std::vector<std::vector<float>> lists;
  std::vector<int64_t> budgets;
  for (int64_t list = 0; list < num_lists; ++list) {
    lists.push_back(HardLists(n, static_cast<uint32_t>(list))[0]);
    budgets.push_back(list);
  }
  const auto got = Select(lists, ThereAndBack(2), budgets);
  for (int64_t list = 0; list < num_lists; ++list) EXPECT_EQ(got[list], Largest(lists[list], list));
}

TEST_P(SelectionTest, AListWithTooFewKeysStaysUnsettledAndSelectsNothing) {
  const std::vector<std::vector<float>> lists = HardLists(200, 3);
  std::vector<int64_t> budgets(lists.size(), 50);
  budgets[1] = 201;
  budgets[4] = 1000000;
  std::vector<size_t> unsettled;
  const auto got = Select(lists, ThereAndBack(2), budgets, &unsettled);
  EXPECT_EQ(unsettled, (std::vector<size_t>{1, 4}));
  for (size_t list = 0; list < lists.size(); ++list) {
    const int64_t selected = list == 1 || list == 4 ? 0 : 50;
    EXPECT_EQ(got[list], Largest(lists[list], selected)) << "list " << list;
  }
}

TEST_P(SelectionTest, JoinsWindowsAndForcesEntries) {
  for (const int64_t n : {1, 127, 128, 129, 700}) {
    for (const int64_t num_ranks : {1, 2, 3}) {
      SCOPED_TRACE(testing::Message() << n << " keys, " << num_ranks << " ranks");
      const int64_t heads = 2;
      SelectionPrompt prompt{.shape = {.num_tokens = n}, .num_queries = 1, .first_query = n - 1};
      const std::vector<float> windows = NormalFloats(heads * BlocksOf(n) * kDiagonalWindow, 5);
      const std::vector<float> vertical = NormalFloats(heads * n, 6);
      const std::vector<int32_t> list_of_heads = {0, 1};
      std::vector<Rank> ranks;
      for (const PositionMap& positions : ThereAndBack(num_ranks)) {
        Rank rank;
        rank.positions = positions;
        rank.num_keys = positions.RowsBelow(n);
        rank.score_stride = rank.num_keys + 5;
        rank.params.heads = list_of_heads;
        std::vector<float> own;
        for (int64_t i = 0; i < heads * BlocksOf(rank.num_keys); ++i) {
          const int64_t blocks = BlocksOf(rank.num_keys);
          const int64_t block = positions.Position(i % blocks * kSelectionBlock) / kSelectionBlock;
          const auto from = windows.begin() + (i / blocks * BlocksOf(n) + block) * kDiagonalWindow;
          own.insert(own.end(), from, from + kDiagonalWindow);
        }
        rank.slash = Upload(own);
        std::vector<float> scores(static_cast<size_t>(2 * heads * rank.score_stride));
        std::fill_n(reinterpret_cast<uint8_t*>(scores.data()), scores.size() * 4, uint8_t{0x7F});
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t row = 0; row < rank.num_keys; ++row) {
            scores[2 * h * rank.score_stride + row] = vertical[h * n + positions.Position(row)];
          }
        }
        rank.scores = Upload(scores);
        ranks.push_back(std::move(rank));
      }
      JoinOn(ranks, prompt, kForcedKeys, kForcedDistances);
      ChainScores got;
      CollectScores(ranks, prompt, &got);
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t key = 0; key < n; ++key) {
          const int64_t block = key / kSelectionBlock, e = key % kSelectionBlock;
          const float* window = windows.data() + (h * BlocksOf(n) + block) * kDiagonalWindow;
          float slash = window[e];
          if (block > 0 && e < kDiagonalOverlap) slash += window[kSelectionBlock + e - kDiagonalWindow];
          const int64_t distance = n - 1 - key;
          ASSERT_EQ(got.slash[h * n + distance], distance < kForcedDistances ? kInfinity : slash) << key;
          ASSERT_EQ(got.vertical[h * n + key], key < kForcedKeys ? kInfinity : vertical[h * n + key]) << key;
        }
      }
    }
  }
}

// Every score that is larger than the smallest selected one by 1e-4 of it must be selected, none that is as
// much smaller may be; the count is exact, forced ones are in.
void CheckSelected(const std::vector<int32_t>& got, const std::vector<double>& scores, int64_t num_forced,
                   int64_t budget) {
  ASSERT_EQ(static_cast<int64_t>(got.size()), budget);
  std::vector<double> ranked = scores;
  for (int64_t i = 0; i < std::min<int64_t>(num_forced, std::ssize(ranked)); ++i) {
    ranked[i] = std::numeric_limits<double>::infinity();
  }
  std::vector<double> sorted = ranked;
  std::nth_element(sorted.begin(), sorted.begin() + budget - 1, sorted.end(), std::greater<>());
  const double cut = sorted[static_cast<size_t>(budget - 1)];
  size_t next = 0;
  for (int32_t i = 0; i < std::ssize(ranked); ++i) {
    const bool selected = next < got.size() && got[next] == i;
    next += selected ? 1 : 0;
    if (std::isinf(cut)) {
      ASSERT_TRUE(!selected || std::isinf(ranked[i])) << "entry " << i << " is selected before forced ones";
      continue;
    }
    if (ranked[i] > cut * (1 + 1e-4)) {
      ASSERT_TRUE(selected) << "entry " << i << ": " << ranked[i] << ", cut " << cut;
    }
    if (ranked[i] < cut * (1 - 1e-4)) {
      ASSERT_FALSE(selected) << "entry " << i << ": " << ranked[i] << ", cut " << cut;
    }
  }
}

void SelectionTest::ChainAgainstOracle(const SelectionShape& shape, const Deal& deal,
                                       const std::vector<VerticalSlash>& budgets) {
  const int64_t n = shape.num_tokens;
  SCOPED_TRACE(testing::Message() << n << " tokens on " << deal.size() << " ranks, head dim "
                                  << shape.head_dim);
  const SelectionPrompt prompt = MakePrompt(shape);
  std::vector<int32_t> heads(static_cast<size_t>(shape.num_q_heads));
  std::iota(heads.begin(), heads.end(), 0);
  std::vector<Rank> ranks = MakeRanks(prompt, deal, heads);
  ChainScores scores;
  ScoreOn(ranks, &scores);
  JoinOn(ranks, prompt, kForcedKeys, kForcedDistances);
  std::vector<int64_t> counts;
  for (const int32_t head : heads) {
    counts.push_back(std::min(n, std::max<int64_t>(budgets[head].vertical, 30)));
    counts.push_back(std::min(n, std::max<int64_t>(budgets[head].slash, 50)));
  }
  const auto got = SelectOn(ranks, counts);
  for (const int32_t head : heads) {
    SCOPED_TRACE(testing::Message() << "head " << head);
    std::vector<float> q(static_cast<size_t>(n * shape.head_dim));  // only the last queries matter
    std::copy_n(prompt.q.begin() + head * prompt.num_queries * shape.head_dim,
                prompt.num_queries * shape.head_dim, q.end() - prompt.num_queries * shape.head_dim);
    const oracle::VerticalSlashSelection want =
        oracle::SelectVerticalSlash(q.data(), prompt.k.data() + head / prompt.q_per_kv() * n * shape.head_dim,
                                    n, shape.head_dim, prompt.scale, budgets[head]);
    CheckSelected(got[2 * head], want.vertical_scores, kForcedKeys, counts[2 * head]);
    CheckSelected(got[2 * head + 1], want.slash_scores, kForcedDistances, counts[2 * head + 1]);
  }
}

TEST_P(SelectionTest, ChainAgreesWithTheOracle) {
  for (const int64_t n : {1, 63, 64, 65, 127, 128, 129, 1000, 8192}) {
    const SelectionShape shape = {
        .num_tokens = n, .num_q_heads = 4, .num_kv_heads = 2, .head_dim = 128, .query_stddev = 2};
    const std::vector<VerticalSlash> budgets = {{100, 200}, {1, 1}, {n, n}, {n / 2, 60}};
    for (const int64_t num_ranks : {1, 3}) ChainAgainstOracle(shape, ThereAndBack(num_ranks), budgets);
  }
}

TEST_P(SelectionTest, ChainAgreesWithTheOracleOnALongPrompt) {
  if (!on_gpu()) GTEST_SKIP() << "for GPUs";
  ChainAgainstOracle(
      {.num_tokens = 131072, .num_q_heads = 2, .num_kv_heads = 1, .head_dim = 128, .query_stddev = 2},
      OnePiece(), {{1000, 6096}, {30, 800}});
}

TEST_P(SelectionTest, SaysWhatIsWrong) {
  const Buffer scores = Upload(std::vector<float>(100));
  const Buffer cuts = Bytes(static_cast<int64_t>(sizeof(SelectionCut)));
  const Buffer histogram = Bytes(kSelectionBins * 8);
  SelectionLists lists;
  lists.scores = scores.as<float>();
  lists.list_stride = 100;
  lists.num_entries = 100;
  lists.num_lists = 1;
  lists.last_query = 99;
  const auto invalid = [](const char* message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  const std::vector<int64_t> budgets = {-1};
  EXPECT_THAT(kernels().SelectionStart(budgets, cuts.as<SelectionCut>(), stream()), invalid("-1"));
  EXPECT_THAT(
      kernels().SelectionHistogram(lists, 6, cuts.as<SelectionCut>(), histogram.as<uint64_t>(), stream()),
      invalid("pass 6 of 6"));
  EXPECT_THAT(kernels().SelectionMark(lists, cuts.as<SelectionCut>(), histogram.as<uint64_t>(), 1, stream()),
              invalid("words_per_list"));
  lists.list_stride = 99;
  EXPECT_THAT(
      kernels().SelectionHistogram(lists, 0, cuts.as<SelectionCut>(), histogram.as<uint64_t>(), stream()),
      invalid("list_stride"));
}

}  // namespace
}  // namespace longfill
