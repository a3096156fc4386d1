#include "parallel/parallel_attention.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "parallel/communicator_internal.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kRoundBytes = int64_t{256} << 20;   // of the KV heads that are computed together
constexpr int64_t kStagingBytes = int64_t{32} << 20;  // of one exchange, in each direction
constexpr double kLaunchFlops = 5e10;                 // about a second on one core: how soon a stop is seen

int64_t BlocksOf(int64_t tokens) { return (tokens + kTokenBlock - 1) / kTokenBlock; }

// Sizes that follow from the plan alone, for the rank that needs most, so that all ranks take the same
// slices.
struct Layout {
  Layout(const KernelSet& kernels, const AttentionGeometry& geometry, const ShardPlan& plan) {
    const Mesh mesh = plan.mesh();
    head_exchange = mesh.head > 1;
    sequence_exchange = mesh.sequence > 1;
    padded_tokens = BlocksOf(plan.num_tokens()) * kTokenBlock;
    group_rows = plan.GroupNumTokens(0);
    const int64_t row_bytes = geometry.head_dim * kFloat;
    const int64_t rows_per_kv = (head_exchange || sequence_exchange ? 2 * padded_tokens : 0) +
                                (head_exchange && sequence_exchange ? 2 * group_rows : 0) +
                                (head_exchange ? 2 * geometry.q_per_kv() * group_rows : 0);
    kv_heads = std::clamp<int64_t>(kRoundBytes / std::max<int64_t>(1, rows_per_kv * row_bytes), 1,
                                   geometry.num_kv_heads);
    q_heads = kv_heads * geometry.q_per_kv();

    const int64_t block_bytes = kTokenBlock * row_bytes;
    const int64_t head_bytes =
        q_heads * mesh.head * block_bytes;  // sent, or received, for one block of each member
    const int64_t key_bytes = kv_heads * mesh.sequence * block_bytes;
    const int64_t member_blocks = BlocksOf(plan.NumTokens(0));
    const int64_t group_blocks = BlocksOf(group_rows);
    head_slice = std::clamp<int64_t>(kStagingBytes / head_bytes, 1, std::max<int64_t>(1, member_blocks));
    key_slice = std::clamp<int64_t>(kStagingBytes / key_bytes, 1, std::max<int64_t>(1, group_blocks));
    staging_bytes =
        std::max(head_exchange ? head_slice * head_bytes : 0, sequence_exchange ? key_slice * key_bytes : 0);
    q_bytes = head_exchange ? q_heads * group_rows * row_bytes : 0;
    group_kv_bytes = head_exchange && sequence_exchange ? kv_heads * group_rows * row_bytes : 0;
    all_kv_bytes = head_exchange || sequence_exchange ? kv_heads * padded_tokens * row_bytes : 0;
    workspace_bytes = kernels.AttentionWorkspaceBytes(geometry.head_dim);
  }

  int64_t TotalBytes() const {
    return 2 * q_bytes + 2 * group_kv_bytes + 2 * all_kv_bytes + 2 * staging_bytes + workspace_bytes;
  }

  bool head_exchange = false;
  bool sequence_exchange = false;
  int64_t padded_tokens = 0;  // of the prompt, whole blocks
  int64_t group_rows = 0;     // of head group 0, the largest
  int64_t kv_heads = 0;       // of one round on one rank, at most
  int64_t q_heads = 0;
  int64_t head_slice = 0;  // token blocks of each member in one exchange
  int64_t key_slice = 0;
  int64_t staging_bytes = 0;
  int64_t q_bytes = 0;  // also of the output
  int64_t group_kv_bytes = 0;
  int64_t all_kv_bytes = 0;
  int64_t workspace_bytes = 0;
};

struct Buffers {
  Buffer q, out, group_k, group_v, all_k, all_v, send, recv, workspace;

  absl::Status Allocate(const Layout& layout, MemoryResource& memory) {
    LF_ASSIGN_OR_RETURN(q, memory.Allocate(layout.q_bytes, "queries of the head group"));
    LF_ASSIGN_OR_RETURN(out, memory.Allocate(layout.q_bytes, "attention output of the head group"));
    LF_ASSIGN_OR_RETURN(group_k, memory.Allocate(layout.group_kv_bytes, "keys of the head group"));
    LF_ASSIGN_OR_RETURN(group_v, memory.Allocate(layout.group_kv_bytes, "values of the head group"));
    LF_ASSIGN_OR_RETURN(all_k, memory.Allocate(layout.all_kv_bytes, "keys of the prompt"));
    LF_ASSIGN_OR_RETURN(all_v, memory.Allocate(layout.all_kv_bytes, "values of the prompt"));
    LF_ASSIGN_OR_RETURN(send, memory.Allocate(layout.staging_bytes, "attention exchange, sent"));
    LF_ASSIGN_OR_RETURN(recv, memory.Allocate(layout.staging_bytes, "attention exchange, received"));
    LF_ASSIGN_OR_RETURN(workspace, memory.Allocate(layout.workspace_bytes, "attention workspace"));
    return absl::OkStatus();
  }
};

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

class Timer {
 public:
  explicit Timer(double* seconds) : seconds_(seconds), start_(Clock::now()) {}
  ~Timer() { *seconds_ += std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  double* seconds_;
  const Clock::time_point start_;
};

// One call of ParallelAttention::Run on one rank.
class AttentionRun {
 public:
  AttentionRun(KernelSet& kernels, Communicator& head_group, Communicator& sequence_group,
               const AttentionGeometry& geometry, const ShardPlan& plan, int rank,
               const ParallelAttentionParams& params, Stream& stream)
      : kernels_(kernels),
        head_group_(head_group),
        sequence_group_(sequence_group),
        geometry_(geometry),
        plan_(plan),
        rank_(rank),
        params_(params),
        stream_(stream),
        layout_(kernels, geometry, plan),
        width_(geometry.head_dim),
        local_rows_(plan.NumTokens(rank)),
        group_rows_(plan.GroupNumTokens(plan.SequenceIndex(rank))) {}

  absl::Status Allocate() { return buffers_.Allocate(layout_, kernels_.memory()); }

  absl::StatusOr<ParallelAttentionStats> Execute() {
    ZeroTails();
    PlaceRounds();
    for (size_t round = 0; round < num_rounds_; ++round) LF_RETURN_IF_ERROR(ExecuteRound(round));
    if (stopped_) return absl::CancelledError("attention was stopped");
    return stats_;
  }

 private:
  using HeadLists = std::vector<std::span<const int32_t>>;  // of each member of the head group

  // Rows of a prompt in whole blocks: those that no exchange writes stay 0.
  void ZeroTails() {
    if (layout_.all_kv_bytes == 0) return;
    const int64_t tail = (layout_.padded_tokens - plan_.num_tokens()) * width_;
    for (int64_t head = 0; head < layout_.kv_heads; ++head) {
      const int64_t at = (head * layout_.padded_tokens + plan_.num_tokens()) * width_;
      std::fill_n(buffers_.all_k.as<float>() + at, tail, 0.0f);
      std::fill_n(buffers_.all_v.as<float>() + at, tail, 0.0f);
    }
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
    HeadsView<const float> q = FromHead(params_.q, mine.q);
    HeadsView<const float> k = FromHead(params_.k, mine.kv);
    HeadsView<const float> v = FromHead(params_.v, mine.kv);
    if (layout_.head_exchange) {
      const Timer timer(&stats_.communication_seconds);
      HeadLists q_lists, kv_lists;
      for (const std::vector<RoundHeads>& rounds : rounds_) {
        q_lists.push_back(rounds[round].q);
        kv_lists.push_back(rounds[round].kv);
      }
      const HeadsView<float> q_to = Dense(buffers_.q, group_rows_);
      const HeadsView<float> k_to = layout_.sequence_exchange ? Dense(buffers_.group_k, group_rows_)
                                                              : Dense(buffers_.all_k, layout_.padded_tokens);
      const HeadsView<float> v_to = layout_.sequence_exchange ? Dense(buffers_.group_v, group_rows_)
                                                              : Dense(buffers_.all_v, layout_.padded_tokens);
      LF_RETURN_IF_ERROR(TokensToHeads(params_.q, q_lists, q_to));
      LF_RETURN_IF_ERROR(TokensToHeads(params_.k, kv_lists, k_to));
      LF_RETURN_IF_ERROR(TokensToHeads(params_.v, kv_lists, v_to));
      q = Const(q_to);
      k = Const(k_to);
      v = Const(v_to);
    }
    if (layout_.sequence_exchange && !mine.kv.empty()) {  // the members of a sequence group have equal heads
      const Timer timer(&stats_.communication_seconds);
      const HeadsView<float> k_to = Dense(buffers_.all_k, layout_.padded_tokens);
      const HeadsView<float> v_to = Dense(buffers_.all_v, layout_.padded_tokens);
      LF_RETURN_IF_ERROR(GatherSequence(k, static_cast<int64_t>(mine.kv.size()), k_to));
      LF_RETURN_IF_ERROR(GatherSequence(v, static_cast<int64_t>(mine.kv.size()), v_to));
      k = Const(k_to);
      v = Const(v_to);
    }
    if (!layout_.head_exchange) {
      return Compute(mine, q, k, v,
                     {params_.out + mine.q.front() * width_, width_, geometry_.num_q_heads * width_});
    }
    const int64_t out_stride = static_cast<int64_t>(mine.q.size()) * width_;
    LF_RETURN_IF_ERROR(Compute(mine, q, k, v, {buffers_.out.as<float>(), width_, out_stride}));
    const Timer timer(&stats_.communication_seconds);
    return HeadsToTokens(round);
  }

  // Attention of the round's heads in launches of bounded length.
  absl::Status Compute(const RoundHeads& mine, HeadsView<const float> q, HeadsView<const float> k,
                       HeadsView<const float> v, HeadsView<float> out) {
    size_t q_begin = 0;
    for (size_t j = 0; j < mine.kv.size(); ++j) {
      size_t q_end = q_begin;
      std::vector<const SparseIndex*> indices;
      double flops_per_row = 0;
      for (; q_end < mine.q.size() && mine.q[q_end] / geometry_.q_per_kv() == mine.kv[j]; ++q_end) {
        indices.push_back(&params_.indices[mine.q[q_end]]);
        const double pairs = static_cast<double>(params_.pairs[mine.q[q_end]].covered);
        flops_per_row +=
            4.0 * static_cast<double>(width_) * 2.0 * pairs / static_cast<double>(plan_.num_tokens());
      }
      const double launch_blocks = kLaunchFlops / (flops_per_row * static_cast<double>(kTokenBlock) + 1);
      const int64_t step =
          kTokenBlock * static_cast<int64_t>(std::clamp(launch_blocks, 1.0, static_cast<double>(1 << 20)));
      AttentionParams launch;
      const int64_t q_at = static_cast<int64_t>(q_begin);
      const int64_t kv_at = static_cast<int64_t>(j);
      launch.q = {q.data + q_at * q.head_stride, q.head_stride, q.row_stride};
      launch.k = {k.data + kv_at * k.head_stride, k.head_stride, k.row_stride};
      launch.v = {v.data + kv_at * v.head_stride, v.head_stride, v.row_stride};
      launch.out = {out.data + q_at * out.head_stride, out.head_stride, out.row_stride};
      launch.num_q_heads = static_cast<int64_t>(indices.size());
      launch.num_kv_heads = 1;
      launch.head_dim = width_;
      launch.scale = geometry_.scale;
      for (int64_t row = 0; row < group_rows_; row += step) {
        LF_RETURN_IF_ERROR(Launch(launch, row, std::min(row + step, group_rows_), indices));
      }
      q_begin = q_end;
    }
    return absl::OkStatus();
  }

  // Rows [begin, end) of the head group; begin is a multiple of the token block.
  absl::Status Launch(AttentionParams launch, int64_t begin, int64_t end,
                      std::span<const SparseIndex* const> indices) {
    if (!stopped_ && params_.should_stop && params_.should_stop()) stopped_ = true;
    if (stopped_) return absl::OkStatus();
    const Timer timer(&stats_.attention_seconds);
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
    int64_t covered = 0;
    int64_t computed = 0;
    launch.sequences = {&sequence, 1};
    launch.covered_pairs = &covered;
    launch.computed_pairs = &computed;
    const Workspace workspace{buffers_.workspace.data(), buffers_.workspace.size_bytes()};
    LF_RETURN_IF_ERROR(kernels_.Attention(launch, workspace, stream_));
    LF_RETURN_IF_ERROR(stream_.Sync());
    stats_.covered_pairs += covered;
    stats_.computed_pairs += computed;
    return absl::OkStatus();
  }

  // All-to-all of the head group: from[all heads][own tokens] to to[own heads of the lists][rows of the
  // group].
  absl::Status TokensToHeads(HeadsView<const float> from, const HeadLists& lists, HeadsView<float> to) {
    const int members = head_group_.size();
    const std::span<const int32_t> mine = lists[head_group_.rank()];
    std::vector<int64_t> send_bytes(members), recv_bytes(members);
    for (int64_t block = 0; block < BlocksOf(MemberRows(0)); block += layout_.head_slice) {
      float* send = buffers_.send.as<float>();
      const TokenRange rows = Slice(local_rows_, block, layout_.head_slice);
      for (int m = 0; m < members; ++m) {
        for (const int32_t head : lists[m]) send = CopyRows(from, head, rows, send);
        send_bytes[m] = static_cast<int64_t>(lists[m].size()) * RowBytes(rows);
        recv_bytes[m] =
            static_cast<int64_t>(mine.size()) * RowBytes(Slice(MemberRows(m), block, layout_.head_slice));
      }
      LF_RETURN_IF_ERROR(
          head_group_.AllToAll(buffers_.send.data(), send_bytes, buffers_.recv.data(), recv_bytes, stream_));
      LF_RETURN_IF_ERROR(stream_.Sync());
      const float* received = buffers_.recv.as<float>();
      for (int m = 0; m < members; ++m) {
        const TokenRange theirs = Slice(MemberRows(m), block, layout_.head_slice);
        received = Interleave(received, static_cast<int64_t>(mine.size()), theirs, members, m, to);
      }
    }
    return absl::OkStatus();
  }

  // And back: the round's output rows of every member's tokens to that member, which puts each head in its
  // columns.
  absl::Status HeadsToTokens(size_t round) {
    const int members = head_group_.size();
    const int me = head_group_.rank();
    const int64_t my_width = static_cast<int64_t>(rounds_[me][round].q.size()) * width_;
    std::vector<int64_t> send_bytes(members), recv_bytes(members);
    for (int64_t block = 0; block < BlocksOf(MemberRows(0)); block += layout_.head_slice) {
      const TokenRange rows = Slice(local_rows_, block, layout_.head_slice);
      float* send = buffers_.send.as<float>();
      for (int m = 0; m < members; ++m) {
        const TokenRange theirs = Slice(MemberRows(m), block, layout_.head_slice);
        for (int64_t row = theirs.begin; row < theirs.end; row += kTokenBlock) {
          const int64_t count = std::min(kTokenBlock, theirs.end - row) * my_width;
          std::memcpy(send,
                      buffers_.out.as<float>() + (row / kTokenBlock * members + m) * kTokenBlock * my_width,
                      static_cast<size_t>(count * kFloat));
          send += count;
        }
        send_bytes[m] = (theirs.end - theirs.begin) * my_width * kFloat;
        recv_bytes[m] = static_cast<int64_t>(rounds_[m][round].q.size()) * RowBytes(rows);
      }
      LF_RETURN_IF_ERROR(
          head_group_.AllToAll(buffers_.send.data(), send_bytes, buffers_.recv.data(), recv_bytes, stream_));
      LF_RETURN_IF_ERROR(stream_.Sync());
      const float* received = buffers_.recv.as<float>();
      for (int m = 0; m < members; ++m) {
        for (int64_t row = rows.begin; row < rows.end; ++row) {
          for (const int32_t head : rounds_[m][round].q) {
            std::memcpy(params_.out + (row * geometry_.num_q_heads + head) * width_, received,
                        static_cast<size_t>(width_ * kFloat));
            received += width_;
          }
        }
      }
    }
    return absl::OkStatus();
  }

  // All-gather of the sequence group: from[num_heads][rows of the group] to to[num_heads][tokens of the
  // prompt].
  absl::Status GatherSequence(HeadsView<const float> from, int64_t num_heads, HeadsView<float> to) {
    const int members = sequence_group_.size();
    std::vector<int64_t> counts_bytes(members);
    for (int64_t block = 0; block < BlocksOf(plan_.GroupNumTokens(0)); block += layout_.key_slice) {
      float* send = buffers_.send.as<float>();
      const TokenRange rows = Slice(group_rows_, block, layout_.key_slice);
      for (int64_t head = 0; head < num_heads; ++head) send = CopyRows(from, head, rows, send);
      for (int m = 0; m < members; ++m) {
        counts_bytes[m] = num_heads * RowBytes(Slice(plan_.GroupNumTokens(m), block, layout_.key_slice));
      }
      LF_RETURN_IF_ERROR(
          sequence_group_.AllGather(buffers_.send.data(), buffers_.recv.data(), counts_bytes, stream_));
      LF_RETURN_IF_ERROR(stream_.Sync());
      const float* received = buffers_.recv.as<float>();
      for (int m = 0; m < members; ++m) {
        const TokenRange theirs = Slice(plan_.GroupNumTokens(m), block, layout_.key_slice);
        received = Interleave(received, num_heads, theirs, members, m, to);
      }
    }
    return absl::OkStatus();
  }

  // Rows of the blocks [block, block + count) of a buffer with so many rows.
  static TokenRange Slice(int64_t rows, int64_t block, int64_t count) {
    return {std::min(rows, block * kTokenBlock), std::min(rows, (block + count) * kTokenBlock)};
  }

  int64_t RowBytes(const TokenRange& rows) const { return (rows.end - rows.begin) * width_ * kFloat; }

  int64_t MemberRows(int member) const {
    return plan_.NumTokens(plan_.SequenceIndex(rank_) * plan_.mesh().head + member);
  }

  float* CopyRows(HeadsView<const float> from, int64_t head, const TokenRange& rows, float* to) const {
    if (rows.begin == rows.end) return to;  // a rank without tokens may have no buffer to copy from
    const float* base = from.data + head * from.head_stride;
    if (from.row_stride == width_) {
      std::memcpy(to, base + rows.begin * width_, static_cast<size_t>(RowBytes(rows)));
      return to + (rows.end - rows.begin) * width_;
    }
    for (int64_t row = rows.begin; row < rows.end; ++row, to += width_) {
      std::memcpy(to, base + row * from.row_stride, static_cast<size_t>(width_ * kFloat));
    }
    return to;
  }

  // [num_heads][rows] of one member, whose block b is block b * members + member of the destination.
  const float* Interleave(const float* from, int64_t num_heads, const TokenRange& rows, int members,
                          int member, HeadsView<float> to) const {
    for (int64_t head = 0; head < num_heads; ++head) {
      for (int64_t row = rows.begin; row < rows.end; row += kTokenBlock) {
        const int64_t count = std::min(kTokenBlock, rows.end - row) * width_;
        const int64_t to_row = (row / kTokenBlock * members + member) * kTokenBlock;
        std::memcpy(to.data + head * to.head_stride + to_row * width_, from,
                    static_cast<size_t>(count * kFloat));
        from += count;
      }
    }
    return from;
  }

  // The view from its head heads[0] on.
  static HeadsView<const float> FromHead(HeadsView<const float> view, const std::vector<int32_t>& heads) {
    if (!heads.empty()) view.data += heads.front() * view.head_stride;
    return view;
  }
  HeadsView<float> Dense(const Buffer& buffer, int64_t rows) const {
    return {buffer.as<float>(), rows * width_, width_};
  }
  static HeadsView<const float> Const(HeadsView<float> view) {
    return {view.data, view.head_stride, view.row_stride};
  }

  KernelSet& kernels_;
  Communicator& head_group_;
  Communicator& sequence_group_;
  const AttentionGeometry& geometry_;
  const ShardPlan& plan_;
  const int rank_;
  const ParallelAttentionParams& params_;
  Stream& stream_;
  const Layout layout_;
  const int64_t width_;
  const int64_t local_rows_;
  const int64_t group_rows_;
  Buffers buffers_;
  std::vector<std::vector<RoundHeads>> rounds_;  // [member of the head group][round]
  size_t num_rounds_ = 0;
  bool stopped_ = false;
  ParallelAttentionStats stats_;
};

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
    KernelSet& kernels, Communicator& world, const Mesh& mesh, const AttentionGeometry& geometry) {
  LF_RETURN_IF_ERROR(Validate(geometry));
  if (mesh.sequence < 1 || mesh.head < 1 || mesh.size() != world.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("mesh ", ToString(mesh), " needs ", mesh.size(), " ranks, there are ", world.size()));
  }
  if (kernels.device() != DeviceKind::kCpu) {
    return absl::UnimplementedError(
        absl::StrCat("attention: exchanges are packed on the host, not for ",
                     absl::string_view(kernels.name().data(), kernels.name().size())));
  }
  std::unique_ptr<ParallelAttention> attention(new ParallelAttention(kernels, world, mesh, geometry));
  const ShardPlan plan(mesh, 0);
  const int s = plan.SequenceIndex(world.rank());
  const int h = plan.HeadIndex(world.rank());
  LF_ASSIGN_OR_RETURN(attention->head_group_, world.Split(s, h));
  LF_ASSIGN_OR_RETURN(attention->sequence_group_, world.Split(h, s));
  return attention;
}

int64_t ParallelAttention::PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry,
                                     const ShardPlan& plan) {
  return Layout(kernels, geometry, plan).TotalBytes();
}

absl::StatusOr<ParallelAttentionStats> ParallelAttention::Run(const ShardPlan& plan,
                                                              const ParallelAttentionParams& params,
                                                              Stream& stream) {
  const int rank = world_.rank();
  absl::Status ready = CheckParams(plan, params, mesh_, geometry_, rank);
  AttentionRun run(kernels_, *head_group_, *sequence_group_, geometry_, plan, rank, params, stream);
  if (ready.ok()) ready = run.Allocate();
  LF_RETURN_IF_ERROR(AgreeOnStatus(world_, ready, stream));
  if (plan.num_tokens() == 0) return ParallelAttentionStats{};
  absl::StatusOr<ParallelAttentionStats> stats = run.Execute();
  if (!stats.ok() && !absl::IsCancelled(stats.status())) internal::AbortGroup(world_, stats.status());
  return stats;
}

}  // namespace longfill
