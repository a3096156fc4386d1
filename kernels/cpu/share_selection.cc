#include "kernels/cpu/share_selection.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/e4m3.h"
#include "kernels/cpu/share_selection_simd.h"
#include "kernels/cpu/workspace.h"
#include "kernels/sparse/position_check.h"
#include "kernels/sparse/share_check.h"

namespace longfill {
namespace {

constexpr int64_t kBlocksAtOnce = 8;  // key blocks whose products are kept before their maxima
constexpr double kLog2E = 1.4426950408889634;

// Rows row_at(0), row_at(1), ... are added in this order, each element by itself: the same bits on every
// machine.
template <typename RowAt>
void FormMean(const RowAt& row_at, int64_t num_rows, int64_t head_dim, float* mean) {
  std::fill_n(mean, head_dim, 0.0F);
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* at = row_at(row);
    for (int64_t i = 0; i < head_dim; ++i) mean[i] += at[i];
  }
  for (int64_t i = 0; i < head_dim; ++i) mean[i] /= static_cast<float>(num_rows);
}

// Eight sums over every eighth element, so that it vectorises and still has one order.
float SquaredDistance(const float* x, const float* y, int64_t head_dim) {
  float sums[8] = {};
  for (int64_t i = 0; i < head_dim; i += 8) {
    for (int64_t j = 0; j < 8; ++j) {
      const float difference = x[i + j] - y[i + j];
      sums[j] += difference * difference;
    }
  }
  float sum = 0;
  for (const float part : sums) sum += part;
  return sum;
}

// The mean or samples of one block of keys and its outliers, to planes `plane_stride` floats apart.
class BlockRepresentatives {
 public:
  BlockRepresentatives(const float* k, int64_t row_stride, int64_t head_dim)
      : k_(k), row_stride_(row_stride), head_dim_(head_dim) {}

  void Write(int64_t num_samples, int64_t num_outliers, int64_t plane_stride, float* out) {
    FormMean([this](int64_t key) { return k_ + key * row_stride_; }, kRowBlock, head_dim_, mean_);
    for (int64_t key = 0; key < kRowBlock; ++key) {
      distance_[key] = SquaredDistance(k_ + key * row_stride_, mean_, head_dim_);
    }
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
  const float* const k_;
  const int64_t row_stride_;
  const int64_t head_dim_;
  float mean_[kMaxHeadDim];
  float distance_[kRowBlock];
};

// Of coarse block `block`: the mean of its key blocks' means or its samples, then what is farthest from all
// chosen before.
void WriteCoarseRepresentatives(const CoarseRepresentativesParams& params, int64_t block) {
  const int64_t head_dim = params.head_dim;
  const auto* const rows =
      static_cast<const float*>(params.representatives) + block * kCoarseBlocks * head_dim;
  const auto candidate = [&](int64_t n) {  // plane after plane
    return rows + (n / kCoarseBlocks * params.num_key_blocks + n % kCoarseBlocks) * head_dim;
  };
  const int64_t num_candidates = params.num_representatives * kCoarseBlocks;
  const int64_t num_planes = NumRepresentatives(params.num_samples, params.num_coarse);
  auto* chosen = static_cast<float*>(params.out) + block * head_dim;
  std::array<float, kCoarseBlocks*(kMaxOutliers + 1)> distance;  // to the nearest one chosen
  distance.fill(std::numeric_limits<float>::infinity());
  for (int64_t plane = 0; plane < num_planes; ++plane) {
    if (params.num_samples == 0 && plane == 0) {
      FormMean(candidate, kCoarseBlocks, head_dim, chosen);
    } else if (plane < params.num_samples) {
      const CoarseSample sample(params.num_samples, plane);
      std::copy_n(candidate(sample.sample * kCoarseBlocks + sample.block), head_dim, chosen);
    } else {
      const int64_t farthest = std::max_element(distance.begin(), distance.begin() + num_candidates) -
                               distance.begin();  // the first of equals
      std::copy_n(candidate(farthest), head_dim, chosen);
    }
    for (int64_t n = 0; n < num_candidates; ++n) {
      distance[n] = std::min(distance[n], SquaredDistance(candidate(n), chosen, head_dim));
    }
    chosen += params.num_key_blocks / kCoarseBlocks * head_dim;
  }
}

absl::Status CheckSelection(const ShareSelectionParams& params) {
  LF_RETURN_IF_ERROR(CheckHeadDim("share selection", params.head_dim));
  LF_RETURN_IF_ERROR(CheckKeepsTogether("share selection", params.positions, kRowBlock, params.num_rows));
  LF_RETURN_IF_ERROR(
      CheckReadsRepresentatives("share selection", params.num_representatives, params.num_samples));
  LF_RETURN_IF_ERROR(CheckReadsOwnKeys("share selection", params.num_samples, params.own_k));
  LF_RETURN_IF_ERROR(CheckReadsCoarse("share selection", params.num_coarse, params.num_samples,
                                      params.num_key_blocks, params.coarse));
  const int64_t last = params.positions.Position(params.num_rows - 1) / kRowBlock;
  LF_RETURN_IF_ERROR(CheckAtLeast("share selection", "num_key_blocks", params.num_key_blocks, last));
  LF_RETURN_IF_ERROR(CheckAtLeast("share selection", "words_per_row", params.words_per_row, last / 64 + 1));
  return CheckShares("share selection", params.scale, params.min_share, params.num_heads);
}

int64_t NumCoarseRows(const ShareSelectionBounds& bounds) {
  if (bounds.num_coarse == 0) return 0;
  return NumRepresentatives(bounds.num_samples, bounds.num_coarse) * (bounds.num_key_blocks / kCoarseBlocks);
}

// Of the copies that RoundKeys makes.
int64_t RoundedBytes(const ShareSelectionBounds& bounds) {
  if (!bounds.fp8) return 0;
  const int64_t own_rows = bounds.num_samples == 0 ? 0 : bounds.num_rows;
  return (bounds.num_representatives * bounds.num_key_blocks + NumCoarseRows(bounds) + own_rows) *
         bounds.head_dim * static_cast<int64_t>(sizeof(float));
}

// Rounds what represents each of `num_blocks` blocks; blocks lie side by side in each plane.
void RoundLevel(const RowsToRound& first_block, int64_t num_blocks, ThreadPool& pool) {
  pool.ParallelFor(num_blocks, [&](int64_t block, int) {
    RowsToRound rows = first_block;
    rows.from += block * rows.width;
    rows.to += block * rows.width;
    RoundToE4m3(rows);
  });
}

// The parameters with keys and what represents them rounded to E4M3, in RoundedBytes at `to`. Queries are
// rounded when they are packed.
ShareSelectionParams RoundKeys(const ShareSelectionParams& params, const ShareSelectionBounds& bounds,
                               float* to, ThreadPool& pool) {
  const int64_t head_dim = params.head_dim;
  const int64_t plane = params.num_key_blocks * head_dim;
  const int64_t coarse_plane = params.num_key_blocks / kCoarseBlocks * head_dim;
  const int64_t last = params.positions.Position(params.num_rows - 1) / kRowBlock;  // none from there on
  float* const coarse = to + params.num_representatives * plane;
  float* const own = coarse + NumCoarseRows(bounds) * head_dim;
  ShareSelectionParams rounded = params;
  RoundLevel({.from = static_cast<const float*>(params.representatives),
              .from_stride = plane,
              .to = to,
              .to_stride = plane,
              .num_rows = params.num_representatives,
              .width = head_dim},
             last, pool);
  rounded.representatives = to;
  if (params.num_coarse > 0) {
    RoundLevel({.from = static_cast<const float*>(params.coarse),
                .from_stride = coarse_plane,
                .to = coarse,
                .to_stride = coarse_plane,
                .num_rows = NumRepresentatives(params.num_samples, params.num_coarse),
                .width = head_dim},
               last / kCoarseBlocks, pool);
    rounded.coarse = coarse;
  }
  if (params.num_samples > 0) {
    pool.ParallelFor(RowBlocksOf(params.num_rows), [&](int64_t block, int) {
      const int64_t first_row = block * kRowBlock;
      RoundToE4m3({.from = static_cast<const float*>(params.own_k) + first_row * params.own_k_row_stride,
                   .from_stride = params.own_k_row_stride,
                   .to = own + first_row * head_dim,
                   .to_stride = head_dim,
                   .num_rows = std::min(kRowBlock, params.num_rows - first_row),
                   .width = head_dim});
    });
    rounded.own_k = own;
    rounded.own_k_row_stride = head_dim;
  }
  return rounded;
}

// What represents the blocks of a level: key blocks or coarse blocks.
struct Level {
  const void* representatives = nullptr;  // [of_block.num, num_blocks, head_dim]
  int64_t num_blocks = 0;
  BlockRows of_block;
};

// One row block against all key blocks before it that are open, in the scratch of one worker. Scores of a row
// block are kept, so that each is formed once: 256 bytes for a key block.
class ShareSelectionTask {
 public:
  static int64_t ScratchBytes(const ShareSelectionBounds& bounds) {
    const int64_t lines = RoundedLines(bounds) + bounds.head_dim + bounds.num_key_blocks +
                          kBlocksAtOnce * MostRowsOfBlock(bounds) + kRowBlock + 6;  // of kTileLanes floats
    return lines * kTileLanes * static_cast<int64_t>(sizeof(float)) +
           kBlocksAtOnce * MostRowsOfBlock(bounds) * static_cast<int64_t>(sizeof(const float*)) +
           WordsOf(bounds.num_key_blocks) * static_cast<int64_t>(sizeof(uint64_t)) +
           bounds.num_key_blocks * static_cast<int64_t>(sizeof(int32_t));
  }

  ShareSelectionTask(const ShareSelectionParams& params, const ShareSelectionBounds& bounds, char* scratch)
      : params_(params) {
    fine_ = {params.representatives,
             params.num_key_blocks,
             {.num = params.num_representatives,
              .num_samples = params.num_samples,
              .sample_bonus = SampleBonus(kRowBlock)}};
    coarse_ = {params.coarse,
               params.num_key_blocks / kCoarseBlocks,
               {.num = NumRepresentatives(params.num_samples, params.num_coarse),
                .num_samples = params.num_samples,
                .sample_bonus = SampleBonus(kCoarseBlocks * kRowBlock)}};
    rounded_ = reinterpret_cast<float*>(scratch);
    packed_ = rounded_ + RoundedLines(bounds) * kTileLanes;
    scores_ = packed_ + params.head_dim * kTileLanes;
    products_ = scores_ + params.num_key_blocks * kTileLanes;
    row_max_ = products_ + kBlocksAtOnce * MostRowsOfBlock(bounds) * kTileLanes;
    row_sum_ = row_max_ + kTileLanes;
    threshold_ = row_sum_ + kTileLanes;
    own_sum_ = threshold_ + kTileLanes;
    coarse_max_ = own_sum_ + kTileLanes;
    coarse_sum_ = coarse_max_ + kTileLanes;
    own_ = coarse_sum_ + kTileLanes;
    rows_ = reinterpret_cast<const float**>(own_ + kRowBlock * kTileLanes);
    votes_ = reinterpret_cast<uint64_t*>(rows_ + kBlocksAtOnce * MostRowsOfBlock(bounds));
    blocks_ = reinterpret_cast<int32_t*>(votes_ + WordsOf(params.num_key_blocks));
  }

  void Run(int64_t head, int64_t local_block) {
    const int64_t first_row = local_block * kRowBlock;
    const int64_t num_rows = std::min(kRowBlock, params_.num_rows - first_row);
    const int64_t row_block = params_.positions.Position(first_row) / kRowBlock;
    const int64_t num_coarse_blocks = params_.num_coarse == 0 ? 0 : row_block / kCoarseBlocks;
    uint64_t* const bits =
        params_.bits + (head * RowBlocksOf(params_.num_rows) + local_block) * params_.words_per_row;
    std::fill_n(bits, params_.words_per_row, 0);
    Pack(head, first_row, num_rows);
    std::fill_n(row_max_, kTileLanes, -std::numeric_limits<float>::infinity());
    if (num_coarse_blocks > 0) {
      ScoreCoarse(num_coarse_blocks, first_row, num_rows);
      Vote(static_cast<float>(kOpenFactor) * params_.min_share[head], coarse_sum_, num_rows,
           num_coarse_blocks);
    }
    const int64_t num_open = ListOpen(num_coarse_blocks, row_block);
    Score(fine_, num_open);
    if (params_.num_samples > 0) ScoreOwn(first_row, num_rows);
    ExponentiateBlocks(row_max_, num_open, scores_, row_sum_);
    if (params_.num_samples > 0) AddOwn(num_rows, row_sum_);
    if (num_coarse_blocks > 0) RaiseToCoarseSum();
    Vote(params_.min_share[head], row_sum_, num_rows, num_open);
    for (int64_t i = 0; i < num_open; ++i) {
      if (HasVote(i)) SetBit(bits, blocks_[i]);
    }
    SetBit(bits, 0);
    for (int64_t n = std::max<int64_t>(0, row_block - kForcedNearestBlocks + 1); n <= row_block; ++n) {
      SetBit(bits, n);
    }
  }

 private:
  static int64_t WordsOf(int64_t num_bits) { return (num_bits + 63) / 64; }
  static int64_t RoundedLines(const ShareSelectionBounds& bounds) {
    static_assert(kTileLanes == kRowBlock);
    return bounds.fp8 ? bounds.head_dim : 0;
  }
  // Samples are among the representatives.
  static int64_t MostRowsOfBlock(const ShareSelectionBounds& bounds) {
    return bounds.num_representatives + bounds.num_coarse;
  }
  // Of samples of so many keys, in units of log2, as queries are.
  float SampleBonus(int64_t keys) const {
    if (params_.num_samples == 0) return 0;
    return std::log2(static_cast<float>(keys) / static_cast<float>(params_.num_samples));
  }
  static void SetBit(uint64_t* bits, int64_t n) { bits[n / 64] |= uint64_t{1} << (n % 64); }
  bool HasVote(int64_t n) const { return (votes_[n / 64] >> (n % 64) & 1) != 0; }

  // Queries in units of log2; lanes without a row are zero and have no vote.
  void Pack(int64_t head, int64_t first_row, int64_t num_rows) {
    const auto factor = static_cast<float>(params_.scale * kLog2E);
    const float* q = static_cast<const float*>(params_.q.data) + head * params_.q.head_stride +
                     first_row * params_.q.row_stride;
    int64_t row_stride = params_.q.row_stride;
    if (params_.fp8) {
      RoundToE4m3({.from = q,
                   .from_stride = row_stride,
                   .to = rounded_,
                   .to_stride = params_.head_dim,
                   .num_rows = num_rows,
                   .width = params_.head_dim});
      q = rounded_;
      row_stride = params_.head_dim;
    }
    for (int64_t i = 0; i < params_.head_dim; ++i) {
      float* const lanes = packed_ + i * kTileLanes;
      for (int64_t lane = 0; lane < num_rows; ++lane) lanes[lane] = q[lane * row_stride + i] * factor;
      std::fill(lanes + num_rows, lanes + kTileLanes, 0.0F);
    }
  }

  // Of the first `num_blocks` of blocks_, which are blocks of the level, to scores_; raises row_max_ to them.
  void Score(const Level& level, int64_t num_blocks) {
    const auto* representatives = static_cast<const float*>(level.representatives);
    const int64_t plane = level.num_blocks * params_.head_dim;
    const int64_t num = level.of_block.num;
    for (int64_t begin = 0; begin < num_blocks; begin += kBlocksAtOnce) {
      const int64_t count = std::min(kBlocksAtOnce, num_blocks - begin);
      for (int64_t b = 0; b < count; ++b) {
        for (int64_t r = 0; r < num; ++r) {
          rows_[b * num + r] = representatives + r * plane + blocks_[begin + b] * params_.head_dim;
        }
      }
      ScoreBlocks(packed_, params_.head_dim, rows_, count, level.of_block, products_,
                  scores_ + begin * kTileLanes, row_max_);
    }
  }

  // Leaves exponentials of the scores of the first `num_blocks` coarse blocks in scores_, and row_max_ at the
  // maxima of all that is in their sums.
  void ScoreCoarse(int64_t num_blocks, int64_t first_row, int64_t num_rows) {
    std::iota(blocks_, blocks_ + num_blocks, 0);
    Score(coarse_, num_blocks);
    if (params_.num_samples > 0) ScoreOwn(first_row, num_rows);
    std::copy_n(row_max_, kTileLanes, coarse_max_);
    ExponentiateBlocks(row_max_, num_blocks, scores_, coarse_sum_);
    if (params_.num_samples > 0) AddOwn(num_rows, coarse_sum_);
  }

  // To blocks_, those before the row block whose coarse block has a vote or does not end before the row
  // block; returns their number.
  int64_t ListOpen(int64_t num_coarse_blocks, int64_t row_block) {
    int64_t num_open = 0;
    for (int64_t b = 0; b < row_block; ++b) {
      const int64_t coarse = b / kCoarseBlocks;
      if (coarse >= num_coarse_blocks || HasVote(coarse)) blocks_[num_open++] = static_cast<int32_t>(b);
    }
    return num_open;
  }

  // To votes_, which of the first `num_blocks` of scores_ are at least `share` of the sum in some row.
  void Vote(float share, const float* sum, int64_t num_rows, int64_t num_blocks) {
    for (int64_t lane = 0; lane < kTileLanes; ++lane) {
      threshold_[lane] = lane < num_rows ? share * sum[lane] : std::numeric_limits<float>::infinity();
    }
    std::fill_n(votes_, WordsOf(num_blocks), 0);
    VoteForBlocks(scores_, num_blocks, threshold_, votes_);
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

  void AddOwn(int64_t num_rows, float* sum) {
    ExponentiateBlocks(row_max_, num_rows, own_, own_sum_);
    for (int64_t lane = 0; lane < kTileLanes; ++lane) sum[lane] += own_sum_[lane];
  }

  // Sums of coarse blocks are relative to coarse_max_, others to row_max_, which is at least that.
  void RaiseToCoarseSum() {
    ExponentiateBlocks(row_max_, 1, coarse_max_, threshold_);  // now factors; what they add up to is not read
    for (int64_t lane = 0; lane < kTileLanes; ++lane) {
      row_sum_[lane] = std::max(row_sum_[lane], coarse_sum_[lane] * coarse_max_[lane]);
    }
  }

  const ShareSelectionParams& params_;
  Level fine_, coarse_;
  float* rounded_;   // [kRowBlock, head_dim]: queries in E4M3, with fp8
  float* packed_;    // [head_dim, kTileLanes]
  float* scores_;    // [num_key_blocks, kTileLanes]
  float* products_;  // [kBlocksAtOnce * rows that represent a block, kTileLanes]
  float* row_max_;   // [kTileLanes] each, as are those up to coarse_sum_
  float* row_sum_;
  float* threshold_;
  float* own_sum_;
  float* coarse_max_;
  float* coarse_sum_;
  float* own_;          // [kRowBlock, kTileLanes]: scores of the keys of the row block
  const float** rows_;  // [kBlocksAtOnce * rows that represent a block]
  uint64_t* votes_;     // bits of as many blocks
  int32_t* blocks_;     // [num_key_blocks]: those of which scores_ are
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

absl::Status CpuCoarseRepresentatives(const CoarseRepresentativesParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("coarse representatives", "num_key_blocks", params.num_key_blocks, 0));
  LF_RETURN_IF_ERROR(CheckHeadDim("coarse representatives", params.head_dim));
  LF_RETURN_IF_ERROR(
      CheckReadsRepresentatives("coarse representatives", params.num_representatives, params.num_samples));
  LF_RETURN_IF_ERROR(CheckAtLeast("coarse representatives", "num_coarse", params.num_coarse, 1));
  LF_RETURN_IF_ERROR(CheckCoarse("coarse representatives: num_", params.num_coarse, params.num_samples));
  pool.ParallelFor(params.num_key_blocks / kCoarseBlocks,
                   [&](int64_t block, int) { WriteCoarseRepresentatives(params, block); });
  return absl::OkStatus();
}

int64_t CpuShareSelectionWorkspaceBytes(const ShareSelectionBounds& bounds, int num_threads) {
  return PartsBytes(NumShares(bounds.num_heads * RowBlocksOf(bounds.num_rows), num_threads),
                    ShareSelectionTask::ScratchBytes(bounds)) +
         RoundedBytes(bounds);
}

absl::Status CpuSelectByShare(const ShareSelectionParams& params, Workspace workspace, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("share selection", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("share selection", "num_rows", params.num_rows, 0));
  if (params.num_heads == 0 || params.num_rows == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(CheckSelection(params));
  const ShareSelectionBounds bounds = BoundsOf(params);
  LF_RETURN_IF_ERROR(CheckWorkspace("share selection", workspace,
                                    CpuShareSelectionWorkspaceBytes(bounds, pool.num_threads())));
  const int64_t row_blocks = RowBlocksOf(params.num_rows);
  const int64_t tasks = params.num_heads * row_blocks;
  const int64_t shares = NumShares(tasks, pool.num_threads());
  const int64_t part_bytes = ShareSelectionTask::ScratchBytes(bounds);
  const ShareSelectionParams read =
      params.fp8
          ? RoundKeys(params, bounds, reinterpret_cast<float*>(PartOf(workspace, shares, part_bytes)), pool)
          : params;
  // A share of the tasks for each piece of scratch, dealt so that long and short rows mix.
  pool.ParallelFor(shares, [&](int64_t share, int) {
    ShareSelectionTask task(read, bounds, PartOf(workspace, share, part_bytes));
    for (int64_t i = share; i < tasks; i += shares) task.Run(i / row_blocks, i % row_blocks);
  });
  return absl::OkStatus();
}

}  // namespace longfill
