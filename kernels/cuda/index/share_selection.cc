#include "kernels/cuda/index/share_selection.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/hopper/index/share_selection.h"
#include "kernels/cuda/index/share_selection_args.h"
#include "kernels/sparse/position_check.h"
#include "kernels/sparse/share_check.h"

namespace longfill {
namespace {

constexpr char kOperation[] = "share selection";
constexpr int64_t kMaxPosition = (int64_t{1} << 31) - 1;
// No launch is predicted above 200 ms at rates that mma.sync passes on every GPU that is served, and wgmma on
// those that have it.
constexpr double kLaunchSeconds = 0.2;
constexpr double kFlops = 100e12;
constexpr double kHopperFlops = 300e12;

absl::Status CheckPositions(const ShareSelectionParams& params) {
  const PositionMap& map = params.positions;
  LF_RETURN_IF_ERROR(CheckKeepsTogether(kOperation, map, kRowBlock, params.num_rows));
  const int64_t last = map.Position(params.num_rows - 1);
  if (last > kMaxPosition) {
    return absl::InvalidArgumentError(
        absl::StrCat(kOperation, ": positions up to ", last, ", the limit is ", kMaxPosition));
  }
  LF_RETURN_IF_ERROR(
      cuda::CheckAtLeast(kOperation, "num_key_blocks", params.num_key_blocks, last / kRowBlock));
  return cuda::CheckAtLeast(kOperation, "words_per_row", params.words_per_row, last / kRowBlock / 64 + 1);
}

absl::Status CheckShares(const ShareSelectionParams& params) {
  if (std::ssize(params.min_share) != params.num_heads) {
    return absl::InvalidArgumentError(absl::StrCat(kOperation, ": ", params.min_share.size(),
                                                   " values of min_share for ", params.num_heads, " heads"));
  }
  for (const float min_share : params.min_share) {
    if (min_share > 0 && min_share <= 1) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(kOperation, ": min_share ", min_share, " is not in (0, 1]"));
  }
  return absl::OkStatus();
}

absl::Status Check(const ShareSelectionParams& params) {
  constexpr int64_t kHeadDims[] = {64, 96, 128, 256};
  if (std::find(std::begin(kHeadDims), std::end(kHeadDims), params.head_dim) == std::end(kHeadDims)) {
    return absl::UnimplementedError(absl::StrCat(kOperation, ": no variant for head_dim ", params.head_dim,
                                                 ", only for 64, 96, 128 and 256"));
  }
  if (!cuda::AlignedTo16(params.q.data, 2 * params.q.head_stride, 2 * params.q.row_stride,
                         params.representatives)) {
    return absl::InvalidArgumentError(
        absl::StrCat(kOperation, ": rows must be aligned to 16 bytes, the row stride is ",
                     params.q.row_stride, ", the head stride ", params.q.head_stride));
  }
  LF_RETURN_IF_ERROR(
      CheckReadsRepresentatives(kOperation, params.num_representatives, params.num_samples, params.own_k));
  if (params.num_samples > 0 && !cuda::AlignedTo16(params.own_k, 2 * params.own_k_row_stride)) {
    return absl::InvalidArgumentError(
        absl::StrCat(kOperation, ": keys of the rows must be aligned to 16 bytes, the row stride is ",
                     params.own_k_row_stride));
  }
  if (!(params.scale > 0)) {
    return absl::InvalidArgumentError(absl::StrCat(kOperation, ": scale ", params.scale, " is not above 0"));
  }
  LF_RETURN_IF_ERROR(CheckPositions(params));
  return CheckShares(params);
}

int64_t TileRows(int64_t head_dim, bool hopper) {
  if (hopper) return kHopperShareRows;
  return head_dim <= 128 ? ShareShape<128>::kRows : ShareShape<256>::kRows;
}

// Tiles of each head in a launch. Both sweeps are counted in full.
int64_t TilesAtOnce(const ShareSelectionParams& params, int64_t num_heads, bool hopper) {
  const double flops = 2.0 * 2.0 * static_cast<double>(params.head_dim) *
                       static_cast<double>(TileRows(params.head_dim, hopper)) *
                       static_cast<double>(params.num_representatives) *
                       static_cast<double>(std::max<int64_t>(1, params.num_key_blocks)) *
                       static_cast<double>(num_heads);
  return static_cast<int64_t>(
      std::clamp(kLaunchSeconds * (hopper ? kHopperFlops : kFlops) / flops, 1.0, 1e6));
}

}  // namespace

absl::Status CudaSelectByShare(const ShareSelectionParams& params, DType compute_dtype,
                               const DeviceLimits& limits, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(kOperation, "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(kOperation, "num_rows", params.num_rows, 0));
  if (params.num_heads == 0 || params.num_rows == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params));
  const bool hopper = HasHopperShareSelection(params.head_dim, limits);
  const int64_t tile_rows = TileRows(params.head_dim, hopper);
  const int64_t num_tiles = (params.num_rows + tile_rows - 1) / tile_rows;
  const int64_t row_blocks = RowBlocksOf(params.num_rows);
  for (int64_t head = 0; head < params.num_heads; head += kMaxShareHeads) {
    ShareSelectionArgs args;
    args.q = Advance(params.q.data, head * params.q.head_stride, compute_dtype);
    args.q_head_stride = params.q.head_stride;
    args.q_row_stride = params.q.row_stride;
    args.representatives = params.representatives;
    args.plane_stride = params.num_key_blocks * params.head_dim;
    args.num_representatives = static_cast<int32_t>(params.num_representatives);
    args.num_samples = static_cast<int32_t>(params.num_samples);
    if (params.num_samples > 0) {
      const double weight = static_cast<double>(kRowBlock) / static_cast<double>(params.num_samples);
      args.sample_bonus = static_cast<float>(std::log(weight) / params.scale);
      args.own_k = params.own_k;
      args.own_k_row_stride = params.own_k_row_stride;
    }
    args.num_heads = static_cast<int32_t>(std::min<int64_t>(kMaxShareHeads, params.num_heads - head));
    args.num_rows = params.num_rows;
    args.positions = params.positions;
    args.scale_log2 = static_cast<float>(params.scale * std::numbers::log2e);
    args.bits = params.bits + head * row_blocks * params.words_per_row;
    args.words_per_row = params.words_per_row;
    for (int32_t i = 0; i < args.num_heads; ++i) args.share_log2[i] = std::log2(params.min_share[head + i]);
    const int64_t at_once = TilesAtOnce(params, args.num_heads, hopper);
    for (int64_t end = num_tiles; end > 0; end -= at_once) {
      args.end_tile = end;
      const int64_t count = std::min(at_once, end);
      LF_RETURN_IF_ERROR(hopper ? LaunchHopperShareSelection(args, count, params.num_key_blocks,
                                                             params.head_dim, compute_dtype, stream)
                                : LaunchShareSelection(args, count, params.head_dim, compute_dtype, stream));
    }
  }
  return absl::OkStatus();
}

}  // namespace longfill
