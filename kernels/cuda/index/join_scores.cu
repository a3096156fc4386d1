#include "kernels/cuda/index/join_scores.h"

#include <cmath>

#include "kernels/cuda/check.h"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// A warp for each head and key block, whose positions are consecutive.
__global__ __launch_bounds__(kThreads) void JoinScoresKernel(const __grid_constant__ JoinScoresParams params,
                                                             int64_t num_blocks) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  const int64_t head = blockIdx.y;
  if (block >= num_blocks) return;
  const int64_t place = head * num_blocks + block;
  const float* window = params.slash + place * kDiagonalWindow;
  const float* before = nullptr;  // entries 128 on of the window before
  if (params.overlaps != nullptr) {
    before = params.overlaps + place * kDiagonalOverlap;
  } else if (block > 0) {
    before = window - kDiagonalWindow + kSelectionBlock;
  }
  const int64_t row = block * kSelectionBlock;
  const int64_t position = params.key_positions.Position(row);
  float* vertical = params.scores + 2 * head * params.score_stride + row;
  float* slash = vertical + params.score_stride;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kSelectionBlock) / 32; ++i) {
    const int e = 32 * i + lane;
    if (row + e >= params.num_keys) break;
    float score = window[e];
    if (before != nullptr && e < kDiagonalOverlap) score += before[e];
    slash[e] = params.last_query - (position + e) < params.forced_distances ? INFINITY : score;
    if (position + e < params.forced_keys) vertical[e] = INFINITY;
  }
}

}  // namespace

absl::Status CudaJoinScores(const JoinScoresParams& params, const DeviceLimits&, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("join scores", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("join scores", "num_keys", params.num_keys, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("join scores", "score_stride", params.score_stride, params.num_keys));
  const int64_t num_blocks = CeilDiv(params.num_keys, kSelectionBlock);
  return Launch("JoinScoresKernel", JoinScoresKernel,
                {.grid_x = CeilDiv(num_blocks, kWarps), .grid_y = params.num_heads, .block = kThreads},
                stream, params, num_blocks);
}

}  // namespace longfill
