#ifndef LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_ARGS_H_
#define LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_ARGS_H_

// What the kernels of the last queries are given, and how their work is cut up.

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>

#include "kernels/api/kernel_set.h"

namespace longfill {

inline constexpr int kLastQueryWarps = 4;
inline constexpr int kLastQueryThreads = 32 * kLastQueryWarps;
inline constexpr int64_t kMaxLastQueryTileBytes = 31
                                                  << 10;  // shared memory of the second pass beside the ring
inline constexpr int kMaxLastQueryGroups = 64;            // of a launch: kernel parameters are limited

template <int kHeadDim>
struct LastQueryShape {
  static constexpr int kWarpQueries = kHeadDim <= 128 ? 64 : 32;  // as fragments they fill 128 registers
  static constexpr int kParts = 64 / kWarpQueries;                // warps for the queries of one head
  static constexpr int kUnits = kLastQueryWarps / kParts;         // pairs of a head and a key block at a time
  static constexpr int kRowBytes = 2 * kHeadDim + 16;  // of a key in shared memory; 16 more against conflicts
  static constexpr int kSlotBytes = 32 * kRowBytes;    // keys of one block in a stage
};

// Up to four query heads that share loaded keys.
struct LastQueryGroup {
  int32_t kv_head = 0;
  int32_t num_heads = 0;
  int32_t head[kLastQueryWarps] = {};
  int32_t list[kLastQueryWarps] = {};  // their places in LastQueryParams::heads
};

// The grid is num_groups * (stretches), the groups of a stretch side by side.
struct LastQueryArgs {
  const void* q = nullptr;
  const void* k = nullptr;
  int64_t q_head_stride = 0, q_row_stride = 0;  // elements
  int64_t k_head_stride = 0, k_row_stride = 0;
  int32_t num_queries = 0;
  int32_t last_query_position = 0;
  int64_t num_keys = 0;
  int32_t num_blocks = 0;  // of 128 keys
  // Positions of the blocks, counted in blocks: a PositionMap in 32 bits, modulo 2^32.
  struct BlockPositions {
    uint32_t first = 0;
    uint32_t of_piece = 0;
    uint32_t stride = 0;
    uint32_t odd_shift = 0;
    uint32_t skipped = 0;
  };
  BlockPositions blocks;
  float scale = 0;
  float scale_log2 = 0;  // scale / ln 2
  int32_t blocks_per_stretch = 0;
  int32_t blocks_at_once = 0;  // key blocks that are loaded side by side: 1, 2 or 4
  int32_t ring_stages = 0;
  int32_t num_groups = 0;
  LastQueryGroup groups[kMaxLastQueryGroups];
};

// Maximum of a row's scores in a block, and sum of their exponentials relative to it. In the workspace
// [heads of the call][key blocks][64], rows in reverse: row l is the query l before the last one. A block
// without visible keys has {-infinity, 0}.
using BlockStatistics = float2;

// One launch each. The ring is the first `ring_bytes` of shared memory.
absl::Status LaunchLastQueryMaxStart(float* row_max, int64_t count, cudaStream_t stream);
absl::Status LaunchLastQueryMax(const LastQueryArgs& args, int64_t head_dim, DType dtype, int64_t grid,
                                int64_t ring_bytes, BlockStatistics* statistics, float* row_max,
                                cudaStream_t stream);
absl::Status LaunchLastQuerySum(const BlockStatistics* statistics, int64_t num_lists, int64_t num_blocks,
                                int num_queries, const float* row_max, uint64_t* row_sum,
                                cudaStream_t stream);
absl::Status LaunchLastQueryScore(const LastQueryArgs& args, int64_t head_dim, DType dtype, int64_t grid,
                                  int64_t ring_bytes, const float* row_max, const uint64_t* row_sum,
                                  const LastQueryScores& scores, cudaStream_t stream);

// Calls launch.template operator()<Element, kHeadDim>() for one of the head dims that there are.
template <typename Bf16, typename Fp16, typename Launch>
absl::Status ForLastQueryVariant(int64_t head_dim, DType dtype, const Launch& launch) {
  const auto for_dtype = [&]<int kHeadDim>() {
    return dtype == DType::kBFloat16 ? launch.template operator()<Bf16, kHeadDim>()
                                     : launch.template operator()<Fp16, kHeadDim>();
  };
  switch (head_dim) {
    case 64:
      return for_dtype.template operator()<64>();
    case 96:
      return for_dtype.template operator()<96>();
    case 128:
      return for_dtype.template operator()<128>();
    default:
      return for_dtype.template operator()<256>();
  }
}

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_ARGS_H_
