#include "kernels/cuda/check.h"
#include "kernels/cuda/index/block_lists.h"
#include "kernels/cuda/index/block_scan.cuh"
#include "kernels/cuda/launch.h"

namespace longfill {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr int kThreads = 256;
constexpr int kThreadBlocksPerSm = 8;

// Calls body(row) for the rows of this warp, head after head.
template <typename Body>
__device__ void ForRows(const BuildBlockListsParams& params, const Body& body) {
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kThreads / 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  for (int64_t row = first; row < params.num_heads * params.num_row_blocks; row += num_warps) body(row);
}

// counts [num_heads, num_row_blocks]
__global__ __launch_bounds__(kThreads) void CountBlocksKernel(
    const __grid_constant__ BuildBlockListsParams params, int32_t* counts) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ForRows(params, [&](int64_t row) {
    const uint64_t* words = params.bits + row * params.words_per_row;
    int count = 0;
    for (int64_t w = lane; w < params.words_per_row; w += 32) count += __popcll(words[w]);
    count = __reduce_add_sync(kAllLanes, count);
    if (lane == 0) counts[row] = count;
  });
}

// One thread block.
__global__ __launch_bounds__(cuda::kScanThreads) void PlaceListsKernel(
    const __grid_constant__ BuildBlockListsParams params, const int32_t* counts) {
  __shared__ int64_t sums[32];
  const int64_t thread = threadIdx.x;
  int64_t total = *params.num_entries;
  __syncthreads();  // all have read it
  for (int64_t head = 0; head < params.num_heads; ++head) {
    int64_t* const offsets = params.row_offsets + head * params.row_offsets_stride;
    if (thread == 0) offsets[0] = min(total, params.capacity);
    for (int64_t begin = 0; begin < params.num_row_blocks; begin += cuda::kScanThreads) {
      const int64_t i = begin + thread;
      const int64_t count = i < params.num_row_blocks ? counts[head * params.num_row_blocks + i] : 0;
      const cuda::ScanPlace place = cuda::PlaceOf(count, sums);
      if (i < params.num_row_blocks) offsets[i + 1] = min(total + place.before + count, params.capacity);
      total += place.total;
    }
  }
  if (thread == 0) *params.num_entries = total;
}

__global__ __launch_bounds__(kThreads) void FillListsKernel(
    const __grid_constant__ BuildBlockListsParams params) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  ForRows(params, [&](int64_t row) {
    const int64_t* offsets = params.row_offsets + row / params.num_row_blocks * params.row_offsets_stride +
                             row % params.num_row_blocks;
    const int64_t end = offsets[1];
    int64_t begin = offsets[0];  // of the blocks of the words that follow
    for (int64_t first = 0; first < params.words_per_row && begin < end; first += 32) {
      const int64_t w = first + lane;
      uint64_t word = w < params.words_per_row ? params.bits[row * params.words_per_row + w] : 0;
      const int count = __popcll(word);
      int inclusive = count;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, inclusive, step);
        if (lane >= step) inclusive += other;
      }
      for (int64_t i = begin + inclusive - count; word != 0 && i < end; ++i, word &= word - 1) {
        params.key_blocks[i] = static_cast<int32_t>(w * 64 + __ffsll(static_cast<long long>(word)) - 1);
      }
      begin += __shfl_sync(kAllLanes, inclusive, 31);
    }
  });
}

absl::Status Check(const BuildBlockListsParams& params) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("block lists", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("block lists", "num_row_blocks", params.num_row_blocks, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("block lists", "words_per_row", params.words_per_row, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("block lists", "capacity", params.capacity, 0));
  if (params.num_heads < 2) return absl::OkStatus();
  return cuda::CheckAtLeast("block lists", "row_offsets_stride", params.row_offsets_stride,
                            params.num_row_blocks + 1);
}

}  // namespace

int64_t CudaBuildBlockListsWorkspaceBytes(int64_t num_heads, int64_t num_row_blocks) {
  return num_heads * num_row_blocks * static_cast<int64_t>(sizeof(int32_t));
}

absl::Status CudaBuildBlockLists(const BuildBlockListsParams& params, Workspace workspace,
                                 const DeviceLimits& limits, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(Check(params));
  if (params.num_heads == 0) return absl::OkStatus();
  const int64_t bytes = CudaBuildBlockListsWorkspaceBytes(params.num_heads, params.num_row_blocks);
  if (bytes > 0) LF_RETURN_IF_ERROR(cuda::CheckWorkspace("block lists", workspace, bytes));
  auto* counts = static_cast<int32_t*>(workspace.data);
  const int64_t thread_blocks = LoopGrid(CeilDiv(params.num_heads * params.num_row_blocks, kThreads / 32),
                                         limits.num_sms, kThreadBlocksPerSm);
  LF_RETURN_IF_ERROR(Launch("CountBlocksKernel", CountBlocksKernel,
                            {.grid_x = thread_blocks, .block = kThreads}, stream, params, counts));
  LF_RETURN_IF_ERROR(
      Launch("PlaceListsKernel", PlaceListsKernel, {.block = cuda::kScanThreads}, stream, params, counts));
  return Launch("FillListsKernel", FillListsKernel, {.grid_x = thread_blocks, .block = kThreads}, stream,
                params);
}

}  // namespace longfill
