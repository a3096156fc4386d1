// JoinScores and the selection of the largest over lists so long that threads share them, and the errors of
// the CPU. The contract suite holds the definitions at other lengths.

#include <algorithm>
#include <numeric>

#include "tests/unit/cpu/cpu_test_util.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

// One deal of a prompt: a map for each rank.
using Deal = std::vector<PositionMap>;
Deal ThereAndBack(int64_t ranks) {
  Deal deal;
  for (int64_t p = 0; p < ranks; ++p) {
    deal.push_back({p * 128, 128, ranks * 128, (ranks - 1 - 2 * p) * 128});
  }
  return deal;
}
Deal OnePiece() { return {PositionMap::Contiguous(0)}; }

// Lists of a whole prompt: even ones by key, odd ones by distance.
struct Lists {
  int64_t num_tokens = 0;
  std::vector<int64_t> budgets;
  std::vector<std::vector<float>> scores;  // [lists][num_tokens]
};

// Some hundred values, so that cuts fall into ties, with zeros, denormals and forced entries.
Lists TiedLists(int64_t num_tokens, const std::vector<int64_t>& budgets, uint32_t seed) {
  std::mt19937 random(seed);
  Lists lists{num_tokens, budgets, {}};
  for (size_t l = 0; l < budgets.size(); ++l) {
    std::vector<float>& scores = lists.scores.emplace_back(static_cast<size_t>(num_tokens));
    for (float& score : scores) {
      score = static_cast<float>(random() % 200) * (random() % 2 == 0 ? 0x1p-140F : 0.01F);
      if (random() % 40 == 0) score = kTestInfinity;
    }
  }
  return lists;
}

// By sorting: larger scores first, then smaller indices.
std::vector<std::vector<bool>> Expected(const Lists& lists) {
  std::vector<std::vector<bool>> selected;
  for (size_t l = 0; l < lists.scores.size(); ++l) {
    const std::vector<float>& scores = lists.scores[l];
    std::vector<int64_t> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
    std::vector<bool>& bits = selected.emplace_back(scores.size());
    for (int64_t i = 0; i < lists.budgets[l]; ++i) bits[order[i]] = true;
  }
  return selected;
}

// All ranks of a deal, joined as a caller joins them.
std::vector<std::vector<bool>> Select(KernelSet& kernels, Stream& stream, const Lists& lists,
                                      const Deal& deal) {
  const auto num_lists = static_cast<int64_t>(lists.budgets.size());
  const int64_t last_query = lists.num_tokens - 1;
  std::vector<std::vector<float>> scores;
  std::vector<SelectionLists> ranks;
  for (const PositionMap& map : deal) {
    const int64_t entries = map.RowsBelow(lists.num_tokens);
    const int64_t stride = entries + 5;
    std::vector<float>& mine = scores.emplace_back(static_cast<size_t>(num_lists * stride), kTestInfinity);
    for (int64_t l = 0; l < num_lists; ++l) {
      for (int64_t e = 0; e < entries; ++e) {
        const int64_t index = l % 2 == 0 ? map.Position(e) : last_query - map.Position(e);
        mine[l * stride + e] = lists.scores[l][index];
      }
    }
    ranks.push_back({mine.data(), stride, entries, num_lists, map, last_query});
  }
  std::vector<SelectionCut> cuts(num_lists);
  LF_EXPECT_OK(kernels.SelectionStart(lists.budgets, cuts.data(), stream));
  for (int pass = 0; pass < kSelectionPasses; ++pass) {
    std::vector<uint64_t> sum(num_lists * kSelectionBins);
    for (const SelectionLists& rank : ranks) {
      std::vector<uint64_t> histogram(sum.size(), 99);
      LF_EXPECT_OK(kernels.SelectionHistogram(rank, pass, cuts.data(), histogram.data(), stream));
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += histogram[i];
    }
    LF_EXPECT_OK(kernels.SelectionAdvance(num_lists, pass, sum.data(), cuts.data(), stream));
  }
  const int64_t words = (lists.num_tokens + 63) / 64;
  std::vector<uint64_t> bits(num_lists * words);
  for (const SelectionLists& rank : ranks) {
    LF_EXPECT_OK(kernels.SelectionMark(rank, cuts.data(), bits.data(), words, stream));
  }
  std::vector<std::vector<bool>> selected;
  for (int64_t l = 0; l < num_lists; ++l) {
    std::vector<bool>& list = selected.emplace_back(lists.num_tokens);
    for (int64_t i = 0; i < lists.num_tokens; ++i) list[i] = (bits[l * words + i / 64] >> i % 64 & 1) != 0;
  }
  return selected;
}

constexpr int64_t kLong = 150001;

TEST(Selection, TakesWhatASortTakesOverEveryDealAndThreadCount) {
  for (const int64_t n : {int64_t{128}, kLong}) {
    const Lists lists = TiedLists(n, {n, (n + 1) / 2, 0, 1, std::min<int64_t>(n, 700), n / 7}, 3);
    const auto want = Expected(lists);
    for (const int threads : {1, 3}) {
      CpuBackend backend(threads);
      for (const Deal& deal : {OnePiece(), ThereAndBack(1), ThereAndBack(3)}) {
        SCOPED_TRACE(testing::Message()
                     << n << " tokens, " << threads << " threads, " << deal.size() << " ranks");
        EXPECT_EQ(Select(backend.kernels(), backend.stream(), lists, deal), want);
      }
    }
  }
}

TEST(Selection, ErrorsNameWhatIsWrong) {
  CpuBackend backend(1);
  KernelSet& kernels = backend.kernels();
  std::vector<float> scores(64);
  std::vector<SelectionCut> cuts(2);
  std::vector<uint64_t> histogram(2 * kSelectionBins);
  const std::vector<int64_t> budgets = {1, -3};
  EXPECT_THAT(kernels.SelectionStart(budgets, cuts.data(), backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("budget of list 1 -3")));
  SelectionLists lists{scores.data(), 31, 32, 2, PositionMap::Contiguous(0), 31};
  const auto count = [&](int pass) {
    return kernels.SelectionHistogram(lists, pass, cuts.data(), histogram.data(), backend.stream());
  };
  EXPECT_THAT(count(0), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("list_stride 31")));
  lists.list_stride = 32;
  LF_EXPECT_OK(count(0));
  EXPECT_THAT(count(6), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("pass 6 of 6")));
  EXPECT_THAT(kernels.SelectionAdvance(2, -1, histogram.data(), cuts.data(), backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("pass -1 of 6")));
  lists.last_query = 30;
  EXPECT_THAT(count(0), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("last_query 30 below 31")));
  lists.last_query = 64;
  EXPECT_THAT(kernels.SelectionMark(lists, cuts.data(), histogram.data(), 1, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("words_per_list 1")));
}

TEST(JoinScores, AddsTheTwoWindowsOfEachDistanceAndForcesTheNearestOverEveryDeal) {
  constexpr int64_t kHeads = 2, kForcedKeys = 30, kForcedDistances = 100;
  for (const int64_t n : {int64_t{400}, kLong}) {
    const int64_t blocks = (n + 127) / 128;
    std::vector<float> windows = RandomFloats(kHeads * blocks * kDiagonalWindow, 5);
    const std::vector<float> vertical = RandomFloats(kHeads * n, 6);
    // By distance: the sum of all window entries that stand for it, in order of the key blocks.
    std::vector<float> slash(kHeads * n);
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t b = blocks - 1; b >= 0; --b) {
        for (int64_t e = 0; e < kDiagonalWindow; ++e) {
          const int64_t distance = n - 1 - b * 128 - e;
          if (distance >= 0) slash[h * n + distance] += windows[(h * blocks + b) * kDiagonalWindow + e];
        }
      }
    }
    for (const int threads : {1, 3}) {
      CpuBackend backend(threads);
      for (const Deal& deal : {OnePiece(), ThereAndBack(1), ThereAndBack(3)}) {
        for (const PositionMap& map : deal) {
          SCOPED_TRACE(testing::Message() << n << " tokens, " << deal.size() << " ranks, from " << map.first);
          const int64_t keys = map.RowsBelow(n), local = (keys + 127) / 128, stride = keys + 3;
          std::vector<float> mine, overlaps;
          std::vector<float> scores(2 * kHeads * stride, 9.0F);
          for (int64_t h = 0; h < kHeads; ++h) {
            for (int64_t b = 0; b < local; ++b) {
              const int64_t block = map.Position(b * 128) / 128;
              const auto window = windows.begin() + (h * blocks + block) * kDiagonalWindow;
              mine.insert(mine.end(), window, window + kDiagonalWindow);
              for (int64_t e = 0; e < kDiagonalOverlap; ++e) {
                overlaps.push_back(block == 0 ? 0.0F : window[e - kDiagonalOverlap]);
              }
            }
            for (int64_t e = 0; e < keys; ++e) {
              scores[2 * h * stride + e] = vertical[h * n + map.Position(e)];
            }
          }
          const bool whole = deal.size() == 1;
          LF_ASSERT_OK(
              backend.kernels().JoinScores({mine.data(), whole ? nullptr : overlaps.data(), kHeads, keys, map,
                                            n - 1, kForcedKeys, kForcedDistances, scores.data(), stride},
                                           backend.stream()));
          for (int64_t h = 0; h < kHeads; ++h) {
            const float* list = scores.data() + 2 * h * stride;
            for (int64_t e = 0; e < keys; ++e) {
              const int64_t key = map.Position(e), distance = n - 1 - key;
              ASSERT_EQ(list[e], key < kForcedKeys ? kTestInfinity : vertical[h * n + key]) << "key " << key;
              ASSERT_EQ(list[stride + e],
                        distance < kForcedDistances ? kTestInfinity : slash[h * n + distance])
                  << "distance " << distance;
            }
            for (int64_t e = keys; e < stride; ++e) ASSERT_EQ(list[e] + list[stride + e], 18.0F);
          }
        }
      }
    }
  }
}

TEST(JoinScores, ErrorsNameWhatIsWrong) {
  CpuBackend backend(1);
  std::vector<float> data(400);
  JoinScoresParams params{data.data(), nullptr, 1, 4, PositionMap{}, 3, 0, 0, data.data(), 3};
  EXPECT_THAT(backend.kernels().JoinScores(params, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("score_stride 3")));
  params.score_stride = 4;
  params.key_positions = {0, 128, 64};
  EXPECT_THAT(backend.kernels().JoinScores(params, backend.stream()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("block 128, stride 64")));
}

}  // namespace
}  // namespace longfill
