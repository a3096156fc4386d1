// Products of up to 64 packed vectors with rows in memory: the inner loop of attention scores, of the
// last-query scores and of block selection. Included once for each Highway target.
//
// The packed side lies in vector lanes, the rows are broadcast element by element straight from where they
// lie. So keys need no packing, no padding and no particular stride, single columns cost the same as ranges,
// and nothing beyond a row is read. Each product is one chain of multiply-adds over head_dim in ascending
// order, whatever the tiling: equal inputs give equal bits wherever they stand.
#if defined(LONGFILL_KERNELS_CPU_SCORE_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef LONGFILL_KERNELS_CPU_SCORE_ROWS_INL_H_
#undef LONGFILL_KERNELS_CPU_SCORE_ROWS_INL_H_
#else
#define LONGFILL_KERNELS_CPU_SCORE_ROWS_INL_H_
#endif

#include <cstdint>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/cpu/tile_constants.h"

HWY_BEFORE_NAMESPACE();
namespace longfill {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Accumulators must fit the registers: 6 x 4 of 32 for 512 bits, 6 x 2 of 16 below.
inline constexpr int64_t kVectors = HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL ? 4 : 2;

template <int64_t kRows>
HWY_INLINE void ScoreTile(const float* HWY_RESTRICT packed, int64_t head_dim, const float* const* rows,
                          float* HWY_RESTRICT out) {
  const hn::CappedTag<float, kTileLanes / kVectors> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t lane = 0; lane < kTileLanes; lane += kVectors * lanes) {
    V sum[kRows][kVectors];
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t v = 0; v < kVectors; ++v) sum[r][v] = hn::Zero(d);
    }
    const float* HWY_RESTRICT p = packed + lane;
    for (int64_t i = 0; i < head_dim; ++i, p += kTileLanes) {
      V x[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) x[v] = hn::Load(d, p + v * lanes);
      for (int64_t r = 0; r < kRows; ++r) {
        const V y = hn::Set(d, rows[r][i]);
        for (int64_t v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(x[v], y, sum[r][v]);
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t v = 0; v < kVectors; ++v) hn::Store(sum[r][v], d, out + r * kTileLanes + lane + v * lanes);
    }
  }
}

HWY_INLINE void PrefetchRows(const float* const* rows, int64_t begin, int64_t end, int64_t head_dim) {
  constexpr int64_t kLineFloats = 16;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t i = 0; i < head_dim; i += kLineFloats) hwy::Prefetch(rows[r] + i);
  }
}

// out[r][lane] = sum over i of packed[i][lane] * rows[r][i]; packed [head_dim, kTileLanes] and out [num_rows,
// kTileLanes] are aligned to 64 bytes. Asks for the rows that follow and, if not nullptr, for the same
// `later` rows meanwhile: rows of single columns and of short ranges are nothing that the hardware foresees.
HWY_INLINE void ScoreRows(const float* packed, int64_t head_dim, const float* const* rows, int64_t num_rows,
                          float* out, const float* const* later) {
  int64_t r = 0;
  for (; r + kScoreRows <= num_rows; r += kScoreRows) {
    PrefetchRows(rows, r + kScoreRows, HWY_MIN(r + 2 * kScoreRows, num_rows), head_dim);
    if (later != nullptr) PrefetchRows(later, r, r + kScoreRows, head_dim);
    ScoreTile<kScoreRows>(packed, head_dim, rows + r, out + r * kTileLanes);
  }
  for (; r + 2 <= num_rows; r += 2) ScoreTile<2>(packed, head_dim, rows + r, out + r * kTileLanes);
  if (r < num_rows) ScoreTile<1>(packed, head_dim, rows + r, out + r * kTileLanes);
}

}  // namespace HWY_NAMESPACE
}  // namespace longfill
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
