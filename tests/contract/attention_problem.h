#ifndef LONGFILL_TESTS_CONTRACT_ATTENTION_PROBLEM_H_
#define LONGFILL_TESTS_CONTRACT_ATTENTION_PROBLEM_H_

// A prompt with an index for each query head, and what attention over it has to give: for tests of attention.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/oracle/oracle.h"
#include "kernels/sparse/position_map.h"
#include "kernels/sparse/sparse_index.h"

namespace longfill {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One head: its index, and by definition which keys [0, num_tokens) a query covers.
struct Head {
  std::string name;
  SparseIndex index;
  int64_t padded_row_length = 0;  // not 0: a block list that goes to the device in padded form
  std::function<void(int64_t query, std::span<uint8_t> covered)> cover;
};

inline std::vector<int32_t> RandomPicks(int64_t below, int64_t count, uint32_t seed) {
  std::vector<int32_t> all(static_cast<size_t>(below));
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), std::mt19937(seed));
  all.resize(static_cast<size_t>(std::min(below, count)));
  return all;
}

inline Head DenseHead() {
  return {"dense", MakeDenseIndex(), 0, [](int64_t query, std::span<uint8_t> covered) {
            std::fill_n(covered.begin(), query + 1, uint8_t{1});
          }};
}

inline Head AShapeHead(const AShape& pattern) {
  return {"A-shape", MakeAShapeIndex(pattern, 1 << 20), 0, [=](int64_t query, std::span<uint8_t> covered) {
            for (int64_t key = 0; key <= query; ++key) {
              covered[key] = key < pattern.n_init || query - key < pattern.n_local ? 1 : 0;
            }
          }};
}

// Distances exactly, with columns that may lie in their ranges: exact runs at least 64 apart.
inline Head ExactHead(std::vector<DistanceRun> runs, std::vector<int32_t> columns) {
  std::sort(columns.begin(), columns.end());
  DiagonalColumnIndex index;
  index.runs = runs;
  index.columns = columns;
  return {"exact runs", index, 0, [=](int64_t query, std::span<uint8_t> covered) {
            for (const DistanceRun& run : runs) {
              const int64_t begin = std::max<int64_t>(0, query - run.d_hi + 1);
              for (int64_t key = begin; key <= query - run.d_lo; ++key) covered[key] = 1;
            }
            for (int32_t key : columns) {
              if (key <= query) covered[key] = 1;
            }
          }};
}

inline Head VerticalSlashHead(std::vector<int32_t> columns, std::vector<int32_t> distances,
                              Coverage coverage) {
  if (std::find(distances.begin(), distances.end(), 0) == distances.end()) distances.push_back(0);
  Head head;
  head.name = coverage == Coverage::kTiles ? "vertical-slash" : "vertical-slash in parity";
  head.index = MakeVerticalSlashIndex(columns, distances, coverage);
  if (coverage == Coverage::kTiles) {
    const std::vector<int64_t> pieces = oracle::TilePieces(distances);
    head.cover = [=](int64_t query, std::span<uint8_t> covered) {
      const int64_t start = query / kRowBlock * kRowBlock;
      for (int64_t piece : pieces) {
        const int64_t end = std::min(start - piece + kRowBlock, query + 1);
        for (int64_t key = std::max<int64_t>(0, start - piece); key < end; ++key) covered[key] = 1;
      }
      for (int32_t key : columns) {
        if (key <= query) covered[key] = 1;
      }
    };
  } else {
    head.cover = [=](int64_t query, std::span<uint8_t> covered) {
      const oracle::PublishedTile tile = oracle::ConvertPublished(columns, distances, query / kRowBlock);
      for (int64_t start : tile.range_starts) {
        for (int64_t key = start; key < std::min(start + kRowBlock, query + 1); ++key) covered[key] = 1;
      }
      for (int64_t key : tile.columns) covered[key] = 1;
    };
  }
  return head;
}

inline Head RandomVerticalSlash(int64_t n, int64_t num_columns, int64_t num_distances, Coverage coverage,
                                uint32_t seed) {
  return VerticalSlashHead(RandomPicks(n, num_columns, seed), RandomPicks(n, num_distances, seed + 1),
                           coverage);
}

// Without the diagonal block, so that some rows may have no key. In padded form a row block m has
// min(per_row, m + 1) key blocks; otherwise every third has none.
inline Head BlockHead(int64_t n, int64_t per_row, bool padded, uint32_t seed) {
  BlockListIndex index;
  index.row_offsets.push_back(0);
  for (int64_t m = 0; m * kRowBlock < n; ++m) {
    const int64_t count = !padded && m % 3 == 2 ? 0 : per_row;
    std::vector<int32_t> picks = RandomPicks(m + 1, count, seed + static_cast<uint32_t>(m));
    std::sort(picks.begin(), picks.end());
    index.key_blocks.insert(index.key_blocks.end(), picks.begin(), picks.end());
    index.row_offsets.push_back(static_cast<int64_t>(index.key_blocks.size()));
  }
  return {padded ? "padded block list" : "block list", index, padded ? per_row : 0,
          [=](int64_t query, std::span<uint8_t> covered) {
            const int64_t m = query / kRowBlock;
            for (int64_t i = index.row_offsets[m]; i < index.row_offsets[m + 1]; ++i) {
              const int64_t begin = index.key_blocks[i] * kRowBlock;
              for (int64_t key = begin; key < std::min(begin + kRowBlock, query + 1); ++key) covered[key] = 1;
            }
          }};
}

// Every form of coverage, for a prompt of n tokens.
inline std::vector<Head> OneOfEach(int64_t n, uint32_t seed) {
  std::vector<Head> heads;
  heads.push_back(DenseHead());
  heads.push_back(AShapeHead({7, 70}));
  heads.push_back(RandomVerticalSlash(n, n / 8 + 1, n / 16 + 1, Coverage::kTiles, seed));
  heads.push_back(RandomVerticalSlash(n, n / 8 + 1, n / 16 + 1, Coverage::kParity, seed + 7));
  heads.push_back(BlockHead(n, 2, false, seed + 9));
  heads.push_back(BlockHead(n, 3, true, seed + 10));
  heads.push_back(RandomVerticalSlash(n, n, 1, Coverage::kTiles, seed + 11));
  heads.push_back(
      ExactHead({{0, 1, true}, {64, 70, true}, {133, 300, true}}, RandomPicks(n, n / 4, seed + 12)));
  heads.push_back(RandomVerticalSlash(n, 0, n / 64 + 2, Coverage::kTiles, seed + 13));
  heads.push_back(AShapeHead({0, 1}));
  return heads;
}

// Whole prompt: q [num_q_heads, num_tokens, head_dim], k and v [num_kv_heads, num_tokens, head_dim].
struct Prompt {
  int64_t num_tokens = 0, num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::vector<Head> heads;
  std::vector<int32_t> kv_head;  // [num_q_heads]
  std::vector<float> q, k, v;    // values that the compute dtype holds
  float scale = 0;
};

// What some query rows have to give over some keys.
struct Expected {
  oracle::AttentionOutput<double> want;  // out [num_q_heads, rows, head_dim], lse [num_q_heads, rows]
  // Twice the largest error of the same computation with fp32 scores and sums, and with probabilities and
  // results rounded to the compute dtype; at least what rounding a result of this size can cost by itself.
  double tolerance = 0, lse_tolerance = 0;
  int64_t covered_pairs = 0;
};

using Rounding = std::function<std::vector<float>(const std::vector<float>&)>;

// What `rounded` can add to the largest of the values, or to one a little below: of a few values it is
// chance.
inline double LargestRounding(const std::vector<double>& values, const Rounding& rounded) {
  double largest = 0;
  for (const double value : values) largest = std::max(largest, std::abs(value));
  constexpr int kSteps = 1000;
  std::vector<float> near;
  for (int i = 0; i < kSteps; ++i) near.push_back(static_cast<float>(largest * (1 - 0.1 * i / kSteps)));
  const std::vector<float> after = rounded(near);
  double error = 0;
  for (size_t i = 0; i < near.size(); ++i)
    error = std::max(error, std::abs(double{after[i]} - double{near[i]}));
  return error;
}

// Attention row by row in fp32, but for `rounded`.
inline oracle::AttentionOutput<float> NaiveAttention(const oracle::AttentionInput& in,
                                                     std::span<const oracle::Mask> masks,
                                                     const Rounding& rounded) {
  oracle::AttentionOutput<float> result;
  for (int64_t head = 0; head < in.num_q_heads; ++head) {
    for (int64_t row = 0; row < in.num_queries; ++row) {
      const float* q = in.q + (head * in.num_queries + row) * in.head_dim;
      std::vector<const float*> values;
      std::vector<float> p;
      for (int64_t key = 0; key < in.num_keys; ++key) {
        if (!masks[head].At(row, key)) continue;
        const float* k = in.k + (head * in.num_keys + key) * in.head_dim;
        p.push_back(std::inner_product(q, q + in.head_dim, k, 0.0F) * static_cast<float>(in.scale));
        values.push_back(in.v + (head * in.num_keys + key) * in.head_dim);
      }
      std::vector<float> out(static_cast<size_t>(in.head_dim), 0.0F);
      float lse = -kInfinity;
      if (!p.empty()) {
        const float max = *std::max_element(p.begin(), p.end());
        for (float& value : p) value = std::exp(value - max);
        const float sum = std::accumulate(p.begin(), p.end(), 0.0F);
        const std::vector<float> weights = rounded(p);
        for (size_t j = 0; j < values.size(); ++j) {
          for (size_t i = 0; i < out.size(); ++i) out[i] += weights[j] * values[j][i];
        }
        for (float& value : out) value /= sum;
        lse = max + std::log(sum);
      }
      result.out.insert(result.out.end(), out.begin(), out.end());
      result.lse.push_back(lse);
    }
  }
  result.out = rounded(result.out);
  return result;
}

// Of the query rows at `positions` over the keys [key_begin, key_end).
inline Expected ExpectedOf(const Prompt& prompt, std::span<const int64_t> positions, int64_t key_begin,
                           int64_t key_end, const Rounding& rounded) {
  const int64_t n = prompt.num_tokens;
  const int64_t dim = prompt.head_dim;
  const auto num_rows = static_cast<int64_t>(positions.size());
  Expected expected;
  std::vector<float> q, k, v;  // k and v of each query head
  std::vector<oracle::Mask> masks;
  for (int64_t head = 0; head < prompt.num_q_heads; ++head) {
    const int64_t kv_row = prompt.kv_head[head] * n;
    k.insert(k.end(), prompt.k.begin() + kv_row * dim, prompt.k.begin() + (kv_row + n) * dim);
    v.insert(v.end(), prompt.v.begin() + kv_row * dim, prompt.v.begin() + (kv_row + n) * dim);
    oracle::Mask mask(num_rows, n);
    for (int64_t row = 0; row < num_rows; ++row) {
      const auto from = prompt.q.begin() + (head * n + positions[row]) * dim;
      q.insert(q.end(), from, from + dim);
      const std::span<uint8_t> covered(mask.covered.data() + row * n, static_cast<size_t>(n));
      prompt.heads[head].cover(positions[row], covered);
      std::fill_n(covered.begin(), std::min(key_begin, n), uint8_t{0});
      std::fill(covered.begin() + std::min(key_end, n), covered.end(), uint8_t{0});
    }
    expected.covered_pairs += mask.CountPairs();
    masks.push_back(std::move(mask));
  }
  std::vector<const oracle::Mask*> pointers;
  for (const oracle::Mask& mask : masks) pointers.push_back(&mask);
  const oracle::AttentionInput input{.q = q.data(),
                                     .k = k.data(),
                                     .v = v.data(),
                                     .num_q_heads = prompt.num_q_heads,
                                     .num_kv_heads = prompt.num_q_heads,
                                     .num_queries = num_rows,
                                     .num_keys = n,
                                     .head_dim = dim,
                                     .scale = double{prompt.scale}};
  expected.want = oracle::Attention(input, pointers);
  const oracle::AttentionOutput<float> naive = NaiveAttention(input, masks, rounded);
  const auto largest_error = [](const std::vector<float>& got, const std::vector<double>& want) {
    double largest = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      if (double{got[i]} != want[i]) largest = std::max(largest, std::abs(double{got[i]} - want[i]));
    }
    return largest;
  };
  double largest_lse = 0;
  for (double lse : expected.want.lse) {
    if (std::isfinite(lse)) largest_lse = std::max(largest_lse, std::abs(lse));
  }
  const double naive_error = largest_error(naive.out, expected.want.out);
  expected.tolerance = 2 * std::max(naive_error, LargestRounding(expected.want.out, rounded)) + 1e-6;
  // Below a few units in the last place the yardstick is chance.
  expected.lse_tolerance = 2 * largest_error(naive.lse, expected.want.lse) +
                           4 * (1 + largest_lse) * double{std::numeric_limits<float>::epsilon()};
  return expected;
}

}  // namespace longfill

#endif  // LONGFILL_TESTS_CONTRACT_ATTENTION_PROBLEM_H_
