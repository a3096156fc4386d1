#include "kernels/cuda/index/select_blocks.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/sparse/position_check.h"

namespace longfill {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;
constexpr int kThreads = 256;
constexpr int kTileRows = 64;
constexpr int kTileKeys = 128;
constexpr int kTileDims = 16;
constexpr int64_t kScoreBytesAtOnce = int64_t{32} << 20;

int64_t ScorePitch(int64_t num_key_blocks) { return CeilDiv(num_key_blocks, 4) * 4; }

// Row blocks whose scores are in the workspace together.
int64_t RowsAtOnce(int64_t num_row_blocks, int64_t num_key_blocks) {
  const int64_t row_bytes =
      std::max<int64_t>(1, ScorePitch(num_key_blocks)) * static_cast<int64_t>(sizeof(float));
  const int64_t fitting = kScoreBytesAtOnce / row_bytes / kTileRows * kTileRows;
  return std::min(num_row_blocks, std::max<int64_t>(kTileRows, fitting));
}

__device__ int64_t RowBlockAt(const SelectBlocksParams& params, int64_t row) {
  return params.positions.Position(row * kRowBlock) / kRowBlock;
}

// A tile of scores [row - first_row, key]: a thread has four rows and twice four keys. Tiles in which no key
// block is causal are left out.
__global__ __launch_bounds__(kThreads) void BlockScoresKernel(
    const __grid_constant__ SelectBlocksParams params, int64_t first_row, int64_t end_row, float* scores,
    int64_t pitch) {
  __shared__ __align__(16) float rows[kTileDims][kTileRows + 4];
  __shared__ __align__(16) float keys[kTileDims][kTileKeys + 4];
  const int64_t tile_row = first_row + static_cast<int64_t>(blockIdx.y) * kTileRows;
  const int64_t tile_key = static_cast<int64_t>(blockIdx.x) * kTileKeys;
  if (tile_key > RowBlockAt(params, min(tile_row + kTileRows, end_row) - 1)) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int dim = thread % 4 * 4;  // of four that the thread loads
  const auto load = [&](const float* means, int64_t row, int64_t num_rows, int64_t d) {
    if (row >= num_rows || d >= params.head_dim) return make_float4(0, 0, 0, 0);
    return *reinterpret_cast<const float4*>(means + row * params.head_dim + d);
  };
  const auto store = [&](auto& tile, int column, const float4& values) {
    tile[dim][column] = values.x;
    tile[dim + 1][column] = values.y;
    tile[dim + 2][column] = values.z;
    tile[dim + 3][column] = values.w;
  };

  float sums[4][8] = {};
  const int own_row = thread / 16 * 4;
  const int own_key = thread % 16 * 4;
  for (int64_t begin = 0; begin < params.head_dim; begin += kTileDims) {
    store(rows, thread / 4, load(params.pooled_q, tile_row + thread / 4, end_row, begin + dim));
    for (int half = 0; half < 2; ++half) {
      const int key = half * kTileKeys / 2 + thread / 4;
      store(keys, key, load(params.pooled_k, tile_key + key, params.num_key_blocks, begin + dim));
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kTileDims; ++d) {
      const float4 row = *reinterpret_cast<const float4*>(&rows[d][own_row]);
      const float4 left = *reinterpret_cast<const float4*>(&keys[d][own_key]);
      const float4 right = *reinterpret_cast<const float4*>(&keys[d][kTileKeys / 2 + own_key]);
      const float of_rows[4] = {row.x, row.y, row.z, row.w};
      const float of_keys[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(of_rows[i], of_keys[j], sums[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = tile_row + own_row + i;
    if (row >= end_row) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t key = tile_key + half * kTileKeys / 2 + own_key;
      if (key >= pitch) continue;
      *reinterpret_cast<float4*>(scores + (row - first_row) * pitch + key) =
          make_float4(sums[i][4 * half], sums[i][4 * half + 1], sums[i][4 * half + 2], sums[i][4 * half + 3]);
    }
  }
}

constexpr int kBins = 2048;
constexpr int kPasses = 3;
constexpr int DigitBits(int pass) { return pass < 2 ? 11 : 10; }

struct Place {
  int before = 0;  // sum of the values of all threads before this one
  int total = 0;
};

// Called by all threads. `sums` has a place for each warp.
__device__ Place PlaceOf(int value, int* sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  Place place = {inclusive - value, 0};
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) place.before += sums[i];
    place.total += sums[i];
  }
  __syncthreads();  // before `sums` is written again
  return place;
}

// Key blocks of one row block as 32-bit keys, larger first; among equal keys the lower block comes first.
struct RowKeys {
  const float* scores = nullptr;
  int64_t row_block = 0;
  bool force = false;

  // Forced blocks are above every finite score, the diagonal first, so that it is what a single block keeps.
  __device__ uint32_t Key(float score, int64_t block) const {
    if (force && block == row_block) return 0xFFFFFFFFU;
    if (force && block == 0) return 0xFFFFFFFEU;
    const uint32_t bits = __float_as_uint(score + 0.0F);  // -0 counts as 0
    return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  }
  __device__ uint32_t operator[](int64_t block) const { return Key(scores[block], block); }
};

struct RowCut {
  uint32_t key = 0;  // the smallest that is taken
  int missing = 0;   // how many of it are taken
};

// The num_wanted-th largest key.
__device__ RowCut FindCut(const RowKeys& keys, int num_wanted, uint32_t* counts, int* sums,
                          RowCut* shared_cut) {
  RowCut cut = {0, num_wanted};
  int shift = 32;
  for (int pass = 0; pass < kPasses; ++pass) {
    const int digit_bits = DigitBits(pass);
    shift -= digit_bits;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) counts[i] = 0;
    __syncthreads();
    for (int64_t block = threadIdx.x; block <= keys.row_block; block += kThreads) {
      const uint32_t digits = keys[block] >> shift;
      if (uint64_t{digits} >> digit_bits == cut.key)
        atomicAdd(counts + (digits & ((1U << digit_bits) - 1)), 1U);
    }
    __syncthreads();
    // A thread has eight bins, thread 0 the largest.
    constexpr int kBinsOfThread = kBins / kThreads;
    const int first_bin = kBins - 1 - kBinsOfThread * static_cast<int>(threadIdx.x);
    int sum = 0;
    for (int i = 0; i < kBinsOfThread; ++i) sum += static_cast<int>(counts[first_bin - i]);
    int above = PlaceOf(sum, sums).before;
    for (int i = 0; i < kBinsOfThread; ++i) {
      const int count = static_cast<int>(counts[first_bin - i]);
      if (above < cut.missing && above + count >= cut.missing) {
        *shared_cut = {cut.key << digit_bits | static_cast<uint32_t>(first_bin - i), cut.missing - above};
      }
      above += count;
    }
    __syncthreads();
    cut = *shared_cut;
    __syncthreads();
  }
  return cut;
}

// A thread block for each row block.
__global__ __launch_bounds__(kThreads) void LargestBlocksKernel(
    const __grid_constant__ SelectBlocksParams params, int64_t first_row, const float* scores,
    int64_t pitch) {
  __shared__ uint32_t counts[kBins];
  __shared__ int sums[kThreads / 32];
  __shared__ RowCut shared_cut;
  const int64_t row = first_row + blockIdx.x;
  const RowKeys keys = {scores + blockIdx.x * pitch, RowBlockAt(params, row), params.force};
  int32_t* selected = params.selected + row * params.num_blocks;
  const int64_t num_causal = keys.row_block + 1;
  if (num_causal <= params.num_blocks) {
    for (int64_t i = threadIdx.x; i < num_causal; i += kThreads) selected[i] = static_cast<int32_t>(i);
    return;
  }
  const RowCut cut = FindCut(keys, static_cast<int>(params.num_blocks), counts, sums, &shared_cut);
  int larger = 0, equal = 0;  // so far
  for (int64_t begin = 0; begin < num_causal; begin += 4 * kThreads) {
    const int64_t first = begin + 4 * static_cast<int64_t>(threadIdx.x);
    const float4 four =
        first < num_causal ? *reinterpret_cast<const float4*>(keys.scores + first) : make_float4(0, 0, 0, 0);
    const float values[4] = {four.x, four.y, four.z, four.w};
    bool is_larger[4];
    bool is_equal[4];
    int found = 0;  // larger ones in the low half, equal ones in the high half
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = first + i < num_causal ? keys.Key(values[i], first + i) : 0;
      is_larger[i] = first + i < num_causal && key > cut.key;
      is_equal[i] = first + i < num_causal && key == cut.key;
      found += (is_larger[i] ? 1 : 0) + (is_equal[i] ? 1 << 16 : 0);
    }
    const Place place = PlaceOf(found, sums);
    int larger_before = larger + (place.before & 0xFFFF);
    int equal_before = equal + (place.before >> 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (is_larger[i] || (is_equal[i] && equal_before < cut.missing)) {
        selected[larger_before + min(equal_before, cut.missing)] = static_cast<int32_t>(first + i);
      }
      larger_before += is_larger[i] ? 1 : 0;
      equal_before += is_equal[i] ? 1 : 0;
    }
    larger += place.total & 0xFFFF;
    equal += place.total >> 16;
  }
}

absl::Status Check(const SelectBlocksParams& params) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast("block selection", "num_blocks", params.num_blocks, 1));
  if (params.head_dim < 8 || params.head_dim > 256 || params.head_dim % 8 != 0) {
    return absl::UnimplementedError(absl::StrCat("block selection: no variant for head_dim ", params.head_dim,
                                                 ", only for multiples of 8 up to 256"));
  }
  const PositionMap& map = params.positions;
  LF_RETURN_IF_ERROR(
      CheckKeepsTogether("block selection", map, kRowBlock, params.num_row_blocks * kRowBlock));
  const int64_t last = map.Position((params.num_row_blocks - 1) * kRowBlock) / kRowBlock;
  if (last >= params.num_key_blocks) {
    return absl::InvalidArgumentError(
        absl::StrCat("block selection: row block ", last, " of ", params.num_key_blocks, " key blocks"));
  }
  return absl::OkStatus();
}

}  // namespace

int64_t CudaSelectBlocksWorkspaceBytes(int64_t num_row_blocks, int64_t num_key_blocks, int64_t) {
  return RowsAtOnce(num_row_blocks, num_key_blocks) * ScorePitch(num_key_blocks) *
         static_cast<int64_t>(sizeof(float));
}

absl::Status CudaSelectBlocks(const SelectBlocksParams& params, Workspace workspace, const DeviceLimits&,
                              cudaStream_t stream) {
  if (params.num_row_blocks == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params));
  LF_RETURN_IF_ERROR(cuda::CheckWorkspace(
      "block selection", workspace,
      CudaSelectBlocksWorkspaceBytes(params.num_row_blocks, params.num_key_blocks, params.head_dim)));
  auto* scores = static_cast<float*>(workspace.data);
  const int64_t pitch = ScorePitch(params.num_key_blocks);
  const int64_t rows_at_once = RowsAtOnce(params.num_row_blocks, params.num_key_blocks);
  for (int64_t begin = 0; begin < params.num_row_blocks; begin += rows_at_once) {
    const int64_t end = std::min(begin + rows_at_once, params.num_row_blocks);
    LF_RETURN_IF_ERROR(Launch("BlockScoresKernel", BlockScoresKernel,
                              {.grid_x = CeilDiv(params.num_key_blocks, kTileKeys),
                               .grid_y = CeilDiv(end - begin, kTileRows),
                               .block = kThreads},
                              stream, params, begin, end, scores, pitch));
    LF_RETURN_IF_ERROR(Launch("LargestBlocksKernel", LargestBlocksKernel,
                              {.grid_x = end - begin, .block = kThreads}, stream, params, begin, scores,
                              pitch));
  }
  return absl::OkStatus();
}

}  // namespace longfill
