#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_WARP_ROWS_CUH_
#define LONGFILL_KERNELS_CUDA_ATTENTION_WARP_ROWS_CUH_

// The rows of a tile that one warp has: scores, online softmax, values, result.

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/attention/key_queue.cuh"
#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/row_result.cuh"
#include "kernels/cuda/attention/tile_memory.cuh"

namespace longfill::cuda::attention {

// One warp's part of a tile: rows [first_row, first_row + kWarpRows) against the chunk in shared memory.
// Lane l holds rows l / 4 and l / 4 + 8 of each row tile (halves 0 and 1).
template <typename Element, typename Shape>
class WarpRows {
 public:
  static constexpr int kHeadDim = Shape::kHeadDim;
  static constexpr int kRowTiles = Shape::kRowTiles;
  static constexpr int kKeyTiles = Shape::kChunkKeys / 8;
  static constexpr int kDimTiles = kHeadDim / 8;

  __device__ __forceinline__ explicit WarpRows(const SharedMemory<Shape>& shared) : shared_(shared) {}

  __device__ __forceinline__ void Start() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max_[i][half] = -INFINITY;
        sum_[i][half] = 0;
      }
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out_[i][d][e] = 0;
      }
    }
  }

  // Scores of the chunk's keys, not scaled.
  __device__ __forceinline__ void Score() {
    const LaneInMatrices at;
    // Q: matrices 0 and 1 are the two halves of the rows, 2 and 3 the same of the next 8 dims.
    const uint32_t q_row = MatrixRow(shared_.q, at.first_row + at.row + 8 * at.odd);
    const int q_place = Swizzle<kHeadDim>(at.row, at.upper);
    // K: matrices 0 and 1 are the two halves of the dims, 2 and 3 the same of the next 8 keys.
    const uint32_t k_row = MatrixRow(shared_.k, at.row + 8 * at.upper);
    const int k_place = Swizzle<kHeadDim>(at.row, at.odd);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores_[i][n][e] = 0;
      }
    }
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        LoadMatrices(q[i], Place(q_row, 16 * i, 2 * step ^ q_place));
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t k[4];
        LoadMatrices(k, Place(k_row, 8 * n, 2 * step ^ k_place));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          MultiplyAdd<Element>(scores_[i][n], q[i], k[0], k[1]);
          MultiplyAdd<Element>(scores_[i][n + 1], q[i], k[2], k[3]);
        }
      }
    }
  }

  // Hides the keys of the gathered chunk at `slot` from the rows that do not see them.
  __device__ __forceinline__ void Mask(int32_t slot) {
    const LaneInFragment at;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      const uint32_t rows_of_two =
          *reinterpret_cast<const uint32_t*>(&shared_.queue.gathered_rows[slot + 8 * n + 2 * at.column]);
#pragma unroll
      for (int key = 0; key < 2; ++key) {
        const uint32_t from = rows_of_two >> (16 * key) & 0xFF;
        const uint32_t count = (rows_of_two >> (16 * key + 8) & 0xFF) - from;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (static_cast<uint32_t>(at.row + 16 * i + 8 * half) - from >= count)
              scores_[i][n][2 * half + key] = -INFINITY;
          }
        }
      }
    }
  }

  // Scores become probabilities relative to the running maximum, and the sums so far relative to it too.
  __device__ __forceinline__ void Softmax(float scale_log2) {
    float factor[kRowTiles][2];
    bool rescale = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float max = max_[i][half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          max = fmaxf(max, fmaxf(scores_[i][n][2 * half], scores_[i][n][2 * half + 1]));
        }
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
        // A row that has seen no key: 0 instead of -inf avoids -inf - -inf, every probability below is 0.
        const float base = max == -INFINITY ? 0 : max * scale_log2;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores_[i][n][e] = FastExp2(fmaf(scores_[i][n][e], scale_log2, -base));
            sum += scores_[i][n][e];
          }
        }
        factor[i][half] = FastExp2(fmaf(max_[i][half], scale_log2, -base));
        rescale |= max != max_[i][half];
        max_[i][half] = max;
        sum_[i][half] = fmaf(sum_[i][half], factor[i][half], sum);
      }
    }
    if (!__any_sync(kAllLanes, rescale)) return;  // all factors are 1
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out_[i][d][e] *= factor[i][e / 2];
      }
    }
  }

  __device__ __forceinline__ void AddValues() {
    const LaneInMatrices at;
    // V, read transposed: matrices 0 and 1 are the two halves of the keys, 2 and 3 the same of the next 8
    // dims.
    const uint32_t v_row = MatrixRow(shared_.v, at.row + 8 * at.odd);
    const int v_place = Swizzle<kHeadDim>(at.row, at.upper);
#pragma unroll
    for (int step = 0; step < Shape::kChunkKeys / 16; ++step) {
      uint32_t p[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const float(&low)[4] = scores_[i][2 * step];
        const float(&high)[4] = scores_[i][2 * step + 1];
        p[i][0] = Pack2<Element>(low[0], low[1]);
        p[i][1] = Pack2<Element>(low[2], low[3]);
        p[i][2] = Pack2<Element>(high[0], high[1]);
        p[i][3] = Pack2<Element>(high[2], high[3]);
      }
#pragma unroll
      for (int d = 0; d < kDimTiles; d += 2) {
        uint32_t v[4];
        LoadMatricesTransposed(v, Place(v_row, 16 * step, d ^ v_place));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          MultiplyAdd<Element>(out_[i][d], p[i], v[0], v[1]);
          MultiplyAdd<Element>(out_[i][d + 1], p[i], v[2], v[3]);
        }
      }
    }
  }

  // Normalises and writes the rows that are given, joined with what is there if args.merge is set.
  __device__ __forceinline__ void Finish(const Args& args) {
    const LaneInFragment at;
    float* lse = LseOf(args, shared_.task);
    float old_lse[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum_[i][half] += __shfl_xor_sync(kAllLanes, sum_[i][half], 1);
        sum_[i][half] += __shfl_xor_sync(kAllLanes, sum_[i][half], 2);
        const int32_t row = shared_.row[at.row + 16 * i + 8 * half];
        old_lse[i][half] = args.merge && row >= 0 ? lse[row] : -INFINITY;
      }
    }
    __syncwarp();  // one lane of each four writes what all of them have read
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = shared_.row[at.row + 16 * i + 8 * half];
        if (row < 0) continue;
        if (args.merge && sum_[i][half] == 0) continue;  // nothing new, the earlier bits stay
        const RowResult result = ResultOf(max_[i][half] * args.scale, sum_[i][half], old_lse[i][half]);
        WriteRow(args, row, at.column, i, half, result);
        if (args.lse != nullptr && at.column == 0) lse[row] = result.lse;
      }
    }
  }

 private:
  // The row whose address this lane gives when four 8 x 8 matrices are loaded: `row` of matrix 2 upper + odd.
  struct LaneInMatrices {
    const int thread = Thread();
    const int first_row = thread / 32 * Shape::kWarpRows;  // of the warp
    const int row = thread & 7;
    const int odd = thread >> 3 & 1;
    const int upper = thread >> 4 & 1;
  };
  // What this lane holds of a 16 x 8 tile of scores or sums: rows `row` and row + 8 of the tile, columns
  // 2 column and 2 column + 1.
  struct LaneInFragment {
    const int thread = Thread();
    const int row = thread / 32 * Shape::kWarpRows + (thread >> 2 & 7);
    const int column = thread & 3;
  };

  __device__ __forceinline__ void WriteRow(const Args& args, int64_t row, int column, int i, int half,
                                           const RowResult& result) const {
    Element* out =
        reinterpret_cast<Element*>(OutRow0(args, shared_.task)) + row * args.out_row_stride + 2 * column;
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d) {
      uint32_t* place = reinterpret_cast<uint32_t*>(out + 8 * d);
      float first = out_[i][d][2 * half] * result.weight;
      float second = out_[i][d][2 * half + 1] * result.weight;
      if (result.old_weight != 0) {  // otherwise what is there may be anything
        const float2 old = Unpack2<Element>(*place);
        first = fmaf(old.x, result.old_weight, first);
        second = fmaf(old.y, result.old_weight, second);
      }
      *place = Pack2<Element>(first, second);
    }
  }
  __device__ __forceinline__ static uint32_t MatrixRow(const char* matrix, int row) {
    return SharedAddress(matrix) + static_cast<uint32_t>(row * Shape::kRowBytes);
  }
  // `rows` further down, at a permuted place of 16 bytes.
  __device__ __forceinline__ static uint32_t Place(uint32_t matrix_row, int rows, int place) {
    return matrix_row + static_cast<uint32_t>(rows * Shape::kRowBytes + place * 16);
  }
  const SharedMemory<Shape>& shared_;
  float scores_[kRowTiles][kKeyTiles][4];
  float out_[kRowTiles][kDimTiles][4];
  float max_[kRowTiles][2];  // of the scores
  float sum_[kRowTiles][2];  // this lane's part
};

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_WARP_ROWS_CUH_
