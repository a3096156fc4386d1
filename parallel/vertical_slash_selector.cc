#include "parallel/vertical_slash_selector.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "parallel/distributed_selection.h"

namespace longfill {
namespace {

constexpr int64_t kMinVertical = 30;
constexpr int64_t kMinSlash = 50;
constexpr int64_t kForcedKeys = 30;
constexpr int64_t kForcedDistances = 100;
constexpr int64_t kOverlap = kMaxSelectingQueries - 1;
constexpr int64_t kScoreBytesAtOnce = int64_t{64}
                                      << 20;  // scores and keys of the heads that are ranked together
constexpr int64_t kFloat = sizeof(float);

static_assert(kSelectionBlock == kTokenBlock, "each key block of the deal is one window");

int64_t BlocksOf(int64_t tokens) { return (tokens + kSelectionBlock - 1) / kSelectionBlock; }

// Scores, overlap and keys of one head.
int64_t BytesPerHead(int64_t local_tokens) {
  return local_tokens * (kFloat + 2 * static_cast<int64_t>(sizeof(uint64_t))) +
         BlocksOf(local_tokens) * (kDiagonalWindow + 2 * kOverlap) * kFloat;
}

}  // namespace

VerticalSlashSelector::VerticalSlashSelector(KernelSet& kernels, Communicator& world, const ShardPlan& plan,
                                             const AttentionGeometry& geometry, const SelectionScope& scope,
                                             std::span<const HeadPattern> patterns)
    : kernels_(kernels), world_(world), plan_(plan), geometry_(geometry), scope_(scope), patterns_(patterns) {
  for (size_t h = 0; h < patterns.size(); ++h) {
    if (std::holds_alternative<VerticalSlash>(patterns[h])) heads_.push_back(static_cast<int32_t>(h));
  }
  const int64_t most_tokens = plan.NumTokens(0);  // rank 0 has slot 0
  heads_at_once_ = std::clamp<int64_t>(kScoreBytesAtOnce / std::max<int64_t>(1, BytesPerHead(most_tokens)), 1,
                                       std::max<int64_t>(1, static_cast<int64_t>(heads_.size())));
  const int rank = world.rank();
  local_tokens_ = plan.NumTokens(rank);
  local_blocks_ = BlocksOf(local_tokens_);
  const bool has_first = plan.Slot(rank) == 0 && local_blocks_ > 0;
  const bool has_last = plan.num_tokens() > 0 && plan.RankOfToken(plan.num_tokens() - 1) == rank;
  blocks_with_previous_ = local_blocks_ - (has_first ? 1 : 0);
  blocks_with_next_ = local_blocks_ - (has_last ? 1 : 0);
}

VerticalSlashSelector::Sizes VerticalSlashSelector::BytesFor(int64_t local_tokens) const {
  if (heads_.empty()) return {};
  Sizes sizes;
  sizes.queries = geometry_.num_q_heads * scope_.num_queries * geometry_.head_dim * kFloat;
  sizes.vertical = heads_at_once_ * local_tokens * kFloat;
  sizes.slash = heads_at_once_ * BlocksOf(local_tokens) * kDiagonalWindow * kFloat;
  sizes.overlap = heads_at_once_ * BlocksOf(local_tokens) * kOverlap * kFloat;
  sizes.keys = 2 * heads_at_once_ * local_tokens * static_cast<int64_t>(sizeof(uint64_t));
  sizes.kernel = kernels_.LastQueryWorkspaceBytes(geometry_.head_dim);
  sizes.selection = DistributedSelectionBytes(2 * heads_at_once_);
  return sizes;
}

int64_t VerticalSlashSelector::PlanBytes() const {
  const Sizes s = BytesFor(plan_.NumTokens(0));
  // Queries: the result, and the staging of what is sent and received.
  return 3 * s.queries + s.vertical + s.slash + 2 * s.overlap + s.keys + s.kernel + s.selection;
}

absl::Status VerticalSlashSelector::Allocate() {
  const Sizes s = BytesFor(local_tokens_);
  MemoryResource& memory = kernels_.memory();
  LF_ASSIGN_OR_RETURN(queries_, memory.Allocate(s.queries, "selecting queries"));
  LF_ASSIGN_OR_RETURN(query_staging_, memory.Allocate(2 * s.queries, "staging of selecting queries"));
  LF_ASSIGN_OR_RETURN(vertical_, memory.Allocate(s.vertical, "vertical scores"));
  LF_ASSIGN_OR_RETURN(slash_, memory.Allocate(s.slash, "slash scores"));
  LF_ASSIGN_OR_RETURN(overlap_out_, memory.Allocate(s.overlap, "slash overlaps to send"));
  LF_ASSIGN_OR_RETURN(overlap_in_, memory.Allocate(s.overlap, "slash overlaps received"));
  LF_ASSIGN_OR_RETURN(keys_, memory.Allocate(s.keys, "selection keys"));
  LF_ASSIGN_OR_RETURN(kernel_workspace_, memory.Allocate(s.kernel, "last-query workspace"));
  LF_ASSIGN_OR_RETURN(selection_workspace_, memory.Allocate(s.selection, "selection workspace"));
  return absl::OkStatus();
}

// The selecting queries of all heads, on all ranks; they may lie in two blocks of two ranks.
absl::Status VerticalSlashSelector::GatherQueries(HeadsView<const float> q, Stream& stream) {
  const int64_t width = geometry_.head_dim;
  const auto rows_of = [&](int rank) {
    const PositionMap positions = plan_.TokenPositions(rank);
    return TokenRange{positions.RowsBelow(scope_.first_query), positions.RowsBelow(scope_.num_keys())};
  };
  const TokenRange mine = rows_of(world_.rank());
  float* to = query_staging_.as<float>();
  for (int64_t h = 0; h < geometry_.num_q_heads; ++h) {
    for (int64_t row = mine.begin; row < mine.end; ++row, to += width) {
      std::memcpy(to, q.data + h * q.head_stride + row * q.row_stride, static_cast<size_t>(width * kFloat));
    }
  }
  std::vector<int64_t> counts_bytes(world_.size());
  for (int r = 0; r < world_.size(); ++r) {
    const TokenRange rows = rows_of(r);
    counts_bytes[r] = geometry_.num_q_heads * (rows.end - rows.begin) * width * kFloat;
  }
  float* const gathered = query_staging_.as<float>() + query_staging_.size_bytes() / 2 / kFloat;
  LF_RETURN_IF_ERROR(world_.AllGather(query_staging_.data(), gathered, counts_bytes, stream));
  LF_RETURN_IF_ERROR(stream.Sync());
  const float* from = gathered;
  for (int r = 0; r < world_.size(); ++r) {
    const TokenRange rows = rows_of(r);
    const PositionMap positions = plan_.TokenPositions(r);
    for (int64_t h = 0; h < geometry_.num_q_heads; ++h) {
      for (int64_t row = rows.begin; row < rows.end; ++row, from += width) {
        const int64_t place = h * scope_.num_queries + positions.Position(row) - scope_.first_query;
        std::memcpy(queries_.as<float>() + place * width, from, static_cast<size_t>(width * kFloat));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status VerticalSlashSelector::Score(std::span<const int32_t> heads, HeadsView<const float> k,
                                          Stream& stream) {
  LastQueryParams params;
  params.q = {queries_.as<const float>(), scope_.num_queries * geometry_.head_dim, geometry_.head_dim};
  params.num_queries = scope_.num_queries;
  params.first_query_position = scope_.first_query;
  params.k = k;
  params.num_keys = local_tokens_;
  params.key_positions = plan_.TokenPositions(world_.rank());
  params.heads = heads;
  params.num_q_heads = geometry_.num_q_heads;
  params.num_kv_heads = geometry_.num_kv_heads;
  params.head_dim = geometry_.head_dim;
  params.scale = geometry_.scale;
  const Workspace workspace{kernel_workspace_.data(), kernel_workspace_.size_bytes()};
  const int64_t rows = static_cast<int64_t>(heads.size()) * kMaxSelectingQueries;
  std::vector<float> row_max(rows, -std::numeric_limits<float>::infinity());
  std::vector<uint64_t> row_sum(rows);
  LF_RETURN_IF_ERROR(kernels_.LastQueryRowMax(params, row_max.data(), workspace, stream));
  LF_RETURN_IF_ERROR(world_.AllReduce(row_max.data(), rows, ReduceType::kFloat32, ReduceOp::kMax, stream));
  LF_RETURN_IF_ERROR(kernels_.LastQueryRowSum(params, row_max.data(), row_sum.data(), workspace, stream));
  LF_RETURN_IF_ERROR(world_.AllReduce(row_sum.data(), rows, ReduceType::kUInt64, ReduceOp::kSum, stream));
  const LastQueryScores scores{vertical_.as<float>(), slash_.as<float>()};
  LF_RETURN_IF_ERROR(
      kernels_.LastQueryScore(params, row_max.data(), row_sum.data(), scores, workspace, stream));
  return stream.Sync();
}

// The last 63 entries of each window are distances of the next key block: they go to its owner, slot + 1.
absl::Status VerticalSlashSelector::ExchangeOverlaps(int64_t num_heads, Stream& stream) {
  const int rank = world_.rank();
  const int size = world_.size();
  const int slot = plan_.Slot(rank);
  float* to = overlap_out_.as<float>();
  for (int64_t i = 0; i < num_heads; ++i) {
    for (int64_t b = 0; b < blocks_with_next_; ++b, to += kOverlap) {
      const float* window = slash_.as<float>() + (i * local_blocks_ + b) * kDiagonalWindow;
      std::memcpy(to, window + kSelectionBlock, static_cast<size_t>(kOverlap * kFloat));
    }
  }
  const auto rank_of_slot = [&](int s) { return plan_.RankOfToken(kTokenBlock * s); };
  std::vector<int64_t> send_bytes(size);
  std::vector<int64_t> recv_bytes(size);
  send_bytes[rank_of_slot((slot + 1) % size)] = num_heads * blocks_with_next_ * kOverlap * kFloat;
  recv_bytes[rank_of_slot((slot + size - 1) % size)] = num_heads * blocks_with_previous_ * kOverlap * kFloat;
  LF_RETURN_IF_ERROR(
      world_.AllToAll(overlap_out_.data(), send_bytes, overlap_in_.data(), recv_bytes, stream));
  return stream.Sync();
}

// Lists 2i (keys) and 2i + 1 (distances) of head i.
void VerticalSlashSelector::ComposeKeys(int64_t num_heads) {
  constexpr float kForced = std::numeric_limits<float>::infinity();
  const PositionMap positions = plan_.TokenPositions(world_.rank());
  const int64_t first_with_previous = local_blocks_ - blocks_with_previous_;
  for (int64_t i = 0; i < num_heads; ++i) {
    const float* vertical = vertical_.as<float>() + i * local_tokens_;
    uint64_t* vertical_keys = keys_.as<uint64_t>() + 2 * i * local_tokens_;
    uint64_t* slash_keys = vertical_keys + local_tokens_;
    for (int64_t b = 0; b < local_blocks_; ++b) {
      const int64_t row = b * kSelectionBlock;
      const int64_t key_begin = positions.Position(row);
      const float* window = slash_.as<float>() + (i * local_blocks_ + b) * kDiagonalWindow;
      const float* previous =
          b < first_with_previous
              ? nullptr
              : overlap_in_.as<float>() + (i * blocks_with_previous_ + b - first_with_previous) * kOverlap;
      const int64_t rows = std::min(kSelectionBlock, local_tokens_ - row);
      for (int64_t e = 0; e < rows; ++e) {
        const int64_t key = key_begin + e;
        const int64_t distance = scope_.last_query() - key;
        const float slash = previous != nullptr && e < kOverlap ? window[e] + previous[e] : window[e];
        vertical_keys[row + e] = SelectionKey(key < kForcedKeys ? kForced : vertical[row + e], key);
        slash_keys[row + e] = SelectionKey(distance < kForcedDistances ? kForced : slash, distance);
      }
    }
  }
}

absl::StatusOr<std::vector<VerticalSlashSelection>> VerticalSlashSelector::Select(HeadsView<const float> q,
                                                                                  HeadsView<const float> k,
                                                                                  Stream& stream) {
  std::vector<VerticalSlashSelection> result(patterns_.size());
  if (heads_.empty() || scope_.num_keys() == 0) return result;
  LF_RETURN_IF_ERROR(GatherQueries(q, stream));
  for (size_t begin = 0; begin < heads_.size(); begin += static_cast<size_t>(heads_at_once_)) {
    const size_t count = std::min(heads_.size() - begin, static_cast<size_t>(heads_at_once_));
    const std::span<const int32_t> heads(heads_.data() + begin, count);
    LF_RETURN_IF_ERROR(Score(heads, k, stream));
    LF_RETURN_IF_ERROR(ExchangeOverlaps(static_cast<int64_t>(count), stream));
    ComposeKeys(static_cast<int64_t>(count));
    std::vector<int64_t> budgets;
    for (const int32_t head : heads) {
      const VerticalSlash& pattern = std::get<VerticalSlash>(patterns_[head]);
      budgets.push_back(std::min(scope_.num_keys(), std::max(pattern.vertical, kMinVertical)));
      budgets.push_back(std::min(scope_.num_keys(), std::max(pattern.slash, kMinSlash)));
    }
    LF_ASSIGN_OR_RETURN(
        auto selected,
        SelectLargest(kernels_, world_, keys_.as<uint64_t>(), local_tokens_, local_tokens_, budgets,
                      {selection_workspace_.data(), selection_workspace_.size_bytes()}, stream));
    for (size_t i = 0; i < count; ++i) {
      result[heads[i]] = {std::move(selected[2 * i]), std::move(selected[2 * i + 1])};
    }
  }
  return result;
}

}  // namespace longfill
