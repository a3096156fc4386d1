#ifndef LONGFILL_KERNELS_CUDA_HOPPER_QUERY_ROWS_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_QUERY_ROWS_CUH_

// Rows of queries and results between global memory and the registers of wgmma.

#include <cstdint>

#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/row_result.cuh"
#include "kernels/cuda/attention/tile_task.cuh"
#include "kernels/cuda/hopper/half_rows.cuh"
#include "kernels/cuda/hopper/row_pieces.cuh"
#include "kernels/cuda/hopper/shared_memory.cuh"

namespace longfill::cuda::hopper {

template <typename Element, typename ShapeOf>
__device__ __forceinline__ void LoadQueries(const attention::Args& args, const SlotReader<ShapeOf>& reader,
                                            HalfRows<Element, ShapeOf>* rows) {
  const Task& task = reader.task();
  const int32_t first_row = reader.first_row();
  const char* q = attention::QueryRow0(args, task.tile_task);
  const int64_t row[2] = {task.row[first_row], task.row[first_row + 8]};
  LoadQueryRows({q + 2 * row[0] * args.q_row_stride, q + 2 * row[1] * args.q_row_stride},
                {row[0] >= 0, row[1] >= 0}, &rows->q);
}

template <typename Element, typename ShapeOf>
__device__ __forceinline__ void StoreRow(char* out, int half, const attention::RowResult& result, bool given,
                                         const HalfRows<Element, ShapeOf>& rows) {
#pragma unroll
  for (int i = 0; i < ShapeOf::kHeadDim / 32; ++i) {
    uint32_t old[4] = {0, 0, 0, 0};
    // Uniform over the lanes of a row only.
    if (__any_sync(attention::kAllLanes, result.old_weight != 0)) {
      if (result.old_weight != 0) {
        const uint4 piece = *reinterpret_cast<const uint4*>(out + 64 * i);
        old[0] = piece.x;
        old[1] = piece.y;
        old[2] = piece.z;
        old[3] = piece.w;
      }
      TransposeInFour(old);
    }
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int place = 4 * (4 * i + j) + 2 * half;
      const float2 before = attention::Unpack2<Element>(old[j]);
      words[j] =
          attention::Pack2<Element>(fmaf(before.x, result.old_weight, rows.out[place] * result.weight),
                                    fmaf(before.y, result.old_weight, rows.out[place + 1] * result.weight));
    }
    TransposeInFour(words);
    if (given) *reinterpret_cast<uint4*>(out + 64 * i) = uint4{words[0], words[1], words[2], words[3]};
  }
}

// Normalises and writes the rows that are given, joined with what is there if args.merge is set.
template <typename Element, typename ShapeOf>
__device__ __forceinline__ void StoreRows(const attention::Args& args, const SlotReader<ShapeOf>& reader,
                                          const HalfRows<Element, ShapeOf>& rows) {
  const Task& task = reader.task();
  const int32_t first_row = reader.first_row();
  float* lse = attention::LseOf(args, task.tile_task);
  int32_t row[2];
  float sum[2];
  float old_lse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = rows.row_sum[half] + __shfl_xor_sync(attention::kAllLanes, rows.row_sum[half], 1);
    sum[half] += __shfl_xor_sync(attention::kAllLanes, sum[half], 2);
    row[half] = task.row[first_row + 8 * half];
    old_lse[half] = args.merge && row[half] >= 0 ? lse[row[half]] : -INFINITY;
  }
  __syncwarp();  // one lane of each four writes what all of them have read
  char* out = attention::OutRow0(args, task.tile_task) + attention::Lane() % 4 * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // With nothing new the earlier bits stay.
    const bool given = row[half] >= 0 && !(args.merge && sum[half] == 0);
    attention::RowResult result = {0, 0, 0};
    if (given) result = attention::ResultOf(rows.row_max[half] * args.scale, sum[half], old_lse[half]);
    StoreRow(out + 2 * row[half] * args.out_row_stride, half, result, given, rows);
    if (given && args.lse != nullptr && attention::Lane() % 4 == 0) lse[row[half]] = result.lse;
  }
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_QUERY_ROWS_CUH_
