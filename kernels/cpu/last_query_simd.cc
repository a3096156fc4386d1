#include "kernels/cpu/last_query_simd.h"

#include <cstring>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/last_query_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/score_rows-inl.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace longfill {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using LaneTag = hn::CappedTag<float, kTileLanes>;

// Lanes below the limit see the key.
HWY_INLINE float VisibleLanes(const LastQueryTile& tile, const LastQueryKeys& keys, int64_t key) {
  const int64_t lanes = keys.last_distance - key + 1;
  return static_cast<float>(HWY_MAX(int64_t{0}, HWY_MIN(lanes, tile.num_queries)));
}

void MaxOverKeys(const LastQueryTile& tile, const LastQueryKeys& keys, float* max) {
  const LaneTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  ScoreRows(tile.queries, tile.head_dim, keys.rows, keys.num_keys, tile.scores, nullptr);
  const auto scale = hn::Set(d, tile.scale);
  const auto hidden = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int64_t key = 0; key < keys.num_keys; ++key) {
    const auto limit = hn::Set(d, VisibleLanes(tile, keys, key));
    const float* scores = tile.scores + key * kTileLanes;
    for (int64_t lane = 0; lane < kTileLanes; lane += lanes) {
      const auto visible = hn::Lt(hn::Iota(d, static_cast<float>(lane)), limit);
      const auto score = hn::IfThenElse(visible, hn::Mul(hn::Load(d, scores + lane), scale), hidden);
      hn::StoreU(hn::Max(hn::LoadU(d, max + lane), score), d, max + lane);
    }
  }
}

// tile.scores become factor * exp(score - max), 0 where the key is not visible.
HWY_INLINE void Exponentials(const LastQueryTile& tile, const LastQueryKeys& keys, const float* max,
                             const float* factor) {
  const LaneTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  ScoreRows(tile.queries, tile.head_dim, keys.rows, keys.num_keys, tile.scores, nullptr);
  const auto scale = hn::Set(d, tile.scale);
  for (int64_t key = 0; key < keys.num_keys; ++key) {
    const auto limit = hn::Set(d, VisibleLanes(tile, keys, key));
    float* scores = tile.scores + key * kTileLanes;
    for (int64_t lane = 0; lane < kTileLanes; lane += lanes) {
      const auto visible = hn::Lt(hn::Iota(d, static_cast<float>(lane)), limit);
      const auto score = hn::Mul(hn::Load(d, scores + lane), scale);
      const auto e = Exp(d, hn::Sub(score, hn::LoadU(d, max + lane)));
      hn::Store(hn::IfThenElseZero(visible, hn::Mul(e, hn::LoadU(d, factor + lane))), d, scores + lane);
    }
  }
}

void SumOverKeys(const LastQueryTile& tile, const LastQueryKeys& keys, const float* max, const float* ones,
                 double* sum) {
  Exponentials(tile, keys, max, ones);
  const hn::CappedTag<double, kTileLanes> d;
  const hn::Rebind<float, decltype(d)> df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto unit = hn::Set(d, 0x1p40);
  const auto half = hn::Set(d, 0.5);
  for (int64_t lane = 0; lane < kTileLanes; lane += lanes) {
    auto total = hn::LoadU(d, sum + lane);
    for (int64_t key = 0; key < keys.num_keys; ++key) {
      // The product and the addition are exact (24 bits of mantissa, at most 2^40), so this is llround.
      const auto e = hn::PromoteTo(d, hn::Load(df, tile.scores + key * kTileLanes + lane));
      total = hn::Add(total, hn::Floor(hn::Add(hn::Mul(e, unit), half)));
    }
    hn::StoreU(total, d, sum + lane);
  }
}

void ProbabilitiesOfKeys(const LastQueryTile& tile, const LastQueryKeys& keys, const float* max,
                         const float* inverse_sum, float* window) {
  Exponentials(tile, keys, max, inverse_sum);
  const LaneTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t key = 0; key < keys.num_keys; ++key) {
    for (int64_t lane = 0; lane < kTileLanes; lane += lanes) {
      float* entries = window + key + lane;
      hn::StoreU(hn::Add(hn::LoadU(d, entries), hn::Load(d, tile.scores + key * kTileLanes + lane)), d,
                 entries);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace longfill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longfill {
namespace {

HWY_EXPORT(MaxOverKeys);
HWY_EXPORT(SumOverKeys);
HWY_EXPORT(ProbabilitiesOfKeys);

struct Ones {
  float data[kTileLanes];
  constexpr Ones() : data() {
    for (float& value : data) value = 1.0F;
  }
};
constexpr Ones kOnes;

// Sums over the queries in ascending order, which is from the last lane down; four keys at a time hide the
// latency.
void SumLanes(const float* scores, int64_t num_keys, int64_t num_queries, float* vertical) {
  int64_t key = 0;
  for (; key + 4 <= num_keys; key += 4, scores += 4 * kTileLanes) {
    float sum[4] = {};
    for (int64_t lane = num_queries - 1; lane >= 0; --lane) {
      for (int64_t i = 0; i < 4; ++i) sum[i] += scores[i * kTileLanes + lane];
    }
    std::memcpy(vertical + key, sum, sizeof(sum));
  }
  for (; key < num_keys; ++key, scores += kTileLanes) {
    float sum = 0.0F;
    for (int64_t lane = num_queries - 1; lane >= 0; --lane) sum += scores[lane];
    vertical[key] = sum;
  }
}

}  // namespace

void LastQueryMax(const LastQueryTile& tile, const LastQueryKeys& keys, float* max) {
  HWY_DYNAMIC_DISPATCH(MaxOverKeys)(tile, keys, max);
}

void LastQuerySum(const LastQueryTile& tile, const LastQueryKeys& keys, const float* max, double* sum) {
  HWY_DYNAMIC_DISPATCH(SumOverKeys)(tile, keys, max, kOnes.data, sum);
}

void LastQueryProbabilities(const LastQueryTile& tile, const LastQueryKeys& keys, const float* max,
                            const float* inverse_sum, float* vertical, float* slash) {
  static_assert(kDiagonalWindow ==
                kSelectionBlock + kTileLanes - 1);  // the last key's lanes end at the window's end
  std::memset(slash, 0, static_cast<size_t>(kDiagonalWindow) * sizeof(float));
  HWY_DYNAMIC_DISPATCH(ProbabilitiesOfKeys)(tile, keys, max, inverse_sum, slash);
  SumLanes(tile.scores, keys.num_keys, tile.num_queries, vertical);
}

}  // namespace longfill
#endif  // HWY_ONCE
