#ifndef LONGFILL_KERNELS_CUDA_HOPPER_ROW_PIECES_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_ROW_PIECES_CUH_

// Rows between global memory, in pieces of 16 bytes, and the registers of wgmma, where the four lanes of a
// row have four bytes of each piece.

#include <cstdint>

#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/tile_rows.cuh"

namespace longfill::cuda::hopper {

// Lane t of each four has word t of four pieces, and gets piece t of four words; or back.
__device__ __forceinline__ void TransposeInFour(uint32_t (&words)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (attention::Lane() & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const uint32_t sent = upper ? words[i] : words[i + step];
      const uint32_t received = __shfl_xor_sync(attention::kAllLanes, sent, step);
      if (upper) {
        words[i] = received;
      } else {
        words[i + step] = received;
      }
    }
  }
}

// A lane's two rows, 8 apart, as A of the products (wgmma.cuh). `rows` are where they begin, aligned to 16
// bytes; one that does not exist is zeros, and nothing is read. All lanes of a warp together.
template <int kSteps>
__device__ __forceinline__ void LoadQueryRows(const char* const (&rows)[2], const bool (&exist)[2],
                                              uint32_t (*q)[kSteps][4]) {
  // All loads before the first exchange, so that they wait together.
  uint4 pieces[2][kSteps / 2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const char* const data = rows[half] + attention::Lane() % 4 * 16;
#pragma unroll
    for (int i = 0; i < kSteps / 2; ++i) {
      pieces[half][i] = {0, 0, 0, 0};
      if (exist[half]) pieces[half][i] = *reinterpret_cast<const uint4*>(data + 64 * i);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kSteps / 2; ++i) {
      const uint4 piece = pieces[half][i];
      uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
      TransposeInFour(words);
#pragma unroll
      for (int j = 0; j < 4; ++j) (*q)[2 * i + j / 2][j % 2 * 2 + half] = words[j];
    }
  }
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_ROW_PIECES_CUH_
