#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SCORE_LIST_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SCORE_LIST_CUH_

#include <cstdint>

#include "kernels/cuda/hopper/index/share_memory.cuh"

namespace longfill::cuda::hopper::share {

// One warp's list of candidate scores, in entries[kMaxEntries], always the same ones. All of it is called by
// whole warps.
class ScoreList {
 public:
  using Rows = share_selection::RowScores<1>;

  // Writes down the candidates of the chunk of these eights. Returns false, and adds nothing, when
  // they do not fit even without those that have turned out to fail.
  __device__ __forceinline__ bool Add(const Rows& rows, const Eight (&eights)[kEights], ScoreEntry* entries) {
    const int lane = attention::Lane();
    const uint32_t candidates = rows.CandidateScores(0);
    const int count = __popc(candidates);
    const int end = attention::InclusiveSum(count);
    const int total = __shfl_sync(attention::kAllLanes, end, 31);
    if (size_ + total > kMaxEntries) Compact(rows, entries);
    if (size_ + total > kMaxEntries) return false;
    ScoreEntry* to = entries + size_ + end - count;
    const uint32_t column_and_row = lane % 4 * 2 * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      const uint32_t first = static_cast<uint32_t>(eights[n].first_block()) * 16 + column_and_row;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // Block 8 n + e % 2, row 8 (e / 2), of the lane's.
        const uint32_t place = e % 2 * 16 + e / 2 * 8;
        if ((candidates >> (4 * n + e) & 1) != 0) *to++ = {rows.scores[0][n][e], first + place};
      }
    }
    size_ += total;
    __syncwarp();
    return true;
  }

  // Calls mark(block) in one lane for each entry that gives its block the share, but for so much.
  template <typename Mark>
  __device__ __forceinline__ void ForEach(const Rows& rows, float slack, const ScoreEntry* entries,
                                          const Mark& mark) const {
    for (int i = 0; i < size_; i += 32) {
      const ScoreEntry entry = EntryOr(entries, i + attention::Lane());
      if (rows.GivesShare(entry.row(), entry.score, slack)) mark(entry.block());
    }
  }

 private:
  // Beyond the end one that gives no share: thresholds are never -infinity.
  __device__ __forceinline__ ScoreEntry EntryOr(const ScoreEntry* entries, int i) const {
    return i < size_ ? entries[i] : ScoreEntry{-INFINITY, 0};
  }
  __device__ __forceinline__ void Compact(const Rows& rows, ScoreEntry* entries) {
    int kept = 0;
    for (int i = 0; i < size_; i += 32) {
      const ScoreEntry entry = EntryOr(entries, i + attention::Lane());
      const bool gives = rows.GivesShare(entry.row(), entry.score, share_selection::kCandidateSlack);
      const uint32_t all = __ballot_sync(attention::kAllLanes, gives);
      __syncwarp();  // all have been read before any is overwritten
      if (gives) entries[kept + __popc(all & attention::LanesBelow(attention::Lane()))] = entry;
      kept += __popc(all);
    }
    size_ = kept;
    __syncwarp();
  }

  int size_ = 0;
};

}  // namespace longfill::cuda::hopper::share

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SCORE_LIST_CUH_
