#include "kernels/cpu/block_selection.h"

#include <algorithm>
#include <bit>
#include <functional>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/block_selection_simd.h"
#include "kernels/cpu/workspace.h"
#include "kernels/sparse/position_check.h"

namespace longfill {
namespace {

// Ascending unsigned order is the order of the values; -0 counts as 0.
uint32_t OrderedBits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

// Larger first by score, then by lower block.
uint64_t BlockKey(float score, int64_t block) {
  return uint64_t{OrderedBits(score)} << 32 | (0xFFFFFFFFU - static_cast<uint32_t>(block));
}
uint64_t ForcedKey(uint32_t rank, int64_t block) {
  return uint64_t{rank} << 32 | (0xFFFFFFFFU - static_cast<uint32_t>(block));
}
int64_t BlockOfKey(uint64_t key) { return 0xFFFFFFFFU - static_cast<uint32_t>(key); }

int64_t RowBlockOf(const SelectBlocksParams& params, int64_t i) {
  return params.positions.Position(i * kRowBlock) / kRowBlock;
}

absl::Status CheckSelectBlocks(const SelectBlocksParams& params, Workspace workspace, int num_threads) {
  LF_RETURN_IF_ERROR(CheckHeadDim("block selection", params.head_dim));
  LF_RETURN_IF_ERROR(CheckAtLeast("block selection", "num_blocks", params.num_blocks, 1));
  LF_RETURN_IF_ERROR(
      CheckKeepsTogether("block selection", params.positions, kRowBlock, params.num_row_blocks * kRowBlock));
  const int64_t last = RowBlockOf(params, params.num_row_blocks - 1);  // they ascend
  if (last >= params.num_key_blocks) {
    return absl::InvalidArgumentError(
        absl::StrCat("block selection: row block ", last, " of ", params.num_key_blocks, " key blocks"));
  }
  return CheckWorkspace("block selection", workspace,
                        CpuSelectBlocksWorkspaceBytes(params.num_row_blocks, params.num_key_blocks,
                                                      params.head_dim, num_threads));
}

// Up to 64 row blocks against all key blocks, in the scratch of one worker.
class BlockSelectionTask {
 public:
  // Scratch: packed queries, scores, keys to select from.
  static int64_t ScratchBytes(int64_t head_dim, int64_t num_key_blocks) {
    return (head_dim + num_key_blocks) * kTileLanes * static_cast<int64_t>(sizeof(float)) +
           num_key_blocks * static_cast<int64_t>(sizeof(uint64_t) + sizeof(const float*));
  }

  BlockSelectionTask(const SelectBlocksParams& params, char* scratch) : params_(params) {
    packed_ = reinterpret_cast<float*>(scratch);
    scores_ = packed_ + params.head_dim * kTileLanes;
    keys_ = reinterpret_cast<uint64_t*>(scores_ + params.num_key_blocks * kTileLanes);
    rows_ = reinterpret_cast<const float**>(keys_ + params.num_key_blocks);
  }

  void Run(int64_t begin, int64_t end) {
    int64_t num_key_blocks = 0;
    for (int64_t i = begin; i < end; ++i) num_key_blocks = std::max<int64_t>(num_key_blocks, RowBlock(i) + 1);
    for (int64_t i = 0; i < params_.head_dim; ++i) {
      for (int64_t lane = 0; lane < kTileLanes; ++lane) {
        packed_[i * kTileLanes + lane] =
            begin + lane < end ? params_.pooled_q[(begin + lane) * params_.head_dim + i] : 0.0F;
      }
    }
    for (int64_t n = 0; n < num_key_blocks; ++n) rows_[n] = params_.pooled_k + n * params_.head_dim;
    ScorePackedRows(packed_, params_.head_dim, rows_, num_key_blocks, scores_);
    for (int64_t i = begin; i < end; ++i) Select(i, scores_ + (i - begin));
  }

 private:
  int64_t RowBlock(int64_t i) const { return RowBlockOf(params_, i); }

  void Select(int64_t i, const float* scores) {
    const int64_t m = RowBlock(i);
    const int64_t count = std::min(params_.num_blocks, m + 1);
    for (int64_t n = 0; n <= m; ++n) keys_[n] = BlockKey(scores[n * kTileLanes], n);
    if (params_.force) {
      // Above every finite score, the diagonal first, so that it is what a single block keeps.
      keys_[0] = ForcedKey(0xFFFFFFFEU, 0);
      keys_[m] = ForcedKey(0xFFFFFFFFU, m);
    }
    if (count <= m) std::nth_element(keys_, keys_ + count - 1, keys_ + m + 1, std::greater<uint64_t>());
    int32_t* out = params_.selected + i * params_.num_blocks;
    for (int64_t n = 0; n < count; ++n) out[n] = static_cast<int32_t>(BlockOfKey(keys_[n]));
    std::sort(out, out + count);
  }

  const SelectBlocksParams& params_;
  float* packed_;
  float* scores_;  // [num_key_blocks, kTileLanes]
  uint64_t* keys_;
  const float** rows_;
};

// Pieces of work, and how many of them run at a time.
int64_t NumTasks(int64_t num_row_blocks) { return (num_row_blocks + kTileLanes - 1) / kTileLanes; }
int64_t NumShares(int64_t num_row_blocks, int num_threads) {
  return std::min<int64_t>(NumTasks(num_row_blocks), num_threads);
}

}  // namespace

absl::Status CpuPool(const PoolParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("pool", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("pool", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("pool", "head_dim", params.head_dim, 0));
  const float* data = static_cast<const float*>(params.x.data);
  const int64_t blocks = RowBlocksOf(params.num_rows);
  pool.ParallelFor(params.num_heads * blocks, [&](int64_t task, int) {
    const int64_t head = task / blocks;
    const int64_t begin = task % blocks * kRowBlock;
    const int64_t end = std::min(params.num_rows, begin + kRowBlock);
    float* out = params.out + task * params.head_dim;
    std::fill_n(out, params.head_dim, 0.0F);
    // Rows are added in ascending order, each element by itself: the same bits on every machine.
    for (int64_t row = begin; row < end; ++row) {
      const float* x = data + head * params.x.head_stride + row * params.x.row_stride;
      for (int64_t i = 0; i < params.head_dim; ++i) out[i] += x[i];
    }
    for (int64_t i = 0; i < params.head_dim; ++i) out[i] /= static_cast<float>(end - begin);
  });
  return absl::OkStatus();
}

int64_t CpuSelectBlocksWorkspaceBytes(int64_t num_row_blocks, int64_t num_key_blocks, int64_t head_dim,
                                      int num_threads) {
  return PartsBytes(NumShares(num_row_blocks, num_threads),
                    BlockSelectionTask::ScratchBytes(head_dim, num_key_blocks));
}

absl::Status CpuSelectBlocks(const SelectBlocksParams& params, Workspace workspace, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("block selection", "num_row_blocks", params.num_row_blocks, 0));
  if (params.num_row_blocks == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(CheckSelectBlocks(params, workspace, pool.num_threads()));
  const int64_t tasks = NumTasks(params.num_row_blocks);
  const int64_t shares = NumShares(params.num_row_blocks, pool.num_threads());
  const int64_t part_bytes = BlockSelectionTask::ScratchBytes(params.head_dim, params.num_key_blocks);
  // A share of the tasks for each piece of scratch; workers of the pool may be more than the pieces.
  pool.ParallelFor(shares, [&](int64_t share, int) {
    BlockSelectionTask task(params, PartOf(workspace, share, part_bytes));
    for (int64_t i = share; i < tasks; i += shares) {
      task.Run(i * kTileLanes, std::min(params.num_row_blocks, (i + 1) * kTileLanes));
    }
  });
  return absl::OkStatus();
}

}  // namespace longfill
