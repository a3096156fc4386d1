#ifndef LONGFILL_KERNELS_CUDA_INDEX_GATHER_BLOCKS_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_GATHER_BLOCKS_CUH_

#include <cstdint>

#include "kernels/cuda/index/row_scores.cuh"

namespace longfill::cuda::share_selection {

// The key blocks whose bits are set in words from *word on, in ascending order, as many as fit into
// gathered[kChunkBlocks] with all of a word: those of one word at least. word_of(w) is asked below num_words.
// *word becomes the next that was not taken; there is none when it is num_words or more. Returns how many
// blocks there are, in all lanes. One warp.
template <typename WordOf>
__device__ __forceinline__ int GatherBlocks(int32_t num_words, const WordOf& word_of, int32_t* gathered,
                                            int32_t* word) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int found = 0;
  int taken = 32;  // words, a prefix of the lanes
  while (taken == 32) {
    const int32_t w = *word + lane;
    uint64_t bits = w < num_words ? word_of(w) : 0;
    const int count = __popcll(bits);
    int inclusive = count;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, inclusive, step);
      if (lane >= step) inclusive += other;
    }
    const bool fits = w < num_words && found + inclusive <= kChunkBlocks;
    if (fits) {
      for (int at = found + inclusive - count; bits != 0; ++at, bits &= bits - 1) {
        gathered[at] = w * 64 + __ffsll(static_cast<long long>(bits)) - 1;
      }
    }
    taken = __popc(__ballot_sync(kAllLanes, fits));
    if (taken > 0) found += __shfl_sync(kAllLanes, inclusive, taken - 1);
    *word += taken;
  }
  return found;
}

}  // namespace longfill::cuda::share_selection

#endif  // LONGFILL_KERNELS_CUDA_INDEX_GATHER_BLOCKS_CUH_
