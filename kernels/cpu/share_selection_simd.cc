#include "kernels/cpu/share_selection_simd.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/share_selection_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/score_rows-inl.h"
#include "kernels/cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace longfill {
namespace HWY_NAMESPACE {

using LaneTag = hn::CappedTag<float, kTileLanes>;

void Score(const float* packed, int64_t head_dim, const float* const* rows, int64_t num_blocks,
           const BlockRows& of_block, float* products, float* scores, float* row_max) {
  const LaneTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  ScoreRows(packed, head_dim, rows, num_blocks * of_block.num, products, nullptr);
  const auto bonus = hn::Set(d, of_block.sample_bonus);
  for (int64_t lane = 0; lane < kTileLanes; lane += lanes) {
    auto highest = hn::Load(d, row_max + lane);
    for (int64_t b = 0; b < num_blocks; ++b) {
      const float* at = products + b * of_block.num * kTileLanes + lane;
      auto score = hn::Load(d, at);
      for (int64_t r = 1; r < of_block.num_samples; ++r) {
        score = hn::Max(score, hn::Load(d, at + r * kTileLanes));
      }
      if (of_block.num_samples > 0) score = hn::Add(score, bonus);
      for (int64_t r = std::max<int64_t>(1, of_block.num_samples); r < of_block.num; ++r) {
        score = hn::Max(score, hn::Load(d, at + r * kTileLanes));
      }
      hn::Store(score, d, scores + b * kTileLanes + lane);
      highest = hn::Max(highest, score);
    }
    hn::Store(highest, d, row_max + lane);
  }
}

void Exponentiate(const float* row_max, int64_t num_blocks, float* scores, float* row_sum) {
  const LaneTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t lane = 0; lane < kTileLanes; lane += lanes) hn::Store(hn::Zero(d), d, row_sum + lane);
  for (int64_t b = 0; b < num_blocks; ++b) {
    for (int64_t lane = 0; lane < kTileLanes; lane += lanes) {
      float* const at = scores + b * kTileLanes + lane;
      const auto power = Exp2(d, hn::Sub(hn::Load(d, at), hn::Load(d, row_max + lane)));
      hn::Store(power, d, at);
      hn::Store(hn::Add(hn::Load(d, row_sum + lane), power), d, row_sum + lane);
    }
  }
}

void Vote(const float* scores, int64_t num_blocks, const float* threshold, uint64_t* bits) {
  const LaneTag d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t b = 0; b < num_blocks; ++b) {
    auto votes = hn::Ge(hn::Load(d, scores + b * kTileLanes), hn::Load(d, threshold));
    for (int64_t lane = lanes; lane < kTileLanes; lane += lanes) {
      votes =
          hn::Or(votes, hn::Ge(hn::Load(d, scores + b * kTileLanes + lane), hn::Load(d, threshold + lane)));
    }
    if (!hn::AllFalse(d, votes)) bits[b / 64] |= uint64_t{1} << (b % 64);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace longfill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longfill {

HWY_EXPORT(Score);
HWY_EXPORT(Exponentiate);
HWY_EXPORT(Vote);

void ScoreBlocks(const float* packed, int64_t head_dim, const float* const* rows, int64_t num_blocks,
                 const BlockRows& of_block, float* products, float* scores, float* row_max) {
  HWY_DYNAMIC_DISPATCH(Score)(packed, head_dim, rows, num_blocks, of_block, products, scores, row_max);
}

void ExponentiateBlocks(const float* row_max, int64_t num_blocks, float* scores, float* row_sum) {
  HWY_DYNAMIC_DISPATCH(Exponentiate)(row_max, num_blocks, scores, row_sum);
}

void VoteForBlocks(const float* scores, int64_t num_blocks, const float* threshold, uint64_t* bits) {
  HWY_DYNAMIC_DISPATCH(Vote)(scores, num_blocks, threshold, bits);
}

}  // namespace longfill
#endif  // HWY_ONCE
