#include "kernels/cpu/share_selection.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/share_selection_simd.h"
#include "kernels/cpu/workspace.h"
#include "kernels/sparse/position_check.h"
#include "kernels/sparse/share_check.h"

namespace longfill {
namespace {

constexpr int64_t kBlocksAtOnce = 8;  // key blocks whose products are kept before their maxima
constexpr double kLog2E = 1.4426950408889634;

// The mean or samples of one block of keys and its outliers, to planes `plane_stride` floats apart.
class BlockRepresentatives {
 public:
  BlockRepresentatives(const float* k, int64_t row_stride, int64_t head_dim)
      : k_(k), row_stride_(row_stride), head_dim_(head_dim) {}

  void Write(int64_t num_samples, int64_t num_outliers, int64_t plane_stride, float* out) {
    FormMean();
    for (int64_t key = 0; key < kRowBlock; ++key) distance_[key] = SquaredDistance(key);
    const auto write = [&](const float* row) {
      std::copy_n(row, head_dim_, out);
      out += plane_stride;
    };
    if (num_samples == 0) write(mean_);
    for (int64_t i = 0; i < num_samples; ++i) write(k_ + SampledKey(num_samples, i) * row_stride_);
    for (int64_t r = 0; r < num_outliers; ++r) {
      const int64_t key =
          std::max_element(distance_, distance_ + kRowBlock) - distance_;  // the first of equals
      distance_[key] = -1;
      write(k_ + key * row_stride_);
    }
  }

 private:
  // Rows are added in ascending order, each element by itself: the same bits on every machine.
  void FormMean() {
    std::fill_n(mean_, head_dim_, 0.0F);
    for (int64_t key = 0; key < kRowBlock; ++key) {
      const float* row = k_ + key * row_stride_;
      for (int64_t i = 0; i < head_dim_; ++i) mean_[i] += row[i];
    }
    for (int64_t i = 0; i < head_dim_; ++i) mean_[i] /= static_cast<float>(kRowBlock);
  }

  // Eight sums over every eighth element, so that it vectorises and still has one order.
  float SquaredDistance(int64_t key) const {
    const float* row = k_ + key * row_stride_;
    float sums[8] = {};
    for (int64_t i = 0; i < head_dim_; i += 8) {
      for (int64_t j = 0; j < 8; ++j) {
        const float difference = row[i + j] - mean_[i + j];
        sums[j] += difference * difference;
      }
    }
    float sum = 0;
    for (const float part : sums) sum += part;
    return sum;
  }

  const float* const k_;
  const int64_t row_stride_;
  const int64_t head_dim_;
  float mean_[kMaxHeadDim];
  float distance_[kRowBlock];
};

absl::Status CheckSelection(const ShareSelectionParams& params) {
  LF_RETURN_IF_ERROR(CheckHeadDim("share selection", params.head_dim));
  LF_RETURN_IF_ERROR(CheckKeepsTogether("share selection", params.positions, kRowBlock, params.num_rows));
  LF_RETURN_IF_ERROR(CheckReadsRepresentatives("share selection", params.num_representatives,
                                               params.num_samples, params.own_k));
  const int64_t last = params.positions.Position(params.num_rows - 1) / kRowBlock;
  LF_RETURN_IF_ERROR(CheckAtLeast("share selection", "num_key_blocks", params.num_key_blocks, last));
  LF_RETURN_IF_ERROR(CheckAtLeast("share selection", "words_per_row", params.words_per_row, last / 64 + 1));
  if (!(params.scale > 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("share selection: scale ", params.scale, " is not above 0"));
  }
  if (std::ssize(params.min_share) != params.num_heads) {
    return absl::InvalidArgumentError(absl::StrCat("share selection: ", params.min_share.size(),
                                                   " values of min_share for ", params.num_heads, " heads"));
  }
  for (const float min_share : params.min_share) {
    if (min_share > 0 && min_share <= 1) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("share selection: min_share ", min_share, " is not in (0, 1]"));
  }
  return absl::OkStatus();
}

// One row block against all key blocks before it, in the scratch of one worker. Scores of a row block are
// kept, so that each is formed once: 256 bytes for a key block.
class ShareSelectionTask {
 public:
  static int64_t ScratchBytes(int64_t head_dim, int64_t num_key_blocks, int64_t num_representatives) {
    const int64_t lines = head_dim + num_key_blocks + kBlocksAtOnce * num_representatives + kRowBlock +
                          4;  // of kTileLanes floats
    return lines * kTileLanes * static_cast<int64_t>(sizeof(float)) +
           kBlocksAtOnce * num_representatives * static_cast<int64_t>(sizeof(const float*));
  }

  ShareSelectionTask(const ShareSelectionParams& params, char* scratch) : params_(params) {
    of_block_ = {.num = params.num_representatives, .num_samples = params.num_samples};
    if (params.num_samples > 0) {  // in units of log2, as queries are
      of_block_.sample_bonus =
          std::log2(static_cast<float>(kRowBlock) / static_cast<float>(params.num_samples));
    }
    packed_ = reinterpret_cast<float*>(scratch);
    scores_ = packed_ + params.head_dim * kTileLanes;
    products_ = scores_ + params.num_key_blocks * kTileLanes;
    row_max_ = products_ + kBlocksAtOnce * params.num_representatives * kTileLanes;
    row_sum_ = row_max_ + kTileLanes;
    threshold_ = row_sum_ + kTileLanes;
    own_sum_ = threshold_ + kTileLanes;
    own_ = own_sum_ + kTileLanes;
    rows_ = reinterpret_cast<const float**>(own_ + kRowBlock * kTileLanes);
  }

  void Run(int64_t head, int64_t local_block) {
    const int64_t first_row = local_block * kRowBlock;
    const int64_t num_rows = std::min(kRowBlock, params_.num_rows - first_row);
    const int64_t row_block = params_.positions.Position(first_row) / kRowBlock;
    uint64_t* const bits =
        params_.bits + (head * RowBlocksOf(params_.num_rows) + local_block) * params_.words_per_row;
    std::fill_n(bits, params_.words_per_row, 0);
    Pack(head, first_row, num_rows);
    Score(row_block);
    if (params_.num_samples > 0) ScoreOwn(first_row, num_rows);
    ExponentiateBlocks(row_max_, row_block, scores_, row_sum_);
    if (params_.num_samples > 0) AddOwn(num_rows);
    for (int64_t lane = 0; lane < kTileLanes; ++lane) {
      threshold_[lane] =
          lane < num_rows ? params_.min_share[head] * row_sum_[lane] : std::numeric_limits<float>::infinity();
    }
    VoteForBlocks(scores_, row_block, threshold_, bits);
    bits[0] |= 1;
    for (int64_t n = std::max<int64_t>(0, row_block - kForcedNearestBlocks + 1); n <= row_block; ++n) {
      bits[n / 64] |= uint64_t{1} << (n % 64);
    }
  }

 private:
  // Queries in units of log2; lanes without a row are zero and have no vote.
  void Pack(int64_t head, int64_t first_row, int64_t num_rows) {
    const auto factor = static_cast<float>(params_.scale * kLog2E);
    const float* q = static_cast<const float*>(params_.q.data) + head * params_.q.head_stride +
                     first_row * params_.q.row_stride;
    for (int64_t i = 0; i < params_.head_dim; ++i) {
      float* const lanes = packed_ + i * kTileLanes;
      for (int64_t lane = 0; lane < num_rows; ++lane)
        lanes[lane] = q[lane * params_.q.row_stride + i] * factor;
      std::fill(lanes + num_rows, lanes + kTileLanes, 0.0F);
    }
  }

  void Score(int64_t num_blocks) {
    const auto* representatives = static_cast<const float*>(params_.representatives);
    const int64_t plane = params_.num_key_blocks * params_.head_dim;
    std::fill_n(row_max_, kTileLanes, -std::numeric_limits<float>::infinity());
    for (int64_t begin = 0; begin < num_blocks; begin += kBlocksAtOnce) {
      const int64_t count = std::min(kBlocksAtOnce, num_blocks - begin);
      for (int64_t b = 0; b < count; ++b) {
        for (int64_t r = 0; r < params_.num_representatives; ++r) {
          rows_[b * params_.num_representatives + r] =
              representatives + r * plane + (begin + b) * params_.head_dim;
        }
      }
      ScoreBlocks(packed_, params_.head_dim, rows_, count, of_block_, products_, scores_ + begin * kTileLanes,
                  row_max_);
    }
  }

  // The keys of the row block itself, those after a row hidden from it.
  void ScoreOwn(int64_t first_row, int64_t num_rows) {
    const auto* keys = static_cast<const float*>(params_.own_k) + first_row * params_.own_k_row_stride;
    std::fill_n(own_sum_, kTileLanes, -std::numeric_limits<float>::infinity());  // maxima, of all keys
    for (int64_t begin = 0; begin < num_rows; begin += kBlocksAtOnce) {
      const int64_t count = std::min(kBlocksAtOnce, num_rows - begin);
      for (int64_t i = 0; i < count; ++i) rows_[i] = keys + (begin + i) * params_.own_k_row_stride;
      ScoreBlocks(packed_, params_.head_dim, rows_, count, {}, products_, own_ + begin * kTileLanes,
                  own_sum_);
    }
    for (int64_t key = 0; key < num_rows; ++key) {
      float* const scores = own_ + key * kTileLanes;
      std::fill_n(scores, key, -std::numeric_limits<float>::infinity());
      for (int64_t lane = key; lane < kTileLanes; ++lane)
        row_max_[lane] = std::max(row_max_[lane], scores[lane]);
    }
  }

  void AddOwn(int64_t num_rows) {
    ExponentiateBlocks(row_max_, num_rows, own_, own_sum_);
    for (int64_t lane = 0; lane < kTileLanes; ++lane) row_sum_[lane] += own_sum_[lane];
  }

  const ShareSelectionParams& params_;
  BlockRows of_block_;
  float* packed_;    // [head_dim, kTileLanes]
  float* scores_;    // [num_key_blocks, kTileLanes]
  float* products_;  // [kBlocksAtOnce * num_representatives, kTileLanes]
  float* row_max_;   // [kTileLanes] each, as are those up to own_sum_
  float* row_sum_;
  float* threshold_;
  float* own_sum_;
  float* own_;          // [kRowBlock, kTileLanes]: scores of the keys of the row block
  const float** rows_;  // [kBlocksAtOnce * num_representatives]
};

int64_t NumShares(int64_t num_tasks, int num_threads) { return std::min<int64_t>(num_tasks, num_threads); }

}  // namespace

absl::Status CpuRepresentatives(const RepresentativesParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("representatives", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("representatives", "num_keys", params.num_keys, 0));
  LF_RETURN_IF_ERROR(CheckHeadDim("representatives", params.head_dim));
  LF_RETURN_IF_ERROR(CheckRepresentatives("representatives: num_", params.num_samples, params.num_outliers));
  const auto* k = static_cast<const float*>(params.k.data);
  auto* out = static_cast<float*>(params.out);
  const int64_t num_blocks = params.num_keys / kRowBlock;
  const int64_t plane = num_blocks * params.head_dim;
  pool.ParallelFor(params.num_heads * num_blocks, [&](int64_t task, int) {
    const int64_t head = task / num_blocks;
    const int64_t block = task % num_blocks;
    const float* keys = k + head * params.k.head_stride + block * kRowBlock * params.k.row_stride;
    BlockRepresentatives(keys, params.k.row_stride, params.head_dim)
        .Write(params.num_samples, params.num_outliers, plane,
               out + head * NumRepresentatives(params.num_samples, params.num_outliers) * plane +
                   block * params.head_dim);
  });
  return absl::OkStatus();
}

int64_t CpuShareSelectionWorkspaceBytes(const ShareSelectionBounds& bounds, int num_threads) {
  return PartsBytes(
      NumShares(bounds.num_heads * RowBlocksOf(bounds.num_rows), num_threads),
      ShareSelectionTask::ScratchBytes(bounds.head_dim, bounds.num_key_blocks, bounds.num_representatives));
}

absl::Status CpuSelectByShare(const ShareSelectionParams& params, Workspace workspace, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("share selection", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("share selection", "num_rows", params.num_rows, 0));
  if (params.num_heads == 0 || params.num_rows == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(CheckSelection(params));
  const ShareSelectionBounds bounds = {params.num_heads, params.num_rows, params.num_representatives,
                                       params.num_key_blocks, params.head_dim};
  LF_RETURN_IF_ERROR(CheckWorkspace("share selection", workspace,
                                    CpuShareSelectionWorkspaceBytes(bounds, pool.num_threads())));
  const int64_t row_blocks = RowBlocksOf(params.num_rows);
  const int64_t tasks = params.num_heads * row_blocks;
  const int64_t shares = NumShares(tasks, pool.num_threads());
  const int64_t part_bytes =
      ShareSelectionTask::ScratchBytes(params.head_dim, params.num_key_blocks, params.num_representatives);
  // A share of the tasks for each piece of scratch, dealt so that long and short rows mix.
  pool.ParallelFor(shares, [&](int64_t share, int) {
    ShareSelectionTask task(params, PartOf(workspace, share, part_bytes));
    for (int64_t i = share; i < tasks; i += shares) task.Run(i / row_blocks, i % row_blocks);
  });
  return absl::OkStatus();
}

}  // namespace longfill
