#include "kernels/cpu/attention_tile.h"

#include <cmath>
#include <cstring>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_tile.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/score_rows-inl.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace longfill {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Four dims of all lanes at a time: 16-byte pieces of the rows are gathered, then de-interleaved.
void PackQueries(const AttentionTile& tile, const float* q, int64_t row_stride, int64_t num_rows,
                 float factor) {
  const hn::CappedTag<float, kTileLanes> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto scale = hn::Set(d, factor);
  std::memset(tile.lines, 0, kTileLanes * 4 * sizeof(float));
  for (int64_t i = 0; i < tile.head_dim; i += 4) {
    for (int64_t row = 0; row < num_rows; ++row) {
      std::memcpy(tile.lines + row * 4, q + row * row_stride + i, 4 * sizeof(float));
    }
    float* out = tile.queries + i * kTileLanes;
    for (int64_t lane = 0; lane < kTileLanes; lane += lanes) {
      hn::Vec<decltype(d)> v0, v1, v2, v3;
      hn::LoadInterleaved4(d, tile.lines + lane * 4, v0, v1, v2, v3);
      hn::Store(hn::Mul(v0, scale), d, out + lane);
      hn::Store(hn::Mul(v1, scale), d, out + kTileLanes + lane);
      hn::Store(hn::Mul(v2, scale), d, out + 2 * kTileLanes + lane);
      hn::Store(hn::Mul(v3, scale), d, out + 3 * kTileLanes + lane);
    }
  }
}

// Normalised rows: the inverse of PackQueries. `store` is out + num_rows rows.
void UnpackSums(const AttentionTile& tile, int64_t num_rows, const float* inverse_sum, float* out,
                int64_t row_stride) {
  const hn::CappedTag<float, kTileLanes> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < tile.head_dim; i += 4) {
    const float* sums = tile.sums + i * kTileLanes;
    for (int64_t lane = 0; lane < kTileLanes; lane += lanes) {
      const auto inverse = hn::Load(d, inverse_sum + lane);
      hn::StoreInterleaved4(
          hn::Mul(hn::Load(d, sums + lane), inverse), hn::Mul(hn::Load(d, sums + kTileLanes + lane), inverse),
          hn::Mul(hn::Load(d, sums + 2 * kTileLanes + lane), inverse),
          hn::Mul(hn::Load(d, sums + 3 * kTileLanes + lane), inverse), d, tile.lines + lane * 4);
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      std::memcpy(out + row * row_stride + i, tile.lines + row * 4, 4 * sizeof(float));
    }
  }
}

HWY_INLINE void MaskScores(const AttentionTile& tile, const AttentionChunk& chunk) {
  const hn::CappedTag<float, kTileLanes> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto hidden = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int64_t key = 0; key < chunk.num_keys; ++key) {
    const auto from = hn::Set(d, chunk.visible_from[key]);
    const auto to = hn::Set(d, chunk.visible_to[key]);
    float* scores = tile.scores + key * kTileLanes;
    for (int64_t lane = 0; lane < kTileLanes; lane += lanes) {
      const auto position = hn::Load(d, tile.lane_position + lane);
      const auto visible = hn::And(hn::Ge(position, from), hn::Lt(position, to));
      hn::Store(hn::IfThenElse(visible, hn::Load(d, scores + lane), hidden), d, scores + lane);
    }
  }
}

// Scores become probabilities relative to the running maximum; row_max and row_sum advance, and `factor` is
// what the earlier sums have to be multiplied with.
HWY_INLINE void SoftmaxStep(const AttentionTile& tile, int64_t num_keys) {
  const hn::CappedTag<float, kTileLanes> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto minus_infinity = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int64_t lane = 0; lane < kTileLanes; lane += lanes) {
    float* scores = tile.scores + lane;
    const auto old_max = hn::Load(d, tile.row_max + lane);
    auto max = old_max;
    for (int64_t key = 0; key < num_keys; ++key) max = hn::Max(max, hn::Load(d, scores + key * kTileLanes));
    hn::Store(max, d, tile.row_max + lane);
    // A lane that has seen no key yet: 0 instead of -inf avoids -inf - -inf, every probability below is 0.
    const auto base = hn::IfThenZeroElse(hn::Eq(max, minus_infinity), max);
    auto sum = hn::Zero(d);
    for (int64_t key = 0; key < num_keys; ++key) {
      const auto p = Exp2(d, hn::Sub(hn::Load(d, scores + key * kTileLanes), base));
      hn::Store(p, d, scores + key * kTileLanes);
      sum = hn::Add(sum, p);
    }
    const auto factor = Exp2(d, hn::Sub(old_max, base));
    hn::Store(factor, d, tile.factor + lane);
    hn::Store(hn::MulAdd(hn::Load(d, tile.row_sum + lane), factor, sum), d, tile.row_sum + lane);
  }
}

template <int64_t kDims>
HWY_INLINE void AddValues(const AttentionTile& tile, const AttentionChunk& chunk, int64_t dim) {
  const hn::CappedTag<float, kTileLanes / kVectors> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t lane = 0; lane < kTileLanes; lane += kVectors * lanes) {
    V sum[kDims][kVectors];
    for (int64_t i = 0; i < kDims; ++i) {
      for (int64_t v = 0; v < kVectors; ++v) sum[i][v] = hn::Zero(d);
    }
    const float* HWY_RESTRICT p = tile.scores + lane;
    for (int64_t key = 0; key < chunk.num_keys; ++key, p += kTileLanes) {
      const float* HWY_RESTRICT value = chunk.v_rows[key] + dim;
      V x[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) x[v] = hn::Load(d, p + v * lanes);
      for (int64_t i = 0; i < kDims; ++i) {
        const V y = hn::Set(d, value[i]);
        for (int64_t v = 0; v < kVectors; ++v) sum[i][v] = hn::MulAdd(x[v], y, sum[i][v]);
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      const V factor = hn::Load(d, tile.factor + lane + v * lanes);
      for (int64_t i = 0; i < kDims; ++i) {
        float* out = tile.sums + (dim + i) * kTileLanes + lane + v * lanes;
        hn::Store(hn::MulAdd(hn::Load(d, out), factor, sum[i][v]), d, out);
      }
    }
  }
}

void AddChunk(const AttentionTile& tile, const AttentionChunk& chunk) {
  ScoreRows(tile.queries, tile.head_dim, chunk.k_rows, chunk.num_keys, tile.scores, chunk.v_rows);
  if (chunk.masked) MaskScores(tile, chunk);
  SoftmaxStep(tile, chunk.num_keys);
  for (int64_t dim = 0; dim < tile.head_dim; dim += kValueDims) AddValues<kValueDims>(tile, chunk, dim);
}

}  // namespace HWY_NAMESPACE
}  // namespace longfill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longfill {
namespace {

HWY_EXPORT(PackQueries);
HWY_EXPORT(UnpackSums);
HWY_EXPORT(AddChunk);

constexpr double kLn2 = 0.69314718055994530942;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The union of two results with lse a and b: weights of each, and the lse of both.
struct MergeWeights {
  float first, second, lse;
};
MergeWeights Merge(float a, float b) {
  if (a == -kInfinity) return {0.0F, 1.0F, b};
  if (b == -kInfinity) return {1.0F, 0.0F, a};
  const double max = a > b ? a : b;
  const double weight_a = std::exp(a - max);
  const double weight_b = std::exp(b - max);
  const double sum = weight_a + weight_b;
  return {static_cast<float>(weight_a / sum), static_cast<float>(weight_b / sum),
          static_cast<float>(max + std::log(sum))};
}

}  // namespace

int64_t AttentionTileFloats(int64_t head_dim) { return kTileLanes * (2 * head_dim + kChunkKeys + 4 + 4); }

AttentionTile PlaceAttentionTile(float* memory, int64_t head_dim) {
  AttentionTile tile;
  tile.head_dim = head_dim;
  tile.queries = memory;
  tile.sums = tile.queries + head_dim * kTileLanes;
  tile.scores = tile.sums + head_dim * kTileLanes;
  tile.lines = tile.scores + kChunkKeys * kTileLanes;
  tile.lane_position = tile.lines + 4 * kTileLanes;
  tile.row_max = tile.lane_position + kTileLanes;
  tile.row_sum = tile.row_max + kTileLanes;
  tile.factor = tile.row_sum + kTileLanes;
  return tile;
}

void StartAttentionTile(const AttentionTile& tile, const float* q, int64_t row_stride, int64_t num_rows,
                        float scale) {
  constexpr float kLog2E = 1.44269502F;
  HWY_DYNAMIC_DISPATCH(PackQueries)(tile, q, row_stride, num_rows, scale * kLog2E);
  std::memset(tile.sums, 0, static_cast<size_t>(tile.head_dim * kTileLanes) * sizeof(float));
  for (int64_t lane = 0; lane < kTileLanes; ++lane) {
    tile.row_max[lane] = -kInfinity;
    tile.row_sum[lane] = 0.0F;
  }
}

void AddAttentionChunk(const AttentionTile& tile, const AttentionChunk& chunk) {
  HWY_DYNAMIC_DISPATCH(AddChunk)(tile, chunk);
}

void FinishAttentionTile(const AttentionTile& tile, int64_t num_rows, bool merge, float* out,
                         int64_t row_stride, float* lse) {
  float* inverse = tile.factor;
  for (int64_t lane = 0; lane < kTileLanes; ++lane) {
    const float sum = tile.row_sum[lane];
    inverse[lane] = sum == 0.0F ? 0.0F : 1.0F / sum;
    tile.row_max[lane] =
        sum == 0.0F ? -kInfinity : static_cast<float>((tile.row_max[lane] + std::log2(double{sum})) * kLn2);
  }
  if (!merge) {
    HWY_DYNAMIC_DISPATCH(UnpackSums)(tile, num_rows, inverse, out, row_stride);
    if (lse != nullptr) std::memcpy(lse, tile.row_max, static_cast<size_t>(num_rows) * sizeof(float));
    return;
  }
  // The packed queries are no longer needed: their memory takes the new rows.
  HWY_DYNAMIC_DISPATCH(UnpackSums)(tile, num_rows, inverse, tile.queries, tile.head_dim);
  for (int64_t row = 0; row < num_rows; ++row) {
    const MergeWeights weights = Merge(lse[row], tile.row_max[row]);
    if (tile.row_max[row] == -kInfinity) continue;  // nothing new, the earlier bits stay
    float* earlier = out + row * row_stride;
    const float* added = tile.queries + row * tile.head_dim;
    // An earlier row without keys may hold anything, so it is not multiplied with its weight of 0.
    for (int64_t i = 0; i < tile.head_dim; ++i) {
      earlier[i] = weights.first == 0.0F ? added[i] * weights.second
                                         : earlier[i] * weights.first + added[i] * weights.second;
    }
    lse[row] = weights.lse;
  }
}

}  // namespace longfill
#endif  // HWY_ONCE
