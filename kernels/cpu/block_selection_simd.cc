#include "kernels/cpu/block_selection_simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/block_selection_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/score_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace longfill {
namespace HWY_NAMESPACE {

void ScorePacked(const float* packed, int64_t head_dim, const float* const* rows, int64_t num_rows,
                 float* out) {
  ScoreRows(packed, head_dim, rows, num_rows, out, nullptr);
}

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace longfill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace longfill {

HWY_EXPORT(ScorePacked);
HWY_EXPORT(TargetName);

void ScorePackedRows(const float* packed, int64_t head_dim, const float* const* rows, int64_t num_rows,
                     float* out) {
  HWY_DYNAMIC_DISPATCH(ScorePacked)(packed, head_dim, rows, num_rows, out);
}

const char* InstructionSet() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace longfill
#endif  // HWY_ONCE
