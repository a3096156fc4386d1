#include "kernels/cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/workspace.h"

namespace longfill {
namespace {

int64_t TileBytes(int64_t head_dim) {
  return AttentionTileFloats(head_dim) * static_cast<int64_t>(sizeof(float));
}

absl::Status CheckSequence(const AttentionParams& params, const AttentionSequence& sequence, size_t number) {
  const auto bad = [&](auto&&... text) {
    return absl::InvalidArgumentError(absl::StrCat("attention: sequence ", number, ": ", text...));
  };
  const int64_t q_rows = sequence.q_end - sequence.q_begin;
  const int64_t k_rows = sequence.k_end - sequence.k_begin;
  if (sequence.q_begin < 0 || q_rows < 0) {
    return bad("query rows [", sequence.q_begin, ", ", sequence.q_end, ")");
  }
  if (sequence.k_begin < 0 || k_rows < 0 || sequence.key_first < 0) {
    return bad("key rows [", sequence.k_begin, ", ", sequence.k_end, ") from position ", sequence.key_first);
  }
  if (q_rows == 0) return absl::OkStatus();
  const PositionMap& map = sequence.q_positions;
  if (!map.Ascends()) return bad("position map ", ToString(map), " does not ascend");
  if (map.Position(q_rows - 1) >= sequence.num_tokens) {
    return bad("last query at position ", map.Position(q_rows - 1), " of ", sequence.num_tokens, " tokens");
  }
  if (sequence.num_tokens > std::numeric_limits<int32_t>::max()) {
    return bad(sequence.num_tokens, " tokens exceed 2^31 - 1");
  }
  const bool empty = sequence.key_range_begin >= sequence.key_range_end;
  if (!empty && (sequence.key_range_begin < sequence.key_first ||
                 sequence.key_range_end > sequence.key_first + k_rows)) {
    return bad("key range [", sequence.key_range_begin, ", ", sequence.key_range_end,
               ") outside of the keys [", sequence.key_first, ", ", sequence.key_first + k_rows, ")");
  }
  if (static_cast<int64_t>(sequence.indices.size()) != params.num_q_heads) {
    return bad(sequence.indices.size(), " indices for ", params.num_q_heads, " query heads");
  }
  for (size_t head = 0; head < sequence.indices.size(); ++head) {
    const IndexView& index = sequence.indices[head];
    const bool missing =
        index.form == IndexView::Form::kBlockList ? index.key_blocks == nullptr : index.counts == nullptr;
    if (missing) return bad("index of query head ", head, " is null");
  }
  return absl::OkStatus();
}

absl::Status CheckParams(const AttentionParams& params) {
  LF_RETURN_IF_ERROR(CheckAtLeast("attention", "num_q_heads", params.num_q_heads, 0));
  if (params.num_q_heads == 0 || params.sequences.empty()) return absl::OkStatus();
  LF_RETURN_IF_ERROR(CheckHeadDim("attention", params.head_dim));
  LF_RETURN_IF_ERROR(CheckAtLeast("attention", "num_kv_heads", params.num_kv_heads, 1));
  if (params.kv_head.empty()) {
    if (params.num_q_heads % params.num_kv_heads != 0) {
      return absl::InvalidArgumentError(absl::StrCat("attention: ", params.num_q_heads,
                                                     " query heads do not divide among ", params.num_kv_heads,
                                                     " KV heads and kv_head is empty"));
    }
  } else {
    if (static_cast<int64_t>(params.kv_head.size()) != params.num_q_heads) {
      return absl::InvalidArgumentError(absl::StrCat("attention: kv_head has ", params.kv_head.size(),
                                                     " entries for ", params.num_q_heads, " query heads"));
    }
    for (int32_t head : params.kv_head) {
      if (head < 0 || head >= params.num_kv_heads) {
        return absl::InvalidArgumentError(
            absl::StrCat("attention: kv_head ", head, " of ", params.num_kv_heads));
      }
    }
  }
  if (params.merge && params.lse == nullptr) {
    return absl::InvalidArgumentError("attention: merge needs the lse of the earlier result");
  }
  for (size_t i = 0; i < params.sequences.size(); ++i) {
    LF_RETURN_IF_ERROR(CheckSequence(params, params.sequences[i], i));
  }
  return absl::OkStatus();
}

// One row block of one head of one sequence, as far as its rows are given.
struct TileTask {
  const AttentionSequence* sequence = nullptr;
  int64_t head = 0;
  int64_t row_block = 0;
  int64_t row_begin = 0;  // rows relative to q_begin
  int64_t row_end = 0;
};

// Row blocks of a sequence that hold any of its rows. Position blocks between two stretches of a strided map
// may hold none; tasks for them do nothing.
struct RowBlockSpan {
  int64_t first = 0;
  int64_t count = 0;
};
RowBlockSpan RowBlocksOf(const AttentionSequence& sequence) {
  const int64_t rows = sequence.q_end - sequence.q_begin;
  if (rows == 0) return {};
  const int64_t first = sequence.q_positions.Position(0) / kRowBlock;
  return {first, sequence.q_positions.Position(rows - 1) / kRowBlock - first + 1};
}

// Runs one tile after the other in the scratch of one worker.
class TileRunner {
 public:
  TileRunner(const AttentionParams& params, float* memory, TileKeys& keys)
      : params_(params), tile_(PlaceAttentionTile(memory, params.head_dim)), keys_(keys) {}

  void Run(const TileTask& task) {
    task_ = &task;
    const AttentionSequence& sequence = *task.sequence;
    const int64_t num_rows = task.row_end - task.row_begin;
    const int64_t block_position = task.row_block * kRowBlock;
    const int64_t q_row = sequence.q_begin + task.row_begin;
    StartAttentionTile(tile_,
                       static_cast<const float*>(params_.q.data) + task.head * params_.q.head_stride +
                           q_row * params_.q.row_stride,
                       params_.q.row_stride, num_rows, params_.scale);
    PlaceLanes(num_rows, block_position);
    const int64_t kv_head = params_.kv_head.empty() ? task.head / (params_.num_q_heads / params_.num_kv_heads)
                                                    : params_.kv_head[static_cast<size_t>(task.head)];
    k_ = static_cast<const float*>(params_.k.data) + kv_head * params_.k.head_stride;
    v_ = static_cast<const float*>(params_.v.data) + kv_head * params_.v.head_stride;

    keys_.Clear();
    ExpandTile(sequence.indices[static_cast<size_t>(task.head)], task.row_block, sequence.num_tokens, &keys_);
    chunk_.num_keys = 0;
    chunk_.masked = false;
    AddColumns(block_position);
    for (const KeyRange& range : keys_.ranges) AddRange(range, block_position);
    Flush();
    float* lse = params_.lse == nullptr ? nullptr : params_.lse + task.head * params_.lse_head_stride + q_row;
    FinishAttentionTile(tile_, num_rows, params_.merge,
                        static_cast<float*>(params_.out.data) + task.head * params_.out.head_stride +
                            q_row * params_.out.row_stride,
                        params_.out.row_stride, lse);
  }

  int64_t covered_pairs() const { return covered_pairs_; }
  int64_t computed_pairs() const { return computed_pairs_; }

 private:
  void PlaceLanes(int64_t num_rows, int64_t block_position) {
    int64_t lane = 0;
    for (int64_t position = 0; position < kRowBlock; ++position) {
      rows_below_[position] = lane;
      if (lane < num_rows &&
          task_->sequence->q_positions.Position(task_->row_begin + lane) - block_position == position) {
        tile_.lane_position[lane++] = static_cast<float>(position);
      }
    }
    rows_below_[kRowBlock] = lane;
    last_position_ = static_cast<int64_t>(tile_.lane_position[num_rows - 1]);
    for (; lane < kTileLanes; ++lane) tile_.lane_position[lane] = 0.0F;
  }

  // Key positions that any row of the tile may see: causal and inside the key range.
  int64_t FirstKey() const { return task_->sequence->key_range_begin; }
  int64_t EndKey(int64_t block_position) const {
    return std::min(task_->sequence->key_range_end, block_position + last_position_ + 1);
  }

  void AddColumns(int64_t block_position) {
    const std::vector<int32_t>& columns = keys_.columns;
    const int64_t end = EndKey(block_position);
    auto column = std::lower_bound(columns.begin(), columns.end(), FirstKey());
    for (; column != columns.end() && *column < end; ++column) {
      AddKey(*column, *column - block_position, kTileLanes);
    }
  }

  void AddRange(const KeyRange& range, int64_t block_position) {
    const int64_t begin = std::max(range.begin, FirstKey());
    const int64_t end = std::min(range.end, EndKey(block_position));
    for (int64_t key = begin; key < end; ++key) {
      const int64_t relative = key - block_position;
      // max_distance may be the largest int64_t: compare before adding.
      const int64_t to =
          range.max_distance > kTileLanes - relative ? kTileLanes : relative + range.max_distance;
      AddKey(key, relative + range.min_distance, to);
    }
  }

  // Rows at tile positions [from, to) see the key.
  void AddKey(int64_t key, int64_t from, int64_t to) {
    from = std::clamp<int64_t>(from, 0, kTileLanes);
    to = std::clamp<int64_t>(to, from, kTileLanes);
    const int64_t row = task_->sequence->k_begin + key - task_->sequence->key_first;
    const int64_t i = chunk_.num_keys++;
    chunk_.k_rows[i] = k_ + row * params_.k.row_stride;
    chunk_.v_rows[i] = v_ + row * params_.v.row_stride;
    chunk_.visible_from[i] = static_cast<float>(from);
    chunk_.visible_to[i] = static_cast<float>(to);
    chunk_.masked |= from > 0 || to < kTileLanes;
    covered_pairs_ += rows_below_[to] - rows_below_[from];
    computed_pairs_ += rows_below_[kRowBlock];
    if (chunk_.num_keys == kChunkKeys) Flush();
  }

  void Flush() {
    if (chunk_.num_keys > 0) AddAttentionChunk(tile_, chunk_);
    chunk_.num_keys = 0;
    chunk_.masked = false;
  }

  const AttentionParams& params_;
  const AttentionTile tile_;
  TileKeys& keys_;
  AttentionChunk chunk_;
  const TileTask* task_ = nullptr;
  const float* k_ = nullptr;
  const float* v_ = nullptr;
  int64_t rows_below_[kRowBlock + 1] = {};  // rows of the tile at tile positions below
  int64_t last_position_ = 0;               // of the tile's rows
  int64_t covered_pairs_ = 0;
  int64_t computed_pairs_ = 0;
};

// Task `number` of a sequence: heads outside, row blocks from the last to the first.
TileTask TaskOf(const AttentionSequence& sequence, int64_t number, RowBlockSpan span) {
  TileTask task;
  task.sequence = &sequence;
  task.head = number / span.count;
  task.row_block = span.first + span.count - 1 - number % span.count;
  const int64_t rows = sequence.q_end - sequence.q_begin;
  task.row_begin = std::min(rows, sequence.q_positions.RowsBelow(task.row_block * kRowBlock));
  task.row_end = std::min(rows, sequence.q_positions.RowsBelow((task.row_block + 1) * kRowBlock));
  return task;
}

}  // namespace

int64_t CpuAttentionWorkspaceBytes(int64_t head_dim, int num_threads) {
  return PartsBytes(num_threads, TileBytes(head_dim));
}

absl::Status CpuAttention(const AttentionParams& params, Workspace workspace, ThreadPool& pool,
                          TileKeysOfWorkers& keys) {
  LF_RETURN_IF_ERROR(CheckParams(params));
  int64_t num_rows = 0;
  for (const AttentionSequence& sequence : params.sequences) num_rows += sequence.q_end - sequence.q_begin;
  if (num_rows == 0 || params.num_q_heads == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(CheckWorkspace("attention", workspace,
                                    CpuAttentionWorkspaceBytes(params.head_dim, pool.num_threads())));

  std::atomic<int64_t> covered{0};
  std::atomic<int64_t> computed{0};
  for (const AttentionSequence& sequence : params.sequences) {
    const RowBlockSpan span = RowBlocksOf(sequence);
    pool.ParallelFor(span.count * params.num_q_heads, [&](int64_t number, int worker) {
      const TileTask task = TaskOf(sequence, number, span);
      if (task.row_begin == task.row_end) return;
      float* memory = reinterpret_cast<float*>(PartOf(workspace, worker, TileBytes(params.head_dim)));
      TileRunner runner(params, memory, keys[static_cast<size_t>(worker)]);
      runner.Run(task);
      covered.fetch_add(runner.covered_pairs(), std::memory_order_relaxed);
      computed.fetch_add(runner.computed_pairs(), std::memory_order_relaxed);
    });
  }
  if (params.covered_pairs != nullptr) *params.covered_pairs += covered.load();
  if (params.computed_pairs != nullptr) *params.computed_pairs += computed.load();
  return absl::OkStatus();
}

}  // namespace longfill
