#include "kernels/cuda/index/share_selection.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "kernels/base/piece_layout.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/hopper/index/share_selection.h"
#include "kernels/cuda/index/round_to_e4m3.h"
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
  LF_RETURN_IF_ERROR(CheckReadsRepresentatives(kOperation, params.num_representatives, params.num_samples));
  LF_RETURN_IF_ERROR(CheckReadsOwnKeys(kOperation, params.num_samples, params.own_k));
  if (params.num_samples > 0 && !cuda::AlignedTo16(params.own_k, 2 * params.own_k_row_stride)) {
    return absl::InvalidArgumentError(
        absl::StrCat(kOperation, ": keys of the rows must be aligned to 16 bytes, the row stride is ",
                     params.own_k_row_stride));
  }
  LF_RETURN_IF_ERROR(CheckReadsCoarse(kOperation, params.num_coarse, params.num_samples,
                                      params.num_key_blocks, params.coarse));
  if (params.num_coarse > 0 && !cuda::AlignedTo16(params.coarse)) {
    return absl::InvalidArgumentError(absl::StrCat(kOperation, ": coarse is not aligned to 16 bytes"));
  }
  LF_RETURN_IF_ERROR(CheckPositions(params));
  return CheckShares(kOperation, params.scale, params.min_share, params.num_heads);
}

int64_t TileRows(int64_t head_dim, bool hopper) {
  if (hopper) return kHopperShareRows;
  return head_dim <= 128 ? ShareShape<128>::kRows : ShareShape<256>::kRows;
}

// What the first of two levels leaves for the second: which coarse blocks are open to each row block, and
// each row's sum over them.
struct CoarseLayout {
  CoarseLayout(const ShareSelectionBounds& bounds, PieceLayout* layout)
      : num_coarse_blocks(bounds.num_key_blocks / kCoarseBlocks) {
    if (bounds.num_coarse == 0 || num_coarse_blocks == 0) return;
    open_words = (num_coarse_blocks + 63) / 64;
    open = layout->Add(bounds.num_heads * RowBlocksOf(bounds.num_rows) * open_words *
                       static_cast<int64_t>(sizeof(uint64_t)));
    sums = layout->Add(bounds.num_heads * bounds.num_rows * static_cast<int64_t>(sizeof(float)));
  }
  int64_t num_coarse_blocks = 0;
  int64_t open_words = 0;  // of a row block; 0: there is one level
  int64_t open = 0;
  int64_t sums = 0;
};

// What is rounded to E4M3 for all launches, as E4M3 with scales or as 16-bit elements.
struct Fp8Layout {
  struct Part {
    int64_t values = 0;
    int64_t scales = 0;
  };

  Fp8Layout(const ShareSelectionBounds& bounds, bool with_scales, PieceLayout* layout)
      : element_bytes(with_scales ? 1 : 2) {
    if (!bounds.fp8) return;
    const auto take = [&](int64_t rows, int64_t groups) {
      Part part;
      part.values = layout->Add(rows * bounds.head_dim * element_bytes);
      // The Hopper kernel reads whole eights of scales.
      if (with_scales) part.scales = layout->Add((groups + 7) / 8 * 8 * static_cast<int64_t>(sizeof(float)));
      return part;
    };
    const int64_t coarse_blocks = bounds.num_key_blocks / kCoarseBlocks;
    blocks = take(bounds.num_representatives * bounds.num_key_blocks, bounds.num_key_blocks);
    if (bounds.num_coarse > 0) {
      coarse = take(NumRepresentatives(bounds.num_samples, bounds.num_coarse) * coarse_blocks, coarse_blocks);
    }
    if (bounds.num_samples > 0) own_keys = take(bounds.num_rows, RowBlocksOf(bounds.num_rows));
  }
  int64_t element_bytes;
  Part blocks, coarse, own_keys;
};

struct Layout {
  Layout(const ShareSelectionBounds& bounds, bool hopper)
      : coarse(bounds, &workspace), fp8(bounds, hopper, &workspace) {}
  PieceLayout workspace;
  CoarseLayout coarse;
  Fp8Layout fp8;
};

class Launcher {
 public:
  Launcher(const ShareSelectionParams& params, const Layout& layout, Workspace workspace, DType dtype,
           bool hopper, cudaStream_t stream)
      : params_(params),
        layout_(layout),
        workspace_(workspace.data),
        dtype_(dtype),
        stream_(stream),
        hopper_(hopper),
        tile_rows_(TileRows(params.head_dim, hopper)),
        blocks_{params.representatives, params.num_representatives, params.num_key_blocks},
        coarse_{params.coarse, NumRepresentatives(params.num_samples, params.num_coarse),
                params.num_key_blocks / kCoarseBlocks},
        own_k_{params.own_k, params.own_k_row_stride} {}

  absl::Status Run() {
    if (params_.fp8) LF_RETURN_IF_ERROR(RoundAll());
    if (layout_.coarse.open_words > 0) LF_RETURN_IF_ERROR(SelectCoarse());
    return Select();
  }

 private:
  // What represents the blocks of a level, [count, num_blocks, head_dim].
  struct Level {
    const void* representatives = nullptr;
    int64_t count = 0;
    int64_t num_blocks = 0;
    const float* scales = nullptr;  // ShareSelectionArgs::block_scales
  };
  struct OwnKeys {
    const void* rows = nullptr;
    int64_t row_stride = 0;
    const float* scales = nullptr;
  };

  // Puts rounded copies in the places of what is read.
  absl::Status RoundAll() {
    LF_RETURN_IF_ERROR(Round(layout_.fp8.blocks, &blocks_));
    if (layout_.coarse.open_words > 0) LF_RETURN_IF_ERROR(Round(layout_.fp8.coarse, &coarse_));
    if (params_.num_samples == 0) return absl::OkStatus();
    const Fp8Layout::Part& part = layout_.fp8.own_keys;
    RoundedRows rows = RowsTo(part);
    rows.rows = own_k_.rows;
    rows.num_groups = RowBlocksOf(params_.num_rows);
    rows.rows_of_group = kRowBlock;
    rows.num_rows = params_.num_rows;
    rows.group_stride = kRowBlock * own_k_.row_stride;
    rows.row_stride = own_k_.row_stride;
    rows.out_group_stride = kRowBlock * params_.head_dim;
    rows.out_row_stride = params_.head_dim;
    own_k_ = {rows.out, params_.head_dim, rows.scales};
    return LaunchRoundToE4m3(rows, dtype_, stream_);
  }
  absl::Status Round(const Fp8Layout::Part& part, Level* level) const {
    RoundedRows rows = RowsTo(part);
    rows.rows = level->representatives;
    rows.num_groups = level->num_blocks;
    rows.rows_of_group = level->count;
    rows.num_rows = level->count * level->num_blocks;
    rows.group_stride = rows.out_group_stride = params_.head_dim;
    rows.row_stride = rows.out_row_stride = level->num_blocks * params_.head_dim;
    level->representatives = rows.out;
    level->scales = rows.scales;
    return LaunchRoundToE4m3(rows, dtype_, stream_);
  }
  RoundedRows RowsTo(const Fp8Layout::Part& part) const {
    RoundedRows rows;
    rows.head_dim = params_.head_dim;
    rows.out = PieceAt<void>(workspace_, part.values);
    if (hopper_) rows.scales = PieceAt<float>(workspace_, part.scales);
    return rows;
  }

  // Of heads from `head` on, as many as a launch takes, what both levels have in common.
  ShareSelectionArgs ArgsFrom(int64_t head, const Level& level) const {
    ShareSelectionArgs args;
    args.q = Advance(params_.q.data, head * params_.q.head_stride, dtype_);
    args.q_head_stride = params_.q.head_stride;
    args.q_row_stride = params_.q.row_stride;
    args.representatives = level.representatives;
    args.num_representatives = static_cast<int32_t>(level.count);
    args.num_heads = static_cast<int32_t>(std::min<int64_t>(kMaxShareHeads, params_.num_heads - head));
    args.num_rows = params_.num_rows;
    args.positions = params_.positions;
    args.scale_log2 = static_cast<float>(params_.scale * std::numbers::log2e);
    args.num_samples = static_cast<int32_t>(params_.num_samples);
    if (params_.num_samples > 0) {
      args.own_k = own_k_.rows;
      args.own_k_row_stride = own_k_.row_stride;
      args.own_scales = own_k_.scales;
    }
    args.fp8 = params_.fp8;
    args.block_scales = level.scales;
    return args;
  }

  // Those of coarse blocks, of which a share of kOpenFactor of the least is enough.
  absl::Status SelectCoarse() const {
    for (int64_t head = 0; head < params_.num_heads; head += kMaxShareHeads) {
      ShareSelectionArgs args = ArgsFrom(head, coarse_);
      args.block_keys = static_cast<int32_t>(kCoarseBlocks * kRowBlock);
      args.sample_bonus = SampleBonus(args.block_keys);
      args.bits = OpenOf(head);
      args.words_per_row = layout_.coarse.open_words;
      args.sums = SumsOf(head);
      LF_RETURN_IF_ERROR(LaunchTiles(args, head, kOpenFactor, coarse_.num_blocks));
    }
    return absl::OkStatus();
  }

  absl::Status Select() const {
    for (int64_t head = 0; head < params_.num_heads; head += kMaxShareHeads) {
      ShareSelectionArgs args = ArgsFrom(head, blocks_);
      args.sample_bonus = SampleBonus(kRowBlock);
      args.bits = params_.bits + FirstRowBlock(head) * params_.words_per_row;
      args.words_per_row = params_.words_per_row;
      if (layout_.coarse.open_words > 0) {
        args.open = OpenOf(head);
        args.open_words = layout_.coarse.open_words;
        args.coarse_sums = SumsOf(head);
      }
      LF_RETURN_IF_ERROR(LaunchTiles(args, head, 1, blocks_.num_blocks));
    }
    return absl::OkStatus();
  }

  // Of samples of so many keys.
  float SampleBonus(int64_t keys) const {
    if (params_.num_samples == 0) return 0;
    const double weight = static_cast<double>(keys) / static_cast<double>(params_.num_samples);
    return static_cast<float>(std::log(weight) / params_.scale);
  }
  int64_t FirstRowBlock(int64_t head) const { return head * RowBlocksOf(params_.num_rows); }
  uint64_t* OpenOf(int64_t head) const {
    return PieceAt<uint64_t>(workspace_, layout_.coarse.open) +
           FirstRowBlock(head) * layout_.coarse.open_words;
  }
  float* SumsOf(int64_t head) const {
    return PieceAt<float>(workspace_, layout_.coarse.sums) + head * params_.num_rows;
  }

  // All tiles of the heads from `head` on, some at a time, against `num_blocks` blocks.
  absl::Status LaunchTiles(ShareSelectionArgs args, int64_t head, double share_factor,
                           int64_t num_blocks) const {
    args.plane_stride = num_blocks * params_.head_dim;
    for (int32_t i = 0; i < args.num_heads; ++i) {
      args.share_log2[i] = static_cast<float>(std::log2(share_factor * params_.min_share[head + i]));
    }
    const int64_t at_once = TilesAtOnce(args, num_blocks);
    for (int64_t end = (params_.num_rows + tile_rows_ - 1) / tile_rows_; end > 0; end -= at_once) {
      args.end_tile = end;
      const int64_t count = std::min(at_once, end);
      LF_RETURN_IF_ERROR(
          hopper_ ? LaunchHopperShareSelection(args, count, num_blocks, params_.head_dim, dtype_, stream_)
                  : LaunchShareSelection(args, count, params_.head_dim, dtype_, stream_));
    }
    return absl::OkStatus();
  }

  // Of each head in a launch. Both sweeps are counted in full.
  int64_t TilesAtOnce(const ShareSelectionArgs& args, int64_t num_blocks) const {
    const double flops = 2.0 * 2.0 * static_cast<double>(params_.head_dim) * static_cast<double>(tile_rows_) *
                         static_cast<double>(args.num_representatives) *
                         static_cast<double>(std::max<int64_t>(1, num_blocks)) *
                         static_cast<double>(args.num_heads);
    const double rate = hopper_ ? kHopperFlops : kFlops;
    return static_cast<int64_t>(std::clamp(kLaunchSeconds * rate / flops, 1.0, 1e6));
  }

  const ShareSelectionParams& params_;
  const Layout& layout_;
  void* const workspace_;
  const DType dtype_;
  const cudaStream_t stream_;
  const bool hopper_;
  const int64_t tile_rows_;
  Level blocks_, coarse_;
  OwnKeys own_k_;
};

}  // namespace

int64_t CudaShareSelectionWorkspaceBytes(const ShareSelectionBounds& bounds, const DeviceLimits& limits) {
  return Layout(bounds, HasHopperShareSelection(bounds.head_dim, limits)).workspace.total_bytes();
}

absl::Status CudaSelectByShare(const ShareSelectionParams& params, Workspace workspace, DType compute_dtype,
                               const DeviceLimits& limits, cudaStream_t stream) {
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(kOperation, "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(kOperation, "num_rows", params.num_rows, 0));
  if (params.num_heads == 0 || params.num_rows == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params));
  const bool hopper = HasHopperShareSelection(params.head_dim, limits);
  const Layout layout(BoundsOf(params), hopper);
  const int64_t bytes = layout.workspace.total_bytes();
  LF_RETURN_IF_ERROR(cuda::CheckWorkspace(kOperation, workspace, bytes));
  if (bytes > 0 && !cuda::AlignedTo16(workspace.data)) {
    return absl::InvalidArgumentError(absl::StrCat(kOperation, ": the workspace is not aligned to 16 bytes"));
  }
  return Launcher(params, layout, workspace, compute_dtype, hopper, stream).Run();
}

}  // namespace longfill
