#include "kernels/cpu/selection.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <functional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/selection_simd.h"
#include "kernels/cpu/workspace.h"

namespace longfill {
namespace {

constexpr int64_t kKeysPerTask = int64_t{1} << 16;
constexpr int kMaxLocalBins = 4096;

absl::Status CheckHistogram(const SelectionHistogramParams& params) {
  LF_RETURN_IF_ERROR(CheckAtLeast("selection histogram", "num_keys", params.num_keys, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("selection histogram", "list_stride", params.list_stride, params.num_keys));
  if (params.num_bins < 1 || !std::has_single_bit(static_cast<unsigned>(params.num_bins))) {
    return absl::InvalidArgumentError(
        absl::StrCat("selection histogram: num_bins ", params.num_bins, " is not a power of two"));
  }
  if (params.num_bins > kMaxLocalBins) {
    return absl::UnimplementedError(absl::StrCat("selection histogram: no variant for ", params.num_bins,
                                                 " bins, at most ", kMaxLocalBins));
  }
  if (params.prefix_shift < 0 || params.prefix_shift > 64 || params.digit_shift < 0 ||
      params.digit_shift > 63) {
    return absl::InvalidArgumentError(absl::StrCat("selection histogram: prefix_shift ", params.prefix_shift,
                                                   " or digit_shift ", params.digit_shift, " out of range"));
  }
  if (params.prefix_shift < 64 && params.prefixes == nullptr) {
    return absl::InvalidArgumentError("selection histogram: prefix_shift below 64 needs prefixes");
  }
  return absl::OkStatus();
}

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

absl::Status CheckSelectBlocks(const SelectBlocksParams& params) {
  LF_RETURN_IF_ERROR(CheckHeadDim("block selection", params.head_dim));
  LF_RETURN_IF_ERROR(CheckAtLeast("block selection", "num_blocks", params.num_blocks, 1));
  for (int32_t block : params.row_blocks) {
    if (block < 0 || block >= params.num_key_blocks) {
      return absl::InvalidArgumentError(
          absl::StrCat("block selection: row block ", block, " of ", params.num_key_blocks, " key blocks"));
    }
  }
  return absl::OkStatus();
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
  int64_t RowBlock(int64_t i) const { return params_.row_blocks[static_cast<size_t>(i)]; }

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

}  // namespace

absl::Status CpuSelectionHistogram(const SelectionHistogramParams& params, ThreadPool& pool) {
  if (params.num_lists <= 0) return CheckAtLeast("selection histogram", "num_lists", params.num_lists, 0);
  LF_RETURN_IF_ERROR(CheckHistogram(params));
  std::fill_n(params.histogram, params.num_lists * params.num_bins, uint64_t{0});
  const int64_t parts = (params.num_keys + kKeysPerTask - 1) / kKeysPerTask;
  pool.ParallelFor(params.num_lists * parts, [&](int64_t task, int) {
    const int64_t list = task / parts;
    const int64_t begin = task % parts * kKeysPerTask;
    const int64_t end = std::min(params.num_keys, begin + kKeysPerTask);
    const uint64_t* keys = params.keys + list * params.list_stride;
    const uint64_t mask = static_cast<uint64_t>(params.num_bins) - 1;
    const bool all = params.prefix_shift == 64;
    const uint64_t prefix = all ? 0 : params.prefixes[list];
    uint32_t counts[kMaxLocalBins];
    std::fill_n(counts, params.num_bins, 0U);
    for (int64_t i = begin; i < end; ++i) {
      if (all || keys[i] >> params.prefix_shift == prefix) ++counts[keys[i] >> params.digit_shift & mask];
    }
    for (int bin = 0; bin < params.num_bins; ++bin) {
      if (counts[bin] == 0) continue;
      std::atomic_ref<uint64_t>(params.histogram[list * params.num_bins + bin])
          .fetch_add(counts[bin], std::memory_order_relaxed);
    }
  });
  return absl::OkStatus();
}

absl::Status CpuPool(const PoolParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("pool", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("pool", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("pool", "head_dim", params.head_dim, 0));
  const int64_t blocks = (params.num_rows + kRowBlock - 1) / kRowBlock;
  pool.ParallelFor(params.num_heads * blocks, [&](int64_t task, int) {
    const int64_t head = task / blocks;
    const int64_t begin = task % blocks * kRowBlock;
    const int64_t end = std::min(params.num_rows, begin + kRowBlock);
    float* out = params.out + task * params.head_dim;
    std::fill_n(out, params.head_dim, 0.0F);
    // Rows are added in ascending order, each element by itself: the same bits on every machine.
    for (int64_t row = begin; row < end; ++row) {
      const float* x = params.x.data + head * params.x.head_stride + row * params.x.row_stride;
      for (int64_t i = 0; i < params.head_dim; ++i) out[i] += x[i];
    }
    for (int64_t i = 0; i < params.head_dim; ++i) out[i] /= static_cast<float>(end - begin);
  });
  return absl::OkStatus();
}

absl::Status CpuSelectBlocks(const SelectBlocksParams& params, MemoryResource& memory, ThreadPool& pool) {
  const int64_t num_row_blocks = static_cast<int64_t>(params.row_blocks.size());
  if (num_row_blocks == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(CheckSelectBlocks(params));
  const int64_t tasks = (num_row_blocks + kTileLanes - 1) / kTileLanes;
  const int64_t workers = std::min<int64_t>(tasks, pool.num_threads());
  const int64_t part_bytes = BlockSelectionTask::ScratchBytes(params.head_dim, params.num_key_blocks);
  const int64_t scratch_bytes = PartsBytes(workers, part_bytes);
  LF_ASSIGN_OR_RETURN(const Buffer scratch, memory.Allocate(scratch_bytes, "block selection scratch"));
  // A share of the tasks for each piece of scratch; workers of the pool may be more than the pieces.
  pool.ParallelFor(workers, [&](int64_t share, int) {
    BlockSelectionTask task(params, PartOf({scratch.data(), scratch_bytes}, share, part_bytes));
    for (int64_t i = share; i < tasks; i += workers) {
      task.Run(i * kTileLanes, std::min(num_row_blocks, (i + 1) * kTileLanes));
    }
  });
  return absl::OkStatus();
}

}  // namespace longfill
