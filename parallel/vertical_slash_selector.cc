#include "parallel/vertical_slash_selector.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/base/piece_layout.h"
#include "parallel/packing.h"

namespace longfill {
namespace {

constexpr int64_t kForcedKeys = 30;
constexpr int64_t kForcedDistances = 100;
// Scores of the heads that are ranked together: what stays in a cache on the CPU, all heads of a layer on a
// GPU.
constexpr int64_t kCpuScoreBytes = int64_t{64} << 20;
constexpr int64_t kDeviceScoreBytes = int64_t{1} << 30;
constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kWord = sizeof(uint64_t);

static_assert(kSelectionBlock == kTokenBlock, "dealt blocks are whole windows");

int64_t BlocksOf(int64_t tokens) { return (tokens + kSelectionBlock - 1) / kSelectionBlock; }
int64_t ScoreStride(int64_t local_tokens) { return (local_tokens + 63) / 64 * 64; }

// Scores, windows and overlaps of one head. Not the workspaces, which differ between ranks with the machine.
int64_t ScoreBytesPerHead(int64_t local_tokens, bool several_ranks, bool split) {
  return (2 * ScoreStride(local_tokens) +
          BlocksOf(local_tokens) *
              (kDiagonalWindow * (split ? 2 : 1) + (several_ranks ? 3 * kDiagonalOverlap : 0))) *
         kFloat;
}

// Rows of a rank that hold selecting queries.
TokenRange SelectingRows(const ShardPlan& plan, const SelectionScope& scope, int rank) {
  const PositionMap positions = plan.TokenPositions(rank);
  return {positions.RowsBelow(scope.first_query), positions.RowsBelow(scope.num_keys())};
}

}  // namespace

VerticalSlashSelector::VerticalSlashSelector(const KernelSet& kernels, const ShardPlan& plan,
                                             const AttentionGeometry& geometry, const SelectionScope& scope,
                                             std::span<const HeadPattern> patterns)
    : kernels_(kernels), plan_(plan), geometry_(geometry), scope_(scope) {
  if (scope.num_keys() == 0) return;
  for (size_t h = 0; h < patterns.size(); ++h) {
    const auto* lines = std::get_if<VerticalSlash>(&patterns[h]);
    if (lines == nullptr) continue;
    heads_.push_back(static_cast<int32_t>(h));
    budgets_.emplace_back(*lines, scope.num_keys());
  }
  const int64_t budget = kernels.device() == DeviceKind::kCpu ? kCpuScoreBytes : kDeviceScoreBytes;
  const int64_t per_head = ScoreBytesPerHead(plan.MostTokens(), plan.mesh().size() > 1, scope.split);
  heads_at_once_ =
      std::clamp<int64_t>(budget / per_head, 1, std::max<int64_t>(1, static_cast<int64_t>(heads_.size())));
}

int64_t VerticalSlashSelector::WordsPerList() const { return (scope_.num_keys() + 63) / 64; }

TokenRange VerticalSlashSelector::PartRows(int part, int rank) const {
  if (!scope_.split) return {0, plan_.NumTokens(rank)};
  const TokenRange keys = geometry_.dual_chunk.Keys(kChunkParts[part], scope_.chunk, scope_.num_keys());
  const PositionMap positions = plan_.TokenPositions(rank);
  return {positions.RowsBelow(keys.begin), positions.RowsBelow(keys.end)};
}

VerticalSlashSelector::Scratch VerticalSlashSelector::ScratchFor(int rank) const {
  Scratch at;
  if (heads_.empty()) return at;
  const int64_t local_tokens = plan_.NumTokens(rank);
  const bool several_ranks = plan_.mesh().size() > 1;
  const int64_t lists = 2 * heads_at_once_;
  const int64_t rows = NumParts() * heads_at_once_ * kMaxSelectingQueries;
  const int64_t blocks = heads_at_once_ * BlocksOf(local_tokens);
  const int64_t query_bytes =
      geometry_.num_q_heads * scope_.num_queries * geometry_.head_dim * DTypeBytes(kernels_.compute_dtype());
  PieceLayout pieces;
  if (several_ranks) {
    at.query_staging = pieces.Add(query_bytes);
    at.gathered_queries = pieces.Add(query_bytes);
    at.overlaps_sent = pieces.Add(blocks * kDiagonalOverlap * kFloat);
    at.overlaps_received = pieces.Add(blocks * kDiagonalOverlap * kFloat);
    at.overlaps = pieces.Add(blocks * kDiagonalOverlap * kFloat);
  }
  if (several_ranks || scope_.split) at.queries = pieces.Add(query_bytes);
  if (scope_.split) at.part_slash = pieces.Add(blocks * kDiagonalWindow * kFloat);
  PieceLayout part_workspaces;
  for (int part = 0; part < NumParts(); ++part) {
    if (scope_.split) at.rotated[part] = pieces.Add(query_bytes);
    const TokenRange keys = PartRows(part, rank);
    at.score_workspace_bytes[part] =
        kernels_.LastQueryWorkspaceBytes(heads_at_once_, keys.end - keys.begin, geometry_.head_dim);
    at.score_workspace[part] = part_workspaces.Add(at.score_workspace_bytes[part]);
  }
  at.row_max = pieces.Add(rows * kFloat);
  at.row_sum = pieces.Add(rows * kWord);
  at.scores = pieces.Add(lists * ScoreStride(local_tokens) * kFloat);
  at.slash = pieces.Add(blocks * kDiagonalWindow * kFloat);
  at.histogram = pieces.Add(lists * kSelectionBins * kWord);
  at.bits = pieces.Add(lists * WordsPerList() * kWord);
  at.workspace_bytes = std::max({part_workspaces.total_bytes(),
                                 kernels_.BuildIndexWorkspaceBytes(heads_at_once_, WordsPerList()),
                                 kernels_.CountPairsWorkspaceBytes(heads_at_once_, scope_.num_keys())});
  at.workspace = pieces.Add(at.workspace_bytes);
  at.total_bytes = pieces.total_bytes();
  return at;
}

int64_t VerticalSlashSelector::ScratchBytes(int rank) const { return ScratchFor(rank).total_bytes; }

// The heads that are ranked together, on one rank.
class VerticalSlashSelector::Batch {
 public:
  Batch(const VerticalSlashSelector& selector, const SelectionContext& context)
      : selector_(selector),
        context_(context),
        kernels_(context.kernels()),
        stream_(context.stream()),
        world_(context.world),
        plan_(selector.plan_),
        scope_(selector.scope_),
        several_ranks_(context.world.size() > 1),
        positions_(plan_.TokenPositions(world_.rank())),
        local_tokens_(plan_.NumTokens(world_.rank())),
        local_blocks_(BlocksOf(local_tokens_)),
        at_(selector.ScratchFor(world_.rank())) {}

  // The selecting queries of all heads, which all batches share.
  absl::Status TakeQueries(HeadsView<const void> q) {
    HeadsView<const void> queries = q;
    queries.data = Advance(q.data, scope_.first_query * q.row_stride, kernels_.compute_dtype());
    if (several_ranks_) {
      LF_RETURN_IF_ERROR(GatherQueries(q));
      queries = DenseQueries(at_.queries);
    }
    queries_[0] = queries;
    if (!scope_.split) return absl::OkStatus();
    for (int part = 0; part < selector_.NumParts(); ++part) {
      const ChunkQueries last{scope_.chunk, queries, selector_.geometry_.num_q_heads, scope_.num_queries,
                              PositionMap::Contiguous(scope_.first_query)};
      LF_RETURN_IF_ERROR(RotateQueries(kernels_, selector_.geometry_.dual_chunk, context_.query_rotary,
                                       kChunkParts[part], /*critical=*/true, last,
                                       Piece<void>(at_.rotated[part]), stream_));
      queries_[part] = DenseQueries(at_.rotated[part]);
    }
    return absl::OkStatus();
  }

  // Heads [begin, begin + count) of the selector's.
  absl::Status Run(size_t begin, size_t count, HeadsView<const void> k) {
    begin_ = begin;
    count_ = static_cast<int64_t>(count);
    heads_ = std::span(selector_.heads_).subspan(begin, count);
    cuts_ = context_.storage.cuts() + 2 * begin;
    LF_RETURN_IF_ERROR(Score(k));
    if (several_ranks_) LF_RETURN_IF_ERROR(ExchangeOverlaps());
    LF_RETURN_IF_ERROR(Join());
    LF_RETURN_IF_ERROR(FindThresholds());
    LF_RETURN_IF_ERROR(Mark());
    LF_RETURN_IF_ERROR(BuildIndex());
    return CountPairs();
  }

 private:
  template <typename T>
  T* Piece(int64_t offset) const {
    return PieceAt<T>(context_.scratch, offset);
  }
  Workspace workspace() const { return {Piece<char>(at_.workspace), at_.workspace_bytes}; }
  HeadsView<const void> DenseQueries(int64_t offset) const {
    const int64_t width = selector_.geometry_.head_dim;
    return {Piece<void>(offset), scope_.num_queries * width, width};
  }

  // The queries lie in one dealt block or in two neighbours, so those of one rank are consecutive.
  absl::Status GatherQueries(HeadsView<const void> q) {
    const int64_t row_bytes = selector_.geometry_.head_dim * DTypeBytes(kernels_.compute_dtype());
    const int64_t num_heads = selector_.geometry_.num_q_heads;
    std::vector<int32_t> all(num_heads);
    std::iota(all.begin(), all.end(), 0);
    LF_RETURN_IF_ERROR(PackHeads(kernels_, q, all, SelectingRows(plan_, scope_, world_.rank()),
                                 selector_.geometry_.head_dim, Piece<char>(at_.query_staging), stream_)
                           .status());
    std::vector<int64_t> counts_bytes(world_.size());
    for (int r = 0; r < world_.size(); ++r) {
      const TokenRange rows = SelectingRows(plan_, scope_, r);
      counts_bytes[r] = num_heads * (rows.end - rows.begin) * row_bytes;
    }
    LF_RETURN_IF_ERROR(world_.AllGather(Piece<void>(at_.query_staging), Piece<void>(at_.gathered_queries),
                                        counts_bytes, stream_));
    const char* from = Piece<char>(at_.gathered_queries);
    for (int r = 0; r < world_.size(); ++r) {
      if (counts_bytes[r] == 0) continue;
      const int64_t first_row = SelectingRows(plan_, scope_, r).begin;
      const int64_t place = plan_.TokenPositions(r).Position(first_row) - scope_.first_query;
      const int64_t head_bytes = counts_bytes[r] / num_heads;
      LF_RETURN_IF_ERROR(kernels_.Copy2D({.to = Piece<char>(at_.queries) + place * row_bytes,
                                          .to_pitch = scope_.num_queries * row_bytes,
                                          .from = from,
                                          .from_pitch = head_bytes,
                                          .row_bytes = head_bytes,
                                          .rows = num_heads},
                                         stream_));
      from += counts_bytes[r];
    }
    return absl::OkStatus();
  }

  // Of one part of the keys: its rows of `k`.
  LastQueryParams PartParams(int part, HeadsView<const void> k) const {
    const TokenRange rows = selector_.PartRows(part, world_.rank());
    LastQueryParams params;
    params.q = queries_[part];
    params.num_queries = scope_.num_queries;
    params.first_query_position = scope_.first_query;
    params.k = k;
    params.k.data = Advance(k.data, rows.begin * k.row_stride, kernels_.compute_dtype());
    params.num_keys = rows.end - rows.begin;
    params.key_positions = positions_.From(rows.begin);
    params.heads = heads_;
    params.num_q_heads = selector_.geometry_.num_q_heads;
    params.num_kv_heads = selector_.geometry_.num_kv_heads;
    params.head_dim = selector_.geometry_.head_dim;
    params.scale = selector_.geometry_.scale;
    return params;
  }
  Workspace PartWorkspace(int part) const {
    return {Piece<char>(at_.workspace + at_.score_workspace[part]), at_.score_workspace_bytes[part]};
  }

  absl::Status Score(HeadsView<const void> k) {
    float* const row_max = Piece<float>(at_.row_max);
    uint64_t* const row_sum = Piece<uint64_t>(at_.row_sum);
    const int64_t rows = count_ * kMaxSelectingQueries;
    const int parts = selector_.NumParts();
    for (int part = 0; part < parts; ++part) {
      const LastQueryParams params = PartParams(part, k);
      LF_RETURN_IF_ERROR(params.num_keys > 0 ? kernels_.LastQueryRowMax(params, row_max + part * rows,
                                                                        PartWorkspace(part), stream_)
                                             : WithoutKeys(row_max + part * rows, rows));
    }
    LF_RETURN_IF_ERROR(JoinParts(row_max, rows, [](float a, float b) { return std::max(a, b); }));
    if (several_ranks_) {
      LF_RETURN_IF_ERROR(world_.AllReduce(row_max, rows, ReduceType::kFloat32, ReduceOp::kMax, stream_));
    }
    for (int part = 0; part < parts; ++part) {
      const LastQueryParams params = PartParams(part, k);
      uint64_t* const sum = row_sum + part * rows;
      LF_RETURN_IF_ERROR(params.num_keys > 0
                             ? kernels_.LastQueryRowSum(params, row_max, sum, PartWorkspace(part), stream_)
                             : kernels_.Zero(sum, rows * kWord, stream_));
    }
    LF_RETURN_IF_ERROR(JoinParts(row_sum, rows, [](uint64_t a, uint64_t b) { return a + b; }));
    if (several_ranks_) {
      LF_RETURN_IF_ERROR(world_.AllReduce(row_sum, rows, ReduceType::kUInt64, ReduceOp::kSum, stream_));
    }
    for (int part = 0; part < parts; ++part) LF_RETURN_IF_ERROR(ScorePart(part, k));
    return absl::OkStatus();
  }

  // values [parts, rows] to [rows], on the host, which waits for the stream: some thousand numbers.
  template <typename T, typename Join>
  absl::Status JoinParts(T* values, int64_t rows, const Join& join) {
    const int64_t parts = selector_.NumParts();
    if (parts < 2) return absl::OkStatus();
    std::vector<T> all(parts * rows);
    LF_RETURN_IF_ERROR(stream_.Sync());  // with its deadline, which a copy to pageable memory has not
    LF_RETURN_IF_ERROR(
        kernels_.CopyOut(all.data(), values, static_cast<int64_t>(all.size() * sizeof(T)), stream_));
    LF_RETURN_IF_ERROR(stream_.Sync());
    for (int64_t i = rows; i < parts * rows; ++i) all[i % rows] = join(all[i % rows], all[i]);
    return kernels_.CopyIn(values, all.data(), rows * static_cast<int64_t>(sizeof(T)), stream_);
  }

  // Vertical scores and windows of a part's keys, to their places among those of all keys of this rank.
  absl::Status ScorePart(int part, HeadsView<const void> k) {
    const LastQueryParams params = PartParams(part, k);
    if (params.num_keys == 0) return absl::OkStatus();
    const int64_t first_row = selector_.PartRows(part, world_.rank()).begin;
    float* const slash = Piece<float>(at_.slash);
    float* const part_slash = scope_.split ? Piece<float>(at_.part_slash) : slash;
    const LastQueryScores scores{Piece<float>(at_.scores) + first_row, 2 * ScoreStride(local_tokens_),
                                 part_slash};
    LF_RETURN_IF_ERROR(kernels_.LastQueryScore(params, Piece<float>(at_.row_max),
                                               Piece<uint64_t>(at_.row_sum), scores, PartWorkspace(part),
                                               stream_));
    if (!scope_.split) return absl::OkStatus();
    constexpr int64_t kBytes = kDiagonalWindow * kFloat;
    const int64_t part_bytes = BlocksOf(params.num_keys) * kBytes;
    return kernels_.Copy2D({.to = slash + first_row / kSelectionBlock * kDiagonalWindow,
                            .to_pitch = local_blocks_ * kBytes,
                            .from = part_slash,
                            .from_pitch = part_bytes,
                            .row_bytes = part_bytes,
                            .rows = count_},
                           stream_);
  }

  // The maxima of a rank that has none of the keys.
  absl::Status WithoutKeys(float* row_max, int64_t rows) {
    const std::vector<float> lowest(rows, -std::numeric_limits<float>::infinity());
    return kernels_.CopyIn(row_max, lowest.data(), rows * kFloat, stream_);
  }

  // Dealt blocks of a rank whose successors in the prompt lie with one rank: every step-th from `first` on.
  struct Successors {
    int64_t first = 0;
    int64_t step = 1;
    int64_t count = 0;
    int rank = 0;               // of the successors
    int64_t first_of_rank = 0;  // dealt block; the others are step apart too
  };
  // Of all dealt blocks of a rank but the prompt's last one. On the way there a successor is with another
  // group than on the way back, where the rank has blocks of both.
  std::vector<Successors> SuccessorsOf(int rank) const {
    const Mesh& mesh = plan_.mesh();
    const int64_t step = mesh.sequence > 1 && mesh.head % 2 == 1 ? 2 : 1;
    const int64_t deal = plan_.deal_block();
    const PositionMap positions = plan_.TokenPositions(rank);
    const int64_t num_blocks = plan_.DealtBlocks(plan_.NumTokens(rank)) -
                               (plan_.RankOfToken(plan_.num_tokens() - 1) == rank ? 1 : 0);
    std::vector<Successors> all;
    for (int64_t first = 0; first < std::min(step, num_blocks); ++first) {
      const int64_t next = positions.Position(first * deal) + deal;
      const int owner = plan_.RankOfToken(next);
      all.push_back({.first = first,
                     .step = step,
                     .count = (num_blocks - first + step - 1) / step,
                     .rank = owner,
                     .first_of_rank = plan_.TokenPositions(owner).RowsBelow(next) / deal});
    }
    return all;
  }

  // The last 63 entries of each window are distances of the next key block. Those of the last window of a
  // dealt block go to the owner of the next one.
  absl::Status ExchangeOverlaps() {
    constexpr int64_t kBytes = kDiagonalOverlap * kFloat;
    const int rank = world_.rank();
    const int64_t windows_of_dealt = plan_.deal_block() / kSelectionBlock;
    std::vector<int64_t> send_bytes(world_.size());
    std::vector<int64_t> recv_bytes(world_.size());
    std::vector<Successors> mine = SuccessorsOf(rank);
    std::stable_sort(mine.begin(), mine.end(),
                     [](const Successors& a, const Successors& b) { return a.rank < b.rank; });
    char* sent = Piece<char>(at_.overlaps_sent);
    for (const Successors& blocks : mine) {
      for (int64_t i = 0; i < count_; ++i, sent += blocks.count * kBytes) {
        LF_RETURN_IF_ERROR(
            kernels_.Copy2D({.to = sent,
                             .to_pitch = kBytes,
                             .from = OverlapsOf(i, (blocks.first + 1) * windows_of_dealt - 1),
                             .from_pitch = blocks.step * windows_of_dealt * kDiagonalWindow * kFloat,
                             .row_bytes = kBytes,
                             .rows = blocks.count},
                            stream_));
      }
      send_bytes[blocks.rank] += count_ * blocks.count * kBytes;
    }
    std::vector<Successors> received;
    for (int r = 0; r < world_.size(); ++r) {
      for (const Successors& blocks : SuccessorsOf(r)) {
        if (blocks.rank != rank) continue;
        recv_bytes[r] += count_ * blocks.count * kBytes;
        received.push_back(blocks);
      }
    }
    LF_RETURN_IF_ERROR(world_.AllToAll(Piece<void>(at_.overlaps_sent), send_bytes,
                                       Piece<void>(at_.overlaps_received), recv_bytes, stream_));
    char* const overlaps = Piece<char>(at_.overlaps);
    // Within a dealt block from the window before; the first of each is written over.
    if (windows_of_dealt > 1 && count_ * local_blocks_ > 1) {
      LF_RETURN_IF_ERROR(kernels_.Copy2D({.to = overlaps + kBytes,
                                          .to_pitch = kBytes,
                                          .from = OverlapsOf(0, 0),
                                          .from_pitch = kDiagonalWindow * kFloat,
                                          .row_bytes = kBytes,
                                          .rows = count_ * local_blocks_ - 1},
                                         stream_));
    }
    const char* from = Piece<char>(at_.overlaps_received);
    for (const Successors& blocks : received) {
      for (int64_t i = 0; i < count_; ++i, from += blocks.count * kBytes) {
        LF_RETURN_IF_ERROR(kernels_.Copy2D(
            {.to = overlaps + (i * local_blocks_ + blocks.first_of_rank * windows_of_dealt) * kBytes,
             .to_pitch = blocks.step * windows_of_dealt * kBytes,
             .from = from,
             .from_pitch = kBytes,
             .row_bytes = kBytes,
             .rows = blocks.count},
            stream_));
      }
    }
    // The prompt's first block has none before it.
    for (int64_t i = 0; i < count_ && plan_.RankOfToken(0) == rank; ++i) {
      LF_RETURN_IF_ERROR(kernels_.Zero(overlaps + i * local_blocks_ * kBytes, kBytes, stream_));
    }
    return absl::OkStatus();
  }
  // Of a window of a head of the batch, those entries that are distances of the next key block.
  const float* OverlapsOf(int64_t head, int64_t window) const {
    return Piece<float>(at_.slash) + (head * local_blocks_ + window) * kDiagonalWindow + kSelectionBlock;
  }

  absl::Status Join() {
    if (local_tokens_ == 0) return absl::OkStatus();
    JoinScoresParams params;
    params.slash = Piece<float>(at_.slash);
    params.overlaps = several_ranks_ ? Piece<float>(at_.overlaps) : nullptr;
    params.num_heads = count_;
    params.num_keys = local_tokens_;
    params.key_positions = positions_;
    params.last_query = scope_.last_query();
    params.forced_keys = kForcedKeys;
    params.forced_distances = kForcedDistances;
    params.scores = Piece<float>(at_.scores);
    params.score_stride = ScoreStride(local_tokens_);
    return kernels_.JoinScores(params, stream_);
  }

  SelectionLists Lists() const {
    return {.scores = Piece<float>(at_.scores),
            .list_stride = ScoreStride(local_tokens_),
            .num_entries = local_tokens_,
            .num_lists = 2 * count_,
            .positions = positions_,
            .last_query = scope_.last_query()};
  }

  absl::Status FindThresholds() {
    std::vector<int64_t> budgets;
    for (int64_t i = 0; i < count_; ++i) {
      const VerticalSlashBudget& budget = selector_.budgets_[begin_ + static_cast<size_t>(i)];
      budgets.insert(budgets.end(), {budget.columns, budget.distances});
    }
    LF_RETURN_IF_ERROR(kernels_.SelectionStart(budgets, cuts_, stream_));
    const int64_t bins = 2 * count_ * kSelectionBins;
    uint64_t* const histogram = Piece<uint64_t>(at_.histogram);
    for (int pass = 0; pass < kSelectionPasses; ++pass) {
      LF_RETURN_IF_ERROR(local_tokens_ > 0
                             ? kernels_.SelectionHistogram(Lists(), pass, cuts_, histogram, stream_)
                             : kernels_.Zero(histogram, bins * kWord, stream_));
      if (several_ranks_) {
        LF_RETURN_IF_ERROR(world_.AllReduce(histogram, bins, ReduceType::kUInt64, ReduceOp::kSum, stream_));
      }
      LF_RETURN_IF_ERROR(kernels_.SelectionAdvance(2 * count_, pass, histogram, cuts_, stream_));
      LF_ASSIGN_OR_RETURN(const bool settled, KnownSettled());
      if (settled) break;
    }
    return absl::OkStatus();
  }

  // Asks only where waiting for the stream costs little: on the CPU, or where exchanges wait anyway. Cuts are
  // equal on all ranks.
  absl::StatusOr<bool> KnownSettled() {
    if (!several_ranks_ && stream_.device() != DeviceKind::kCpu) return false;
    LF_RETURN_IF_ERROR(context_.report.Fetch(context_.backend, context_.storage));
    for (size_t list = 2 * begin_; list < 2 * (begin_ + static_cast<size_t>(count_)); ++list) {
      if (context_.report.cut(list).settled == 0) return false;
    }
    return true;
  }

  // The selected entries of all ranks, as bits.
  absl::Status Mark() {
    const int64_t words = selector_.WordsPerList();
    uint64_t* const bits = Piece<uint64_t>(at_.bits);
    LF_RETURN_IF_ERROR(kernels_.Zero(bits, 2 * count_ * words * kWord, stream_));
    if (local_tokens_ > 0) {
      LF_RETURN_IF_ERROR(kernels_.SelectionMark(Lists(), cuts_, bits, words, stream_));
    }
    if (!several_ranks_) return absl::OkStatus();
    // No entry belongs to two ranks, so the sum is the union.
    return world_.AllReduce(bits, 2 * count_ * words, ReduceType::kUInt64, ReduceOp::kSum, stream_);
  }

  absl::Status BuildIndex() {
    std::vector<IndexBuffers> out;
    for (const int32_t head : heads_) out.push_back(context_.storage.buffers(head));
    BuildIndexParams params;
    params.bits = Piece<uint64_t>(at_.bits);
    params.words_per_list = selector_.WordsPerList();
    params.coverage = context_.coverage;
    params.out = out;
    return kernels_.BuildIndex(params, workspace(), stream_);
  }

  // Of this rank's share of the heads: counting costs more than the rest on a CPU. Of one of several chunks
  // also those of the rows before it, in the place of published pairs, which the chunk's are without.
  absl::Status CountPairs() {
    const auto share = [&](int rank) { return static_cast<size_t>(count_ * rank / world_.size()); };
    for (size_t i = share(world_.rank()); i < share(world_.rank() + 1);) {
      std::vector<IndexView> views;  // of neighbouring heads, whose counts are neighbours too
      const int32_t first = heads_[i];
      for (; i < share(world_.rank() + 1) && heads_[i] == first + static_cast<int32_t>(views.size()); ++i) {
        views.push_back(context_.storage.views()[heads_[i]]);
      }
      LF_RETURN_IF_ERROR(kernels_.CountPairs(
          {.indices = views, .num_tokens = scope_.num_keys(), .counts = context_.storage.covered() + first},
          workspace(), stream_));
      if (scope_.first_row == 0) continue;
      LF_RETURN_IF_ERROR(kernels_.CountPairs({.indices = views,
                                              .num_tokens = scope_.num_keys(),
                                              .counts = context_.storage.published() + first,
                                              .num_rows = scope_.first_row},
                                             workspace(), stream_));
    }
    return absl::OkStatus();
  }

  const VerticalSlashSelector& selector_;
  const SelectionContext& context_;
  KernelSet& kernels_;
  Stream& stream_;
  Communicator& world_;
  const ShardPlan& plan_;
  const SelectionScope& scope_;
  const bool several_ranks_;
  const PositionMap positions_;
  const int64_t local_tokens_;
  const int64_t local_blocks_;  // of 128
  const VerticalSlashSelector::Scratch at_;
  std::array<HeadsView<const void>, std::size(kChunkParts)> queries_;  // for each part of the keys
  size_t begin_ = 0;
  int64_t count_ = 0;
  std::span<const int32_t> heads_;
  SelectionCut* cuts_ = nullptr;
};

absl::Status VerticalSlashSelector::Select(const SelectionContext& context, HeadsView<const void> q,
                                           HeadsView<const void> k) const {
  if (heads_.empty()) return absl::OkStatus();
  Batch batch(*this, context);
  LF_RETURN_IF_ERROR(batch.TakeQueries(q));
  for (size_t begin = 0; begin < heads_.size(); begin += static_cast<size_t>(heads_at_once_)) {
    LF_RETURN_IF_ERROR(
        batch.Run(begin, std::min(heads_.size() - begin, static_cast<size_t>(heads_at_once_)), k));
  }
  return absl::OkStatus();
}

absl::Status VerticalSlashSelector::Check(const IndexReport& report) const {
  for (size_t i = 0; i < heads_.size(); ++i) {
    const IndexCounts& counts = report.counts(heads_[i]);
    const auto check = [&](const char* list, const SelectionCut& cut, int64_t length,
                           int64_t budget) -> absl::Status {
      if (cut.settled != 0 && counts.overflow == 0 && length == budget) return absl::OkStatus();
      return absl::InternalError(absl::StrCat(
          "sparse index: head ", heads_[i], " has ", length, " of ", budget, " ", list,
          cut.settled == 0 ? absl::StrCat("; ", cut.missing, " are missing among its scores") : "",
          counts.overflow != 0 ? "; its lists did not fit" : ""));
    };
    LF_RETURN_IF_ERROR(check("columns", report.cut(2 * i), counts.columns, budgets_[i].columns));
    LF_RETURN_IF_ERROR(check("distances", report.cut(2 * i + 1), counts.distances, budgets_[i].distances));
  }
  return absl::OkStatus();
}

}  // namespace longfill
