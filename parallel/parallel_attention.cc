#include "parallel/parallel_attention.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "parallel/attention_layout.h"
#include "parallel/communicator_internal.h"
#include "parallel/head_placement.h"
#include "parallel/packing.h"
#include "parallel/piece_layout.h"

namespace longfill {
namespace {

// How soon a stop is seen. On the CPU about a second of one core; on a GPU 200 ms, if its kernels reach
// 200 TFLOP/s on what the index covers.
constexpr double kCpuLaunchFlops = 5e10;
constexpr double kDeviceLaunchFlops = 0.2 * 200e12;

int64_t BlocksOf(int64_t tokens) { return (tokens + kTokenBlock - 1) / kTokenBlock; }

// The heads that one rank computes in one round.
struct RoundHeads {
  std::vector<int32_t> q;   // ascending, so that those of one KV head are neighbours
  std::vector<int32_t> kv;  // ascending, unique
};

std::vector<RoundHeads> MakeRounds(std::span<const int32_t> heads, int64_t q_per_kv,
                                   int64_t kv_heads_at_once) {
  std::vector<RoundHeads> rounds;
  for (const int32_t head : heads) {
    const int32_t kv = static_cast<int32_t>(head / q_per_kv);
    const bool known = !rounds.empty() && rounds.back().kv.back() == kv;
    if (!known && (rounds.empty() || static_cast<int64_t>(rounds.back().kv.size()) == kv_heads_at_once)) {
      rounds.emplace_back();
    }
    if (!known) rounds.back().kv.push_back(kv);
    rounds.back().q.push_back(head);
  }
  return rounds;
}

}  // namespace

// One call of ParallelAttention::Run on one rank.
class ParallelAttention::AttentionRun {
 public:
  AttentionRun(ParallelAttention& owner, const ShardPlan& plan, const ParallelAttentionParams& params)
      : owner_(owner),
        kernels_(owner.backend_.kernels()),
        stream_(owner.backend_.stream()),
        head_group_(*owner.head_group_),
        sequence_group_(*owner.sequence_group_),
        geometry_(owner.geometry_),
        plan_(plan),
        rank_(owner.world_.rank()),
        params_(params),
        layout_(kernels_, geometry_, plan),
        width_(geometry_.head_dim),
        element_(DTypeBytes(kernels_.compute_dtype())),
        local_rows_(plan.NumTokens(rank_)),
        group_rows_(plan.GroupNumTokens(plan.SequenceIndex(rank_))) {}

  absl::Status Allocate() {
    LF_ASSIGN_OR_RETURN(memory_,
                        owner_.backend_.memory().Allocate(layout_.total_bytes, "attention of the ranks"));
    return absl::OkStatus();
  }

  absl::StatusOr<ParallelAttentionStats> Execute() {
    owner_.attention_timer_.Reset();
    owner_.communication_timer_.Reset();
    auto& counts = owner_.counts_;
    LF_RETURN_IF_ERROR(kernels_.Zero(Piece<void>(layout_.counts), sizeof(counts), stream_));
    LF_RETURN_IF_ERROR(ZeroTails());
    PlaceRounds();
    for (size_t round = 0; round < num_rounds_; ++round) LF_RETURN_IF_ERROR(ExecuteRound(round));
    LF_RETURN_IF_ERROR(stream_.Sync());  // with its deadline, which a copy to pageable memory has not
    LF_RETURN_IF_ERROR(kernels_.CopyOut(counts.data(), Piece<void>(layout_.counts), sizeof(counts), stream_));
    LF_RETURN_IF_ERROR(stream_.Sync());
    if (stopped_) return absl::CancelledError("attention was stopped");
    ParallelAttentionStats stats{.covered_pairs = counts[0], .computed_pairs = counts[1]};
    LF_ASSIGN_OR_RETURN(stats.attention_seconds, owner_.attention_timer_.Seconds());
    LF_ASSIGN_OR_RETURN(stats.communication_seconds, owner_.communication_timer_.Seconds());
    return stats;
  }

 private:
  using HeadLists = std::vector<std::span<const int32_t>>;  // of each member of the head group

  // Rows of a prompt in whole blocks: those that no exchange writes stay 0.
  absl::Status ZeroTails() {
    if (!layout_.head_exchange && !layout_.sequence_exchange) return absl::OkStatus();
    const int64_t tail = layout_.padded_tokens - plan_.num_tokens();
    for (int64_t head = 0; head < layout_.kv_heads && tail > 0; ++head) {
      const int64_t at = RowBytes(head * layout_.padded_tokens + plan_.num_tokens());
      for (const int64_t buffer : {layout_.all_k, layout_.all_v}) {
        LF_RETURN_IF_ERROR(kernels_.Zero(Piece<char>(buffer) + at, RowBytes(tail), stream_));
      }
    }
    return absl::OkStatus();
  }

  void PlaceRounds() {
    std::vector<int64_t> cost;
    std::vector<int32_t> kv_head;
    for (int64_t h = 0; h < geometry_.num_q_heads; ++h) {
      cost.push_back(params_.pairs[h].covered);
      kv_head.push_back(static_cast<int32_t>(h / geometry_.q_per_kv()));
    }
    const HeadPlacement placement = PlaceHeads(cost, kv_head, plan_.mesh().head);
    for (const std::vector<int32_t>& heads : placement.heads) {
      rounds_.push_back(MakeRounds(heads, geometry_.q_per_kv(), layout_.kv_heads));
      num_rounds_ = std::max(num_rounds_, rounds_.back().size());
    }
    for (std::vector<RoundHeads>& rounds : rounds_) rounds.resize(num_rounds_);
  }

  absl::Status ExecuteRound(size_t round) {
    const RoundHeads& mine = rounds_[plan_.HeadIndex(rank_)][round];
    HeadsView<const void> q = FromHead(params_.q, mine.q);
    HeadsView<const void> k = FromHead(params_.k, mine.kv);
    HeadsView<const void> v = FromHead(params_.v, mine.kv);
    if (layout_.head_exchange || layout_.sequence_exchange) {
      LF_RETURN_IF_ERROR(owner_.communication_timer_.Begin(stream_));
      if (layout_.head_exchange) LF_RETURN_IF_ERROR(ExchangeHeads(round, &q, &k, &v));
      if (layout_.sequence_exchange && !mine.kv.empty()) {  // members of a sequence group have equal heads
        const auto num_heads = static_cast<int64_t>(mine.kv.size());
        LF_RETURN_IF_ERROR(GatherSequence(num_heads, Dense(layout_.all_k, layout_.padded_tokens), &k));
        LF_RETURN_IF_ERROR(GatherSequence(num_heads, Dense(layout_.all_v, layout_.padded_tokens), &v));
      }
      LF_RETURN_IF_ERROR(owner_.communication_timer_.End(stream_));
    }
    HeadsView<void> out{Piece<void>(layout_.out), width_, static_cast<int64_t>(mine.q.size()) * width_};
    if (!layout_.head_exchange) {
      out = {Advance(params_.out, mine.q.front() * width_, kernels_.compute_dtype()), width_,
             geometry_.num_q_heads * width_};
    }
    LF_RETURN_IF_ERROR(owner_.attention_timer_.Begin(stream_));
    LF_RETURN_IF_ERROR(Compute(mine, q, k, v, out));
    LF_RETURN_IF_ERROR(owner_.attention_timer_.End(stream_));
    if (!layout_.head_exchange) return absl::OkStatus();
    LF_RETURN_IF_ERROR(owner_.communication_timer_.Begin(stream_));
    LF_RETURN_IF_ERROR(HeadsToTokens(round));
    return owner_.communication_timer_.End(stream_);
  }

  // The round's heads of all tokens of the head group, in place of all heads of this rank's.
  absl::Status ExchangeHeads(size_t round, HeadsView<const void>* q, HeadsView<const void>* k,
                             HeadsView<const void>* v) {
    HeadLists q_lists, kv_lists;
    for (const std::vector<RoundHeads>& rounds : rounds_) {
      q_lists.push_back(rounds[round].q);
      kv_lists.push_back(rounds[round].kv);
    }
    const HeadsView<void> q_to = Dense(layout_.q, group_rows_);
    const HeadsView<void> k_to = layout_.sequence_exchange ? Dense(layout_.group_k, group_rows_)
                                                           : Dense(layout_.all_k, layout_.padded_tokens);
    const HeadsView<void> v_to = layout_.sequence_exchange ? Dense(layout_.group_v, group_rows_)
                                                           : Dense(layout_.all_v, layout_.padded_tokens);
    LF_RETURN_IF_ERROR(TokensToHeads(params_.q, q_lists, q_to));
    LF_RETURN_IF_ERROR(TokensToHeads(params_.k, kv_lists, k_to));
    LF_RETURN_IF_ERROR(TokensToHeads(params_.v, kv_lists, v_to));
    *q = q_to;
    *k = k_to;
    *v = v_to;
    return absl::OkStatus();
  }

  // Attention of the round's heads in launches of bounded length: all heads at once where one block of rows
  // of them is short enough, so that the device is full, else those of one KV head at a time.
  absl::Status Compute(const RoundHeads& mine, HeadsView<const void> q, HeadsView<const void> k,
                       HeadsView<const void> v, HeadsView<void> out) {
    if (RowFlops(mine.q) * static_cast<double>(kTokenBlock) <= LaunchFlops()) {
      return ComputeHeads(mine, q, k, v, out);
    }
    size_t q_begin = 0;
    for (size_t j = 0; j < mine.kv.size(); ++j) {
      RoundHeads part{.kv = {mine.kv[j]}};
      for (size_t i = q_begin; i < mine.q.size() && mine.q[i] / geometry_.q_per_kv() == mine.kv[j]; ++i) {
        part.q.push_back(mine.q[i]);
      }
      LF_RETURN_IF_ERROR(
          ComputeHeads(part, AtHead(q, q_begin), AtHead(k, j), AtHead(v, j), AtHead(out, q_begin)));
      q_begin += part.q.size();
    }
    return absl::OkStatus();
  }

  absl::Status ComputeHeads(const RoundHeads& heads, HeadsView<const void> q, HeadsView<const void> k,
                            HeadsView<const void> v, HeadsView<void> out) {
    std::vector<IndexView> indices;
    std::vector<int32_t> kv_head;
    for (const int32_t head : heads.q) {
      indices.push_back(params_.indices[head]);
      const auto kv = std::find(heads.kv.begin(), heads.kv.end(), head / geometry_.q_per_kv());
      kv_head.push_back(static_cast<int32_t>(kv - heads.kv.begin()));
    }
    AttentionParams launch;
    launch.q = q;
    launch.k = k;
    launch.v = v;
    launch.out = out;
    launch.num_q_heads = static_cast<int64_t>(heads.q.size());
    launch.num_kv_heads = static_cast<int64_t>(heads.kv.size());
    launch.kv_head = kv_head;
    launch.head_dim = width_;
    launch.scale = geometry_.scale;
    const double blocks = LaunchFlops() / (RowFlops(heads.q) * static_cast<double>(kTokenBlock) + 1);
    const int64_t step =
        kTokenBlock * static_cast<int64_t>(std::clamp(blocks, 1.0, static_cast<double>(1 << 20)));
    for (int64_t row = 0; row < group_rows_ && !heads.q.empty(); row += step) {
      LF_RETURN_IF_ERROR(Launch(launch, row, std::min(row + step, group_rows_), indices));
    }
    return absl::OkStatus();
  }

  double LaunchFlops() const {
    return stream_.device() == DeviceKind::kCpu ? kCpuLaunchFlops : kDeviceLaunchFlops;
  }

  // Of one row of some heads; the last rows of a dense prompt have twice the mean.
  double RowFlops(std::span<const int32_t> heads) const {
    double pairs = 0;
    for (const int32_t head : heads) pairs += static_cast<double>(params_.pairs[head].covered);
    return 4.0 * static_cast<double>(width_) * 2.0 * pairs / static_cast<double>(plan_.num_tokens());
  }

  // Rows [begin, end) of the head group; begin is a multiple of the token block. Waits until at most one
  // launch is on its way.
  absl::Status Launch(AttentionParams launch, int64_t begin, int64_t end,
                      std::span<const IndexView> indices) {
    Event& ended = *owner_.launch_ended_[num_launches_ % owner_.launch_ended_.size()];
    if (num_launches_ >= owner_.launch_ended_.size()) LF_RETURN_IF_ERROR(ended.Wait());
    if (!stopped_ && params_.should_stop && params_.should_stop()) stopped_ = true;
    if (stopped_) return absl::OkStatus();
    PositionMap positions = plan_.GroupPositions(plan_.SequenceIndex(rank_));
    positions.first = positions.Position(begin);
    AttentionSequence sequence;
    sequence.q_begin = begin;
    sequence.q_end = end;
    sequence.k_end = plan_.num_tokens();
    sequence.q_positions = positions;
    sequence.num_tokens = plan_.num_tokens();
    sequence.key_range_end = plan_.num_tokens();
    sequence.indices = indices;
    launch.sequences = {&sequence, 1};
    launch.covered_pairs = Piece<int64_t>(layout_.counts);
    launch.computed_pairs = launch.covered_pairs + 1;
    const Workspace workspace{Piece<void>(layout_.workspace), layout_.workspace_bytes};
    LF_RETURN_IF_ERROR(kernels_.Attention(launch, workspace, stream_));
    ++num_launches_;
    return ended.Record(stream_);
  }

  // All-to-all of the head group: from[all heads][own tokens] to to[own heads of the lists][rows of the
  // group].
  absl::Status TokensToHeads(HeadsView<const void> from, const HeadLists& lists, HeadsView<void> to) {
    const int members = head_group_.size();
    const auto my_heads = static_cast<int64_t>(lists[head_group_.rank()].size());
    std::vector<int64_t> send_bytes(members), recv_bytes(members);
    for (int64_t block = 0; block < BlocksOf(MemberRows(0)); block += layout_.head_slice) {
      char* send = Piece<char>(layout_.send);
      const TokenRange rows = Slice(local_rows_, block, layout_.head_slice);
      for (int m = 0; m < members; ++m) {
        LF_ASSIGN_OR_RETURN(send, PackHeads(kernels_, from, lists[m], rows, width_, send, stream_));
        send_bytes[m] = static_cast<int64_t>(lists[m].size()) * RowBytes(rows);
        recv_bytes[m] = my_heads * RowBytes(Slice(MemberRows(m), block, layout_.head_slice));
      }
      LF_RETURN_IF_ERROR(head_group_.AllToAll(Piece<void>(layout_.send), send_bytes,
                                              Piece<void>(layout_.recv), recv_bytes, stream_));
      const char* received = Piece<char>(layout_.recv);
      for (int m = 0; m < members; ++m) {
        const TokenRange theirs = Slice(MemberRows(m), block, layout_.head_slice);
        LF_ASSIGN_OR_RETURN(received, Interleave(received, my_heads, theirs, members, m, to));
      }
    }
    return absl::OkStatus();
  }

  // And back: the round's output rows of every member's tokens to that member, which puts each head in its
  // columns.
  absl::Status HeadsToTokens(size_t round) {
    const int members = head_group_.size();
    const int64_t my_row = RowBytes(static_cast<int64_t>(rounds_[head_group_.rank()][round].q.size()));
    const int64_t block_bytes = kTokenBlock * my_row;
    std::vector<int64_t> send_bytes(members), recv_bytes(members);
    for (int64_t block = 0; block < BlocksOf(MemberRows(0)); block += layout_.head_slice) {
      const TokenRange rows = Slice(local_rows_, block, layout_.head_slice);
      char* send = Piece<char>(layout_.send);
      for (int m = 0; m < members; ++m) {
        const TokenRange theirs = Slice(MemberRows(m), block, layout_.head_slice);
        send_bytes[m] = (theirs.end - theirs.begin) * my_row;
        recv_bytes[m] = static_cast<int64_t>(rounds_[m][round].q.size()) * RowBytes(rows);
        const char* from = Piece<char>(layout_.out) + (block * members + m) * block_bytes;
        LF_RETURN_IF_ERROR(CopyBlocks(kernels_, send, block_bytes, from, members * block_bytes, block_bytes,
                                      send_bytes[m], stream_));
        send += send_bytes[m];
      }
      LF_RETURN_IF_ERROR(head_group_.AllToAll(Piece<void>(layout_.send), send_bytes,
                                              Piece<void>(layout_.recv), recv_bytes, stream_));
      const char* received = Piece<char>(layout_.recv);
      for (int m = 0; m < members; ++m) {
        LF_RETURN_IF_ERROR(PlaceColumns(received, rounds_[m][round].q, rows));
        received += recv_bytes[m];
      }
    }
    return absl::OkStatus();
  }

  // [rows][heads][head_dim] to the columns of these heads in the output; neighbouring heads go together.
  absl::Status PlaceColumns(const char* from, std::span<const int32_t> heads, const TokenRange& rows) {
    const int64_t out_row = RowBytes(geometry_.num_q_heads);
    size_t next = 0;
    while (next < heads.size() && rows.begin < rows.end) {
      size_t end = next + 1;
      while (end < heads.size() && heads[end] == heads[end - 1] + 1) ++end;
      LF_RETURN_IF_ERROR(kernels_.Copy2D(
          {.to = static_cast<char*>(params_.out) + rows.begin * out_row + RowBytes(heads[next]),
           .to_pitch = out_row,
           .from = from + RowBytes(static_cast<int64_t>(next)),
           .from_pitch = RowBytes(static_cast<int64_t>(heads.size())),
           .row_bytes = RowBytes(static_cast<int64_t>(end - next)),
           .rows = rows.end - rows.begin},
          stream_));
      next = end;
    }
    return absl::OkStatus();
  }

  // All-gather of the sequence group: *view, [num_heads][rows of the group], to [num_heads][tokens of the
  // prompt] at `to`, which *view becomes.
  absl::Status GatherSequence(int64_t num_heads, HeadsView<void> to, HeadsView<const void>* view) {
    const int members = sequence_group_.size();
    std::vector<int32_t> heads(num_heads);
    for (int64_t head = 0; head < num_heads; ++head) heads[head] = static_cast<int32_t>(head);
    std::vector<int64_t> counts_bytes(members);
    for (int64_t block = 0; block < BlocksOf(plan_.GroupNumTokens(0)); block += layout_.key_slice) {
      const TokenRange rows = Slice(group_rows_, block, layout_.key_slice);
      LF_RETURN_IF_ERROR(
          PackHeads(kernels_, *view, heads, rows, width_, Piece<char>(layout_.send), stream_).status());
      for (int m = 0; m < members; ++m) {
        counts_bytes[m] = num_heads * RowBytes(Slice(plan_.GroupNumTokens(m), block, layout_.key_slice));
      }
      LF_RETURN_IF_ERROR(sequence_group_.AllGather(Piece<void>(layout_.send), Piece<void>(layout_.recv),
                                                   counts_bytes, stream_));
      const char* received = Piece<char>(layout_.recv);
      for (int m = 0; m < members; ++m) {
        const TokenRange theirs = Slice(plan_.GroupNumTokens(m), block, layout_.key_slice);
        LF_ASSIGN_OR_RETURN(received, Interleave(received, num_heads, theirs, members, m, to));
      }
    }
    *view = to;
    return absl::OkStatus();
  }

  // [num_heads][rows] of one member, whose block b is block b * members + member of the destination;
  // rows.begin is a multiple of the token block. Returns the byte behind what was read.
  absl::StatusOr<const char*> Interleave(const char* from, int64_t num_heads, const TokenRange& rows,
                                         int members, int member, HeadsView<void> to) {
    const int64_t bytes = RowBytes(rows);
    const int64_t block_bytes = RowBytes(kTokenBlock);
    const int64_t to_row = (rows.begin / kTokenBlock * members + member) * kTokenBlock;
    for (int64_t head = 0; head < num_heads && bytes > 0; ++head, from += bytes) {
      void* place = Advance(to.data, head * to.head_stride + to_row * width_, kernels_.compute_dtype());
      LF_RETURN_IF_ERROR(
          CopyBlocks(kernels_, place, members * block_bytes, from, block_bytes, block_bytes, bytes, stream_));
    }
    return from;
  }

  // Rows of the blocks [block, block + count) of a buffer with so many rows.
  static TokenRange Slice(int64_t rows, int64_t block, int64_t count) {
    return {std::min(rows, block * kTokenBlock), std::min(rows, (block + count) * kTokenBlock)};
  }

  // Bytes of so many rows of head_dim.
  int64_t RowBytes(int64_t rows) const { return rows * width_ * element_; }
  int64_t RowBytes(const TokenRange& rows) const { return RowBytes(rows.end - rows.begin); }

  int64_t MemberRows(int member) const {
    return plan_.NumTokens(plan_.SequenceIndex(rank_) * plan_.mesh().head + member);
  }

  template <typename T>
  T* Piece(int64_t offset) const {
    return PieceAt<T>(memory_.data(), offset);
  }

  // The view from one of its heads on.
  template <typename T>
  HeadsView<T> AtHead(HeadsView<T> view, size_t head) const {
    view.data = Advance(view.data, static_cast<int64_t>(head) * view.head_stride, kernels_.compute_dtype());
    return view;
  }
  HeadsView<const void> FromHead(HeadsView<const void> view, const std::vector<int32_t>& heads) const {
    return heads.empty() ? view : AtHead(view, static_cast<size_t>(heads.front()));
  }
  HeadsView<void> Dense(int64_t offset, int64_t rows) const {
    return {Piece<void>(offset), rows * width_, width_};
  }

  ParallelAttention& owner_;
  KernelSet& kernels_;
  Stream& stream_;
  Communicator& head_group_;
  Communicator& sequence_group_;
  const AttentionGeometry& geometry_;
  const ShardPlan& plan_;
  const int rank_;
  const ParallelAttentionParams& params_;
  const AttentionLayout layout_;
  const int64_t width_;    // head_dim
  const int64_t element_;  // bytes
  const int64_t local_rows_;
  const int64_t group_rows_;
  Buffer memory_;
  std::vector<std::vector<RoundHeads>> rounds_;  // [member of the head group][round]
  size_t num_rounds_ = 0;
  size_t num_launches_ = 0;
  bool stopped_ = false;
};

namespace {

absl::Status CheckParams(const ShardPlan& plan, const ParallelAttentionParams& params, const Mesh& mesh,
                         const AttentionGeometry& geometry, int rank) {
  if (!(plan.mesh() == mesh)) {
    return absl::InvalidArgumentError(
        absl::StrCat("attention: plan for mesh ", ToString(plan.mesh()), ", groups for ", ToString(mesh)));
  }
  const size_t heads = static_cast<size_t>(geometry.num_q_heads);
  if (params.indices.size() != heads || params.pairs.size() != heads) {
    return absl::InvalidArgumentError(absl::StrCat("attention: ", params.indices.size(), " indices and ",
                                                   params.pairs.size(), " pair counts for ", heads,
                                                   " query heads"));
  }
  const bool missing = params.q.data == nullptr || params.k.data == nullptr || params.v.data == nullptr ||
                       params.out == nullptr;
  if (missing && plan.NumTokens(rank) > 0)
    return absl::InvalidArgumentError("attention: q, k, v or out is missing");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<ParallelAttention>> ParallelAttention::Create(
    Backend& backend, Communicator& world, const Mesh& mesh, const AttentionGeometry& geometry) {
  LF_RETURN_IF_ERROR(Validate(geometry));
  if (mesh.sequence < 1 || mesh.head < 1 || mesh.size() != world.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("mesh ", ToString(mesh), " needs ", mesh.size(), " ranks, there are ", world.size()));
  }
  std::unique_ptr<ParallelAttention> attention(new ParallelAttention(backend, world, mesh, geometry));
  const ShardPlan plan(mesh, 0);
  const int s = plan.SequenceIndex(world.rank());
  const int h = plan.HeadIndex(world.rank());
  LF_ASSIGN_OR_RETURN(attention->head_group_, world.Split(s, h));
  LF_ASSIGN_OR_RETURN(attention->sequence_group_, world.Split(h, s));
  for (std::unique_ptr<Event>& event : attention->launch_ended_) {
    LF_ASSIGN_OR_RETURN(event, backend.NewEvent());
  }
  return attention;
}

int64_t ParallelAttention::PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry,
                                     const ShardPlan& plan) {
  return AttentionLayout(kernels, geometry, plan).total_bytes;
}

absl::StatusOr<ParallelAttentionStats> ParallelAttention::Run(const ShardPlan& plan,
                                                              const ParallelAttentionParams& params) {
  absl::Status ready = CheckParams(plan, params, mesh_, geometry_, world_.rank());
  AttentionRun run(*this, plan, params);
  if (ready.ok()) ready = run.Allocate();
  CpuStream host;
  LF_RETURN_IF_ERROR(AgreeOnStatus(world_, ready, host));
  if (plan.num_tokens() == 0) return ParallelAttentionStats{};
  absl::StatusOr<ParallelAttentionStats> stats = run.Execute();
  if (!stats.ok() && !absl::IsCancelled(stats.status())) internal::AbortGroup(world_, stats.status());
  return stats;
}

}  // namespace longfill
