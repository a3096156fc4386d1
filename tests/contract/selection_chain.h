#ifndef LONGFILL_TESTS_CONTRACT_SELECTION_CHAIN_H_
#define LONGFILL_TESTS_CONTRACT_SELECTION_CHAIN_H_

// Vertical-slash selection as a caller runs it, with the keys of a prompt dealt to ranks. All ranks are on
// one backend, each with memory of its own; what ranks exchange goes through the host.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/api/kernel_set.h"
#include "tests/contract/backend_fixture.h"

namespace longfill {

// The keys of each rank. Ranks without keys are legal.
using Deal = std::vector<PositionMap>;

inline Deal ThereAndBack(int64_t num_ranks, int64_t block = kSelectionBlock) {
  Deal deal;
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    deal.push_back({rank * block, block, num_ranks * block, (num_ranks - 1 - 2 * rank) * block});
  }
  return deal;
}
inline Deal OnePiece() { return {PositionMap::Contiguous(0)}; }

inline int64_t BlocksOf(int64_t num_keys) { return (num_keys + kSelectionBlock - 1) / kSelectionBlock; }

struct SelectionShape {
  int64_t num_tokens = 0;
  int64_t num_q_heads = 1;
  int64_t num_kv_heads = 1;
  int64_t head_dim = 64;
  int64_t tokens_after = 0;  // keys behind the selecting queries
  float query_stddev = 1;    // larger: attention on fewer keys
  uint32_t seed = 1;
};

// The selecting queries and the keys of a prompt, as the backend holds them.
struct SelectionPrompt {
  SelectionShape shape;
  int64_t num_queries = 0;
  int64_t first_query = 0;
  float scale = 0;
  std::vector<float> q;  // [num_q_heads, num_queries, head_dim]
  std::vector<float> k;  // [num_kv_heads, num_tokens, head_dim]

  int64_t last_query() const { return first_query + num_queries - 1; }
  int64_t q_per_kv() const { return shape.num_q_heads / shape.num_kv_heads; }
};

// By list (place in the list of heads) and key or distance, whatever the deal.
struct ChainScores {
  std::vector<float> row_max;                                                // [lists, 64]
  std::vector<uint64_t> row_sum;                                             // [lists, 64]
  std::vector<float> vertical;                                               // [lists, num_tokens]
  std::vector<float> slash;                                                  // [lists, num_tokens]
  friend bool operator==(const ChainScores&, const ChainScores&) = default;  // no NaN, no -0 in them
};

class SelectionChainTest : public BackendTest {
 protected:
  SelectionPrompt MakePrompt(const SelectionShape& shape) {
    SelectionPrompt prompt{.shape = shape};
    prompt.num_queries = std::min(kMaxSelectingQueries, shape.num_tokens - shape.tokens_after);
    prompt.first_query = shape.num_tokens - shape.tokens_after - prompt.num_queries;
    prompt.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape.head_dim)));
    prompt.q = Rounded(NormalFloats(shape.num_q_heads * prompt.num_queries * shape.head_dim, shape.seed,
                                    shape.query_stddev));
    prompt.k =
        Rounded(NormalFloats(shape.num_kv_heads * shape.num_tokens * shape.head_dim, shape.seed + 1000));
    return prompt;
  }

  // What one rank has on the backend.
  struct Rank {
    PositionMap positions;
    int64_t num_keys = 0;
    Buffer k;
    LastQueryParams params;
    Workspace workspace;
    Buffer slash;   // windows
    Buffer scores;  // [2 * lists, score_stride]
    int64_t score_stride = 0;
    SelectionLists lists;
  };

  // `row_gap` elements, a multiple of 8, lie between rows. Scores are left on the ranks as JoinScores takes
  // them.
  std::vector<Rank> MakeRanks(const SelectionPrompt& prompt, const Deal& deal, std::span<const int32_t> heads,
                              int64_t row_gap = 0) {
    const int64_t dim = prompt.shape.head_dim;
    const int64_t pitch = dim + row_gap;
    q_ = UploadCompute(Spread(prompt.q, dim, row_gap));
    std::vector<Rank> ranks;
    for (const PositionMap& positions : deal) {
      Rank rank;
      rank.positions = positions;
      rank.num_keys = positions.RowsBelow(prompt.shape.num_tokens);
      std::vector<float> k;
      for (int64_t h = 0; h < prompt.shape.num_kv_heads; ++h) {
        for (int64_t row = 0; row < rank.num_keys; ++row) {
          const auto from = prompt.k.begin() + (h * prompt.shape.num_tokens + positions.Position(row)) * dim;
          k.insert(k.end(), from, from + dim);
        }
      }
      rank.k = UploadCompute(Spread(k, dim, row_gap));
      LastQueryParams& params = rank.params;
      params.q = {q_.data(), prompt.num_queries * pitch, pitch};
      params.num_queries = prompt.num_queries;
      params.first_query_position = prompt.first_query;
      params.k = {rank.k.data(), rank.num_keys * pitch, pitch};
      params.num_keys = rank.num_keys;
      params.key_positions = positions;
      params.heads = heads;
      params.num_q_heads = prompt.shape.num_q_heads;
      params.num_kv_heads = prompt.shape.num_kv_heads;
      params.head_dim = dim;
      params.scale = prompt.scale;
      const auto num_lists = static_cast<int64_t>(heads.size());
      rank.workspace = NewWorkspace(kernels().LastQueryWorkspaceBytes(num_lists, rank.num_keys, dim));
      rank.slash = Bytes(num_lists * BlocksOf(rank.num_keys) * kDiagonalWindow * kFloat);
      rank.score_stride = rank.num_keys + 5;
      rank.scores = Bytes(2 * num_lists * rank.score_stride * kFloat);
      rank.lists = {.scores = rank.scores.as<const float>(),
                    .list_stride = rank.score_stride,
                    .num_entries = rank.num_keys,
                    .num_lists = 2 * num_lists,
                    .positions = positions,
                    .last_query = prompt.last_query()};
      ranks.push_back(std::move(rank));
    }
    return ranks;
  }

  // LastQueryRowMax, RowSum and Score with the reductions between them.
  void ScoreOn(std::vector<Rank>& ranks, ChainScores* scores) {
    const auto rows = static_cast<int64_t>(ranks[0].params.heads.size()) * kMaxSelectingQueries;
    scores->row_max.assign(static_cast<size_t>(rows), -std::numeric_limits<float>::infinity());
    scores->row_sum.assign(static_cast<size_t>(rows), 0);
    const Buffer row_max = Bytes(rows * kFloat);
    for (const Rank& rank : ranks) {
      LF_EXPECT_OK(kernels().LastQueryRowMax(rank.params, row_max.as<float>(), rank.workspace, stream()));
      const std::vector<float> own = Download<float>(row_max.data(), rows);
      for (size_t i = 0; i < own.size(); ++i) scores->row_max[i] = std::max(scores->row_max[i], own[i]);
    }
    const Buffer joint_max = Upload(scores->row_max);
    const Buffer row_sum = Bytes(rows * 8);
    for (const Rank& rank : ranks) {
      LF_EXPECT_OK(kernels().LastQueryRowSum(rank.params, joint_max.as<float>(), row_sum.as<uint64_t>(),
                                             rank.workspace, stream()));
      const std::vector<uint64_t> own = Download<uint64_t>(row_sum.data(), rows);
      for (size_t i = 0; i < own.size(); ++i) scores->row_sum[i] += own[i];
    }
    const Buffer joint_sum = Upload(scores->row_sum);
    for (Rank& rank : ranks) {
      const LastQueryScores out = {rank.scores.as<float>(), 2 * rank.score_stride, rank.slash.as<float>()};
      LF_EXPECT_OK(kernels().LastQueryScore(rank.params, joint_max.as<float>(), joint_sum.as<uint64_t>(), out,
                                            rank.workspace, stream()));
    }
  }

  // JoinScores; one rank takes the form without overlaps.
  void JoinOn(std::vector<Rank>& ranks, const SelectionPrompt& prompt, int64_t forced_keys,
              int64_t forced_distances) {
    const auto num_lists = static_cast<int64_t>(ranks[0].params.heads.size());
    const int64_t all_blocks = BlocksOf(prompt.shape.num_tokens);
    // [lists, blocks of the prompt, 63]: entries 128 on of each window
    std::vector<float> tails(static_cast<size_t>(num_lists * all_blocks * kDiagonalOverlap));
    for (const Rank& rank : ranks) {
      const int64_t blocks = BlocksOf(rank.num_keys);
      const std::vector<float> windows =
          Download<float>(rank.slash.data(), num_lists * blocks * kDiagonalWindow);
      for (int64_t i = 0; i < num_lists * blocks; ++i) {
        const int64_t block = rank.positions.Position(i % blocks * kSelectionBlock) / kSelectionBlock;
        std::copy_n(windows.begin() + i * kDiagonalWindow + kSelectionBlock, kDiagonalOverlap,
                    tails.begin() + (i / blocks * all_blocks + block) * kDiagonalOverlap);
      }
    }
    for (const Rank& rank : ranks) {
      const int64_t blocks = BlocksOf(rank.num_keys);
      std::vector<float> overlaps(static_cast<size_t>(num_lists * blocks * kDiagonalOverlap));
      for (int64_t i = 0; i < num_lists * blocks; ++i) {
        const int64_t block = rank.positions.Position(i % blocks * kSelectionBlock) / kSelectionBlock;
        if (block == 0) continue;
        std::copy_n(tails.begin() + (i / blocks * all_blocks + block - 1) * kDiagonalOverlap,
                    kDiagonalOverlap, overlaps.begin() + i * kDiagonalOverlap);
      }
      const Buffer on_backend = Upload(overlaps);
      JoinScoresParams params;
      params.slash = rank.slash.as<const float>();
      params.overlaps = ranks.size() == 1 ? nullptr : on_backend.as<const float>();
      params.num_heads = num_lists;
      params.num_keys = rank.num_keys;
      params.key_positions = rank.positions;
      params.last_query = prompt.last_query();
      params.forced_keys = forced_keys;
      params.forced_distances = forced_distances;
      params.scores = rank.scores.as<float>();
      params.score_stride = rank.score_stride;
      LF_EXPECT_OK(kernels().JoinScores(params, stream()));
      LF_EXPECT_OK(stream().Sync());  // before the overlaps go
    }
  }

  // Scores of the ranks in the order of keys and distances; checks that nothing is written between lists.
  void CollectScores(const std::vector<Rank>& ranks, const SelectionPrompt& prompt, ChainScores* scores) {
    const int64_t n = prompt.shape.num_tokens;
    const auto num_lists = static_cast<int64_t>(ranks[0].params.heads.size());
    scores->vertical.assign(static_cast<size_t>(num_lists * n), -1.0F);
    scores->slash.assign(static_cast<size_t>(num_lists * n), -1.0F);
    float poison = 0;
    std::fill_n(reinterpret_cast<uint8_t*>(&poison), sizeof(poison), uint8_t{0x7F});
    for (const Rank& rank : ranks) {
      const std::vector<float> own = Download<float>(rank.scores.data(), 2 * num_lists * rank.score_stride);
      for (int64_t list = 0; list < 2 * num_lists; ++list) {
        for (int64_t row = 0; row < rank.num_keys; ++row) {
          const int64_t key = rank.positions.Position(row);
          const float score = own[list * rank.score_stride + row];
          if (list % 2 == 0) scores->vertical[list / 2 * n + key] = score;
          if (list % 2 == 1 && key <= prompt.last_query()) {
            scores->slash[list / 2 * n + prompt.last_query() - key] = score;
          }
        }
        for (int64_t row = rank.num_keys; row < rank.score_stride; ++row) {
          EXPECT_EQ(own[list * rank.score_stride + row], poison) << "written behind list " << list;
        }
      }
    }
  }

  // Selected keys or distances of each list, ascending. `unsettled`: lists that found too few keys.
  std::vector<std::vector<int32_t>> SelectOn(const std::vector<SelectionLists>& ranks,
                                             const std::vector<int64_t>& budgets,
                                             std::vector<size_t>* unsettled = nullptr) {
    const auto num_lists = static_cast<int64_t>(budgets.size());
    const int64_t bins = num_lists * kSelectionBins;
    const Buffer cuts = Bytes(num_lists * static_cast<int64_t>(sizeof(SelectionCut)));
    LF_EXPECT_OK(kernels().SelectionStart(budgets, cuts.as<SelectionCut>(), stream()));
    for (int pass = 0; pass < kSelectionPasses; ++pass) {
      std::vector<uint64_t> joint(static_cast<size_t>(bins));
      const Buffer histogram = Bytes(bins * 8);
      for (const SelectionLists& lists : ranks) {
        LF_EXPECT_OK(kernels().SelectionHistogram(lists, pass, cuts.as<SelectionCut>(),
                                                  histogram.as<uint64_t>(), stream()));
        const std::vector<uint64_t> own = Download<uint64_t>(histogram.data(), bins);
        for (size_t i = 0; i < own.size(); ++i) joint[i] += own[i];
      }
      const Buffer on_backend = Upload(joint);
      LF_EXPECT_OK(kernels().SelectionAdvance(num_lists, pass, on_backend.as<uint64_t>(),
                                              cuts.as<SelectionCut>(), stream()));
      LF_EXPECT_OK(stream().Sync());
    }
    const std::vector<SelectionCut> settled = Download<SelectionCut>(cuts.data(), num_lists);
    for (size_t list = 0; list < settled.size(); ++list) {
      if (settled[list].settled == 1) continue;
      if (unsettled != nullptr) unsettled->push_back(list);
      EXPECT_NE(unsettled, nullptr) << "list " << list << " is not settled";
    }
    words_per_list_ = ranks[0].last_query / 64 + 2;
    bits_.assign(static_cast<size_t>(num_lists * words_per_list_), 0);
    for (const SelectionLists& lists : ranks) {
      const Buffer bits = Upload(std::vector<uint64_t>(bits_.size()));
      LF_EXPECT_OK(kernels().SelectionMark(lists, cuts.as<SelectionCut>(), bits.as<uint64_t>(),
                                           words_per_list_, stream()));
      const std::vector<uint64_t> own = Download<uint64_t>(bits.data(), static_cast<int64_t>(bits_.size()));
      for (size_t i = 0; i < own.size(); ++i) {
        EXPECT_EQ(bits_[i] & own[i], 0U) << "two ranks mark one entry";
        bits_[i] |= own[i];
      }
    }
    return SelectedOf(bits_, words_per_list_);
  }
  std::vector<std::vector<int32_t>> SelectOn(const std::vector<Rank>& ranks,
                                             const std::vector<int64_t>& budgets) {
    std::vector<SelectionLists> lists;
    for (const Rank& rank : ranks) lists.push_back(rank.lists);
    return SelectOn(lists, budgets);
  }

  static std::vector<std::vector<int32_t>> SelectedOf(const std::vector<uint64_t>& bits,
                                                      int64_t words_per_list) {
    std::vector<std::vector<int32_t>> selected(bits.size() / static_cast<size_t>(words_per_list));
    for (size_t list = 0; list < selected.size(); ++list) {
      for (int64_t i = 0; i < words_per_list * 64; ++i) {
        const uint64_t word = bits[list * static_cast<size_t>(words_per_list) + i / 64];
        if ((word >> i % 64 & 1) != 0) selected[list].push_back(static_cast<int32_t>(i));
      }
    }
    return selected;
  }

  static constexpr int64_t kFloat = sizeof(float);
  std::vector<uint64_t> bits_;  // of the last SelectOn, all ranks together
  int64_t words_per_list_ = 0;

 private:
  // Rows of `dim` values with `gap` values after each that would spoil every sum.
  static std::vector<float> Spread(const std::vector<float>& dense, int64_t dim, int64_t gap) {
    std::vector<float> spread;
    for (size_t begin = 0; begin < dense.size(); begin += static_cast<size_t>(dim)) {
      const auto from = dense.begin() + static_cast<int64_t>(begin);
      spread.insert(spread.end(), from, from + dim);
      spread.insert(spread.end(), static_cast<size_t>(gap), std::numeric_limits<float>::quiet_NaN());
    }
    return spread;
  }

  Buffer q_;
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_CONTRACT_SELECTION_CHAIN_H_
