#include "parallel/parallel_attention.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/piece_layout.h"
#include "parallel/attention_layout.h"
#include "parallel/communicator_internal.h"
#include "parallel/head_placement.h"
#include "parallel/packing.h"

namespace longfill {
namespace {

// How soon a stop is seen. On the CPU about a second of one core; on a GPU 200 ms, if its kernels reach
// 200 TFLOP/s on what the index covers.
constexpr double kCpuLaunchFlops = 5e10;
constexpr double kDeviceLaunchFlops = 0.2 * 200e12;

// The heads that one rank computes in one round.
struct RoundHeads {
  std::vector<int32_t> q;   // ascending, so that those of one KV head are neighbours
  std::vector<int32_t> kv;  // ascending, unique
};

struct RoundLimits {
  int64_t first_kv_heads = 1;             // of the first round, which nothing computes beside
  std::array<int64_t, 2> kv_heads{1, 1};  // of even rounds and of odd ones
  bool neighbours = false;  // heads of a round must follow one another: they are used where they lie
};

std::vector<RoundHeads> MakeRounds(std::span<const int32_t> heads, int64_t q_per_kv,
                                   const RoundLimits& limits) {
  std::vector<RoundHeads> rounds;
  for (const int32_t head : heads) {
    const int32_t kv = static_cast<int32_t>(head / q_per_kv);
    if (rounds.empty() || (limits.neighbours && head != rounds.back().q.back() + 1)) rounds.emplace_back();
    const auto known = [&] { return !rounds.back().kv.empty() && rounds.back().kv.back() == kv; };
    const int64_t most =
        rounds.size() == 1 ? limits.first_kv_heads : limits.kv_heads[(rounds.size() - 1) % 2];
    if (!known() && static_cast<int64_t>(rounds.back().kv.size()) == most) rounds.emplace_back();
    if (!known()) rounds.back().kv.push_back(kv);
    rounds.back().q.push_back(head);
  }
  return rounds;
}

// The rank that has on `host` the place of `rank` on its own.
int AtPlaceOf(int rank, int host, const PeerHosts& hosts) {
  return hosts.RanksOf(host)[static_cast<size_t>(hosts.LocalOf(rank))];
}

std::vector<int32_t> HeadsOf(const ParallelAttentionParams& params, int64_t num_q_heads) {
  if (!params.heads.empty()) return {params.heads.begin(), params.heads.end()};
  std::vector<int32_t> all(static_cast<size_t>(num_q_heads));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

}  // namespace

// One call of ParallelAttention::Run on one rank.
class ParallelAttention::AttentionRun {
 public:
  AttentionRun(ParallelAttention& owner, const ShardPlan& plan, const ParallelAttentionParams& params)
      : owner_(owner),
        kernels_(owner.backend_.kernels()),
        stream_(owner.backend_.stream()),
        exchange_(*owner.exchange_stream_),
        copies_(*owner.copy_stream_),
        head_group_(*owner.head_group_),
        sequence_group_(*owner.sequence_group_),
        geometry_(owner.geometry_),
        plan_(plan),
        rank_(owner.world_.rank()),
        params_(params),
        layout_(kernels_, geometry_, plan,
                {.round_bytes = owner.options_.round_bytes,
                 .num_sampled = static_cast<int64_t>(params.sampled.size()),
                 .from_peers = params.peers != nullptr,
                 .relayed = owner.relay_group_ != nullptr}),
        width_(geometry_.head_dim),
        element_(DTypeBytes(kernels_.compute_dtype())),
        local_rows_(plan.NumTokens(rank_)),
        group_rows_(plan.GroupNumTokens(plan.SequenceIndex(rank_))) {
    const PositionMap rows = plan.GroupPositions(plan.SequenceIndex(rank_));
    for (size_t i = 0; i < params.sampled.size(); ++i) {
      const int64_t row = rows.RowsBelow(params.sampled[i]);
      if (row < group_rows_ && rows.Position(row) == params.sampled[i]) own_sampled_.push_back({i, row});
    }
  }

  bool started() const { return started_; }
  bool IsFor(const ShardPlan& plan, const ParallelAttentionParams& params) const {
    return plan == plan_ && params.k.data == params_.k.data && params.v.data == params_.v.data &&
           params.peers == params_.peers && params.heads.empty() &&
           params.sampled.size() == params_.sampled.size();
  }
  // With what Begin was not given.
  void SetParams(const ParallelAttentionParams& params) { params_ = params; }

  absl::Status Allocate() {
    LF_ASSIGN_OR_RETURN(memory_,
                        owner_.backend_.memory().Allocate(layout_.total_bytes, "attention of the ranks"));
    return absl::OkStatus();
  }

  // Enqueues the exchange of the first round, if there is one.
  absl::Status Start() {
    started_ = true;
    owner_.attention_timer_.Reset();
    owner_.communication_timer_.Reset();
    owner_.exposed_timer_.Reset();
    PlaceRounds();
    if (!exchanges()) return absl::OkStatus();
    LF_RETURN_IF_ERROR(owner_.inputs_ready_->Record(stream_));
    LF_RETURN_IF_ERROR(exchange_.WaitFor(*owner_.inputs_ready_));
    LF_RETURN_IF_ERROR(ZeroTails());
    if (num_rounds_ == 0) return absl::OkStatus();
    if (params_.peers != nullptr) {
      // Kernels exchange with other hosts and copy within a device, and find room beside the projections:
      // beside attention they would not.
      const size_t rounds = std::min(num_rounds_, turns());
      LF_RETURN_IF_ERROR(copies_.WaitFor(*owner_.inputs_ready_));
      for (size_t round = 0; round < rounds; ++round) LF_RETURN_IF_ERROR(CopyFrom(rank_, round));
      LF_RETURN_IF_ERROR(owner_.communication_timer_.Begin(exchange_));
      if (relayed()) {
        LF_RETURN_IF_ERROR(Relay());
        LF_RETURN_IF_ERROR(owner_.relayed_->Record(exchange_));
        LF_RETURN_IF_ERROR(copies_.WaitFor(*owner_.relayed_));
        for (size_t round = 0; round < rounds; ++round) LF_RETURN_IF_ERROR(CopyRelayed(round));
      }
      LF_RETURN_IF_ERROR(owner_.copied_->Record(copies_));
      LF_RETURN_IF_ERROR(WaitForPeers());  // their keys and values are there
      LF_RETURN_IF_ERROR(owner_.communication_timer_.End(exchange_));
    }
    return Receive(0);
  }

  // Memory goes back in the order of the main stream, also after an error.
  absl::Status WaitForExchanges() {
    if (!exchanges()) return absl::OkStatus();
    absl::Status left = LeavePeers();
    if (params_.peers != nullptr) {
      left.Update(owner_.copied_->Record(copies_));  // anew: an error may have come between a copy and this
      left.Update(exchange_.WaitFor(*owner_.copied_));
    }
    left.Update(owner_.exchanges_ended_->Record(exchange_));
    left.Update(WaitExposed(*owner_.exchanges_ended_));
    return left;
  }

  absl::StatusOr<ParallelAttentionStats> Execute() {
    auto& counts = owner_.counts_;
    absl::Status executed = started_ ? absl::OkStatus() : Start();
    if (executed.ok()) executed = ExecuteRounds();
    const absl::Status joined = WaitForExchanges();
    LF_RETURN_IF_ERROR(executed);
    LF_RETURN_IF_ERROR(joined);
    LF_RETURN_IF_ERROR(stream_.Sync());  // with its deadline, which a copy to pageable memory has not
    LF_RETURN_IF_ERROR(kernels_.CopyOut(counts.data(), Piece<void>(layout_.counts), sizeof(counts), stream_));
    std::vector<float>& sampled = owner_.sampled_lse_;
    sampled.resize(computed_heads_.size() * own_sampled_.size());
    if (!sampled.empty()) {
      const auto bytes = static_cast<int64_t>(sampled.size() * sizeof(float));
      LF_RETURN_IF_ERROR(kernels_.CopyOut(sampled.data(), Piece<void>(layout_.sampled_lse), bytes, stream_));
    }
    LF_RETURN_IF_ERROR(stream_.Sync());
    if (stopped_) return absl::CancelledError("attention was stopped");
    ParallelAttentionStats stats{
        .covered_pairs = counts[0], .computed_pairs = counts[1], .sampled_lse = SampledLse()};
    LF_ASSIGN_OR_RETURN(stats.attention_seconds, owner_.attention_timer_.Seconds());
    LF_ASSIGN_OR_RETURN(stats.communication_seconds, owner_.communication_timer_.Seconds());
    LF_ASSIGN_OR_RETURN(stats.exposed_seconds, owner_.exposed_timer_.Seconds());
    return stats;
  }

 private:
  using HeadLists = std::vector<std::span<const int32_t>>;  // of each member of the head group
  // What a round computes with.
  struct RoundInput {
    HeadsView<const void> q, k, v;
  };
  // Where its results go.
  struct RoundOutput {
    HeadsView<void> out;
    float* lse = nullptr;  // [heads, head group's rows], or nullptr
  };
  struct SampledRow {
    size_t place = 0;  // in ParallelAttentionParams::sampled
    int64_t row = 0;   // of the head group
  };

  bool exchanges() const { return layout_.head_exchange || layout_.sequence_exchange; }
  size_t turns() const { return layout_.one_place ? 1 : 2; }
  const AttentionLayout::Received& Received(size_t round) const { return layout_.received[round % 2]; }

  // The exchange of a round is enqueued before attention of the one before, and so runs beside it. All ranks
  // give their exchanges in the same order.
  absl::Status ExecuteRounds() {
    LF_RETURN_IF_ERROR(kernels_.Zero(Piece<void>(layout_.counts), sizeof(owner_.counts_), stream_));
    for (size_t round = 0; round < num_rounds_; ++round) {
      const bool another = exchanges() && round + 1 < num_rounds_;
      if (another && !layout_.one_place) LF_RETURN_IF_ERROR(Receive(round + 1));
      LF_RETURN_IF_ERROR(Attend(round));
      if (layout_.head_exchange) LF_RETURN_IF_ERROR(Return(round));
      if (another && layout_.one_place) LF_RETURN_IF_ERROR(Receive(round + 1));
    }
    return absl::OkStatus();
  }

  // Rows of a prompt in whole blocks: those that no exchange writes stay 0.
  absl::Status ZeroTails() {
    const int64_t tail = layout_.padded_tokens - plan_.num_tokens();
    for (const AttentionLayout::Received& place : layout_.received) {
      for (int64_t head = 0; head < place.kv_heads && tail > 0; ++head) {
        const int64_t at = RowBytes(head * layout_.padded_tokens + plan_.num_tokens());
        for (const int64_t buffer : {place.all_k, place.all_v}) {
          LF_RETURN_IF_ERROR(kernels_.Zero(Piece<char>(buffer) + at, RowBytes(tail), exchange_));
        }
      }
    }
    return absl::OkStatus();
  }

  void PlaceRounds() {
    const std::vector<int32_t> all = HeadsOf(params_, geometry_.num_q_heads);
    std::vector<int64_t> cost;
    std::vector<int32_t> kv_head;
    for (const int32_t head : all) {
      cost.push_back(layout_.head_exchange ? params_.pairs[head].covered : 1);
      kv_head.push_back(static_cast<int32_t>(head / geometry_.q_per_kv()));
    }
    const HeadPlacement placement = PlaceHeads(cost, kv_head, plan_.mesh().head);
    const RoundLimits limits{.first_kv_heads = layout_.first_kv_heads,
                             .kv_heads = {layout_.received[0].kv_heads, layout_.received[1].kv_heads},
                             .neighbours = !layout_.head_exchange};
    for (std::vector<int32_t> heads : placement.heads) {
      for (int32_t& head : heads) head = all[head];
      rounds_.push_back(MakeRounds(heads, geometry_.q_per_kv(), limits));
      num_rounds_ = std::max(num_rounds_, rounds_.back().size());
    }
    for (std::vector<RoundHeads>& rounds : rounds_) rounds.resize(num_rounds_);
  }

  // Enqueues what brings a round's heads here. Its place was last read by attention two rounds before, or by
  // that of the round before where there is one place.
  absl::Status Receive(size_t round) {
    const RoundHeads& mine = rounds_[plan_.HeadIndex(rank_)][round];
    if (round >= turns()) LF_RETURN_IF_ERROR(exchange_.WaitFor(*owner_.attended_[(round - turns()) % 2]));
    RoundInput& input = inputs_[round % 2];
    input = OwnInput(mine);
    LF_RETURN_IF_ERROR(owner_.communication_timer_.Begin(exchange_));
    if (layout_.head_exchange) LF_RETURN_IF_ERROR(ExchangeHeads(round, &input));
    if (params_.peers != nullptr && !mine.kv.empty()) {
      LF_RETURN_IF_ERROR(ReadPeers(mine.kv, Received(round), &input));
      if (round >= turns()) LF_RETURN_IF_ERROR(CopyLate(round));
      LF_RETURN_IF_ERROR(exchange_.WaitFor(*owner_.copied_));
    } else if (layout_.sequence_exchange &&
               !mine.kv.empty()) {  // members of a sequence group have equal heads
      const auto num_heads = static_cast<int64_t>(mine.kv.size());
      LF_RETURN_IF_ERROR(
          GatherSequence(num_heads, Dense(Received(round).all_k, layout_.padded_tokens), &input.k));
      LF_RETURN_IF_ERROR(
          GatherSequence(num_heads, Dense(Received(round).all_v, layout_.padded_tokens), &input.v));
    }
    LF_RETURN_IF_ERROR(owner_.communication_timer_.End(exchange_));
    return owner_.received_[round % 2]->Record(exchange_);
  }

  // This rank's own rows of a round's heads.
  RoundInput OwnInput(const RoundHeads& heads) const {
    return {FromHead(params_.q, heads.q), FromHead(params_.k, heads.kv), FromHead(params_.v, heads.kv)};
  }

  absl::Status Attend(size_t round) {
    const RoundHeads& mine = rounds_[plan_.HeadIndex(rank_)][round];
    RoundInput input = OwnInput(mine);
    if (exchanges()) {
      LF_RETURN_IF_ERROR(WaitExposed(*owner_.received_[round % 2]));
      const HeadsView<const void> own_q = input.q;
      input = inputs_[round % 2];
      if (!layout_.head_exchange) input.q = own_q;  // Begin had no queries
    }
    RoundOutput output;
    output.out = {Piece<void>(Received(round).out), width_, static_cast<int64_t>(mine.q.size()) * width_};
    if (!own_sampled_.empty()) output.lse = Piece<float>(layout_.lse);
    if (!layout_.head_exchange) {
      output.out = {Advance(params_.out, mine.q.front() * width_, kernels_.compute_dtype()), width_,
                    geometry_.num_q_heads * width_};
    }
    const bool receives = exchanges() && round + 1 < num_rounds_ && !layout_.one_place;
    const bool returns = layout_.head_exchange && round > 0;
    const ParallelAttentionOptions& options = owner_.options_;
    cta_limit_ = receives && params_.peers != nullptr ? options.ctas_beside_peers
                 : receives || returns                ? options.ctas_beside_exchange
                                                      : 0;
    LF_RETURN_IF_ERROR(owner_.attention_timer_.Begin(stream_));
    LF_RETURN_IF_ERROR(Compute(mine, input, output));
    LF_RETURN_IF_ERROR(owner_.attention_timer_.End(stream_));
    LF_RETURN_IF_ERROR(owner_.attended_[round % 2]->Record(stream_));
    return KeepSampled(mine);
  }

  // The round's lse of the sampled rows, before the next round writes over them.
  absl::Status KeepSampled(const RoundHeads& heads) {
    constexpr auto kFloat = static_cast<int64_t>(sizeof(float));
    const auto num_rows = static_cast<int64_t>(own_sampled_.size());
    float* to = Piece<float>(layout_.sampled_lse) + static_cast<int64_t>(computed_heads_.size()) * num_rows;
    for (const SampledRow& sampled : own_sampled_) {
      LF_RETURN_IF_ERROR(kernels_.Copy2D({.to = to++,
                                          .to_pitch = num_rows * kFloat,
                                          .from = Piece<float>(layout_.lse) + sampled.row,
                                          .from_pitch = group_rows_ * kFloat,
                                          .row_bytes = kFloat,
                                          .rows = static_cast<int64_t>(heads.q.size())},
                                         stream_));
    }
    computed_heads_.insert(computed_heads_.end(), heads.q.begin(), heads.q.end());
    return absl::OkStatus();
  }

  // ParallelAttentionStats::sampled_lse, once the device's part of it is here.
  std::vector<float> SampledLse() const {
    const size_t columns = params_.sampled.size();
    std::vector<float> lse(static_cast<size_t>(geometry_.num_q_heads) * columns,
                           -std::numeric_limits<float>::infinity());
    const float* from = owner_.sampled_lse_.data();
    for (const int32_t head : computed_heads_) {
      for (const SampledRow& sampled : own_sampled_) {
        lse[static_cast<size_t>(head) * columns + sampled.place] = *from++;
      }
    }
    return lse;
  }

  // Enqueues what takes a round's results back to their tokens.
  absl::Status Return(size_t round) {
    LF_RETURN_IF_ERROR(exchange_.WaitFor(*owner_.attended_[round % 2]));
    LF_RETURN_IF_ERROR(owner_.communication_timer_.Begin(exchange_));
    LF_RETURN_IF_ERROR(HeadsToTokens(round));
    return owner_.communication_timer_.End(exchange_);
  }

  // The main stream waits; what it has to wait is exposed.
  absl::Status WaitExposed(const Event& event) {
    LF_RETURN_IF_ERROR(owner_.exposed_timer_.Begin(stream_));
    LF_RETURN_IF_ERROR(stream_.WaitFor(event));
    return owner_.exposed_timer_.End(stream_);
  }

  // The round's heads of all tokens of the head group, in place of all heads of this rank's.
  absl::Status ExchangeHeads(size_t round, RoundInput* input) {
    HeadLists q_lists, kv_lists;
    for (const std::vector<RoundHeads>& rounds : rounds_) {
      q_lists.push_back(rounds[round].q);
      kv_lists.push_back(rounds[round].kv);
    }
    const AttentionLayout::Received& place = Received(round);
    const HeadsView<void> q_to = Dense(place.q, group_rows_);
    const HeadsView<void> k_to = layout_.sequence_exchange ? Dense(layout_.group_k, group_rows_)
                                                           : Dense(place.all_k, layout_.padded_tokens);
    const HeadsView<void> v_to = layout_.sequence_exchange ? Dense(layout_.group_v, group_rows_)
                                                           : Dense(place.all_v, layout_.padded_tokens);
    LF_RETURN_IF_ERROR(TokensToHeads(params_.q, q_lists, q_to));
    LF_RETURN_IF_ERROR(TokensToHeads(params_.k, kv_lists, k_to));
    LF_RETURN_IF_ERROR(TokensToHeads(params_.v, kv_lists, v_to));
    *input = {q_to, k_to, v_to};
    return absl::OkStatus();
  }

  // Attention of the round's heads in launches of bounded length: all heads at once where one block of rows
  // of them is short enough, so that the device is full, else those of one KV head at a time.
  absl::Status Compute(const RoundHeads& mine, const RoundInput& input, const RoundOutput& output) {
    if (RowFlops(mine.q) * static_cast<double>(kTokenBlock) <= LaunchFlops()) {
      return ComputeHeads(mine, input, output);
    }
    size_t q_begin = 0;
    for (size_t j = 0; j < mine.kv.size(); ++j) {
      RoundHeads part{.kv = {mine.kv[j]}};
      for (size_t i = q_begin; i < mine.q.size() && mine.q[i] / geometry_.q_per_kv() == mine.kv[j]; ++i) {
        part.q.push_back(mine.q[i]);
      }
      RoundOutput to = {AtHead(output.out, q_begin), output.lse};
      if (to.lse != nullptr) to.lse += static_cast<int64_t>(q_begin) * group_rows_;
      LF_RETURN_IF_ERROR(
          ComputeHeads(part, {AtHead(input.q, q_begin), AtHead(input.k, j), AtHead(input.v, j)}, to));
      q_begin += part.q.size();
    }
    return absl::OkStatus();
  }

  absl::Status ComputeHeads(const RoundHeads& heads, const RoundInput& input, const RoundOutput& output) {
    std::vector<int32_t> kv_head;
    for (const int32_t head : heads.q) {
      const auto kv = std::find(heads.kv.begin(), heads.kv.end(), head / geometry_.q_per_kv());
      kv_head.push_back(static_cast<int32_t>(kv - heads.kv.begin()));
    }
    AttentionParams launch;
    launch.q = input.q;
    launch.k = input.k;
    launch.v = input.v;
    launch.out = output.out;
    launch.lse = output.lse;
    launch.lse_head_stride = group_rows_;
    launch.num_q_heads = static_cast<int64_t>(heads.q.size());
    launch.num_kv_heads = static_cast<int64_t>(heads.kv.size());
    launch.kv_head = kv_head;
    launch.head_dim = width_;
    launch.scale = geometry_.scale;
    launch.cta_limit = cta_limit_;
    const double blocks = LaunchFlops() / (RowFlops(heads.q) * static_cast<double>(kTokenBlock) + 1);
    int64_t step = kTokenBlock * static_cast<int64_t>(std::clamp(blocks, 1.0, static_cast<double>(1 << 20)));
    if (split()) step = std::min(step, layout_.rotated_rows);
    const PositionMap positions = plan_.GroupPositions(plan_.SequenceIndex(rank_));
    for (int64_t row = 0; row < group_rows_ && !heads.q.empty();) {
      const int64_t chunk = dual_chunk().ChunkOf(positions.Position(row), plan_.num_tokens());
      const int64_t chunk_end = positions.RowsBelow(dual_chunk().Tokens(chunk, plan_.num_tokens()).end);
      const int64_t end = std::min(row + step, chunk_end);
      LF_RETURN_IF_ERROR(Launch(launch, row, end, chunk, IndicesOf(heads.q, chunk)));
      row = end;
    }
    return absl::OkStatus();
  }

  std::vector<IndexView> IndicesOf(std::span<const int32_t> heads, int64_t chunk) const {
    std::vector<IndexView> indices;
    indices.reserve(heads.size());
    for (const int32_t head : heads) indices.push_back(params_.indices[chunk * geometry_.num_q_heads + head]);
    return indices;
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

  // Rows [begin, end) of the head group, of one chunk. Waits until at most one launch is on its way.
  absl::Status Launch(AttentionParams launch, int64_t begin, int64_t end, int64_t chunk,
                      std::span<const IndexView> indices) {
    Event& ended = *owner_.launch_ended_[num_launches_ % owner_.launch_ended_.size()];
    if (num_launches_ >= owner_.launch_ended_.size()) LF_RETURN_IF_ERROR(ended.Wait());
    if (!stopped_ && params_.should_stop && params_.should_stop()) stopped_ = true;
    if (stopped_) return absl::OkStatus();
    AttentionSequence sequence;
    sequence.q_begin = begin;
    sequence.q_end = end;
    sequence.k_end = plan_.num_tokens();
    sequence.q_positions = plan_.GroupPositions(plan_.SequenceIndex(rank_)).From(begin);
    sequence.num_tokens = plan_.num_tokens();
    sequence.key_range_end = plan_.num_tokens();
    sequence.indices = indices;
    launch.sequences = {&sequence, 1};
    launch.covered_pairs = Piece<int64_t>(layout_.counts);
    launch.computed_pairs = launch.covered_pairs + 1;
    LF_RETURN_IF_ERROR(split() ? AttendParts(launch, sequence, chunk)
                               : kernels_.Attention(launch, workspace(), stream_));
    ++num_launches_;
    return ended.Record(stream_);
  }

  // The rows of `sequence`, which are of one of dual chunks: with each part of the keys in turn, for which
  // their queries are rotated, merged by lse.
  absl::Status AttendParts(AttentionParams launch, AttentionSequence sequence, int64_t chunk) {
    const int64_t rows = sequence.q_end - sequence.q_begin;
    HeadsView<const void> q = launch.q;
    q.data = Advance(q.data, sequence.q_begin * q.row_stride, kernels_.compute_dtype());
    const ChunkQueries queries{chunk, q, launch.num_q_heads, rows, sequence.q_positions};
    launch.q = Dense(layout_.rotated_q, rows);
    launch.out.data =
        Advance(launch.out.data, sequence.q_begin * launch.out.row_stride, kernels_.compute_dtype());
    launch.lse = Piece<float>(layout_.rotated_lse);
    launch.lse_head_stride = rows;
    launch.sequences = {&sequence, 1};
    sequence.q_begin = 0;
    sequence.q_end = rows;
    for (const ChunkPart part : kChunkParts) {
      const TokenRange keys = dual_chunk().Keys(part, chunk, plan_.num_tokens());
      if (keys.begin == keys.end) continue;
      LF_RETURN_IF_ERROR(RotateQueries(kernels_, dual_chunk(), params_.query_rotary, part,
                                       /*critical=*/false, queries, Piece<void>(layout_.rotated_q), stream_));
      sequence.key_range_begin = keys.begin;
      sequence.key_range_end = keys.end;
      launch.merge = part != ChunkPart::kIntra;
      LF_RETURN_IF_ERROR(kernels_.Attention(launch, workspace(), stream_));
    }
    return absl::OkStatus();
  }

  const DualChunk& dual_chunk() const { return geometry_.dual_chunk; }
  bool split() const { return dual_chunk().Splits(plan_.num_tokens()); }
  Workspace workspace() const { return {Piece<void>(layout_.workspace), layout_.workspace_bytes}; }

  // All-to-all of the head group: from[all heads][own tokens] to to[own heads of the lists][rows of the
  // group].
  absl::Status TokensToHeads(HeadsView<const void> from, const HeadLists& lists, HeadsView<void> to) {
    const int members = head_group_.size();
    const auto my_heads = static_cast<int64_t>(lists[head_group_.rank()].size());
    std::vector<int64_t> send_bytes(members), recv_bytes(members);
    for (int64_t block = 0; block < plan_.DealtBlocks(MemberRows(0)); block += layout_.head_slice) {
      char* send = Piece<char>(layout_.send);
      const TokenRange rows = Slice(local_rows_, block, layout_.head_slice);
      for (int m = 0; m < members; ++m) {
        LF_ASSIGN_OR_RETURN(send, PackHeads(kernels_, from, lists[m], rows, width_, send, exchange_));
        send_bytes[m] = static_cast<int64_t>(lists[m].size()) * RowBytes(rows);
        recv_bytes[m] = my_heads * RowBytes(Slice(MemberRows(m), block, layout_.head_slice));
      }
      LF_RETURN_IF_ERROR(head_group_.AllToAll(Piece<void>(layout_.send), send_bytes,
                                              Piece<void>(layout_.recv), recv_bytes, exchange_));
      const char* received = Piece<char>(layout_.recv);
      for (int m = 0; m < members; ++m) {
        const TokenRange theirs = Slice(MemberRows(m), block, layout_.head_slice);
        LF_ASSIGN_OR_RETURN(received, Place(received, my_heads, theirs, InGroup(m), to));
      }
    }
    return absl::OkStatus();
  }

  // And back: the round's output rows of every member's tokens to that member, which puts each head in its
  // columns.
  absl::Status HeadsToTokens(size_t round) {
    const int members = head_group_.size();
    const int64_t my_row = RowBytes(static_cast<int64_t>(rounds_[head_group_.rank()][round].q.size()));
    const int64_t block_bytes = plan_.deal_block() * my_row;
    std::vector<int64_t> send_bytes(members), recv_bytes(members);
    for (int64_t block = 0; block < plan_.DealtBlocks(MemberRows(0)); block += layout_.head_slice) {
      const TokenRange rows = Slice(local_rows_, block, layout_.head_slice);
      char* send = Piece<char>(layout_.send);
      for (int m = 0; m < members; ++m) {
        const TokenRange theirs = Slice(MemberRows(m), block, layout_.head_slice);
        send_bytes[m] = (theirs.end - theirs.begin) * my_row;
        recv_bytes[m] = static_cast<int64_t>(rounds_[m][round].q.size()) * RowBytes(rows);
        const char* from = Piece<char>(Received(round).out) + (block * members + m) * block_bytes;
        LF_RETURN_IF_ERROR(CopyBlocks(kernels_, send, block_bytes, from, members * block_bytes, block_bytes,
                                      send_bytes[m], exchange_));
        send += send_bytes[m];
      }
      LF_RETURN_IF_ERROR(head_group_.AllToAll(Piece<void>(layout_.send), send_bytes,
                                              Piece<void>(layout_.recv), recv_bytes, exchange_));
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
          exchange_));
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
    for (int64_t block = 0; block < plan_.DealtBlocks(plan_.MostGroupTokens()); block += layout_.key_slice) {
      const TokenRange rows = Slice(group_rows_, block, layout_.key_slice);
      LF_RETURN_IF_ERROR(
          PackHeads(kernels_, *view, heads, rows, width_, Piece<char>(layout_.send), exchange_).status());
      for (int m = 0; m < members; ++m) {
        counts_bytes[m] = num_heads * RowBytes(Slice(plan_.GroupNumTokens(m), block, layout_.key_slice));
      }
      LF_RETURN_IF_ERROR(sequence_group_.AllGather(Piece<void>(layout_.send), Piece<void>(layout_.recv),
                                                   counts_bytes, exchange_));
      const char* received = Piece<char>(layout_.recv);
      for (int m = 0; m < members; ++m) {
        const TokenRange theirs = Slice(plan_.GroupNumTokens(m), block, layout_.key_slice);
        LF_ASSIGN_OR_RETURN(received, Place(received, num_heads, theirs, plan_.GroupPositions(m), to));
      }
    }
    *view = to;
    return absl::OkStatus();
  }

  // Work that other ranks enqueue on their exchange streams after this waits for what this one has enqueued
  // before it.
  absl::Status WaitForPeers() {
    auto* word = Piece<int64_t>(layout_.word);
    LF_RETURN_IF_ERROR(kernels_.Zero(word, sizeof(*word), exchange_));
    return sequence_group_.AllReduce(word, 1, ReduceType::kInt64, ReduceOp::kMax, exchange_);
  }

  // Until they have read this rank's keys and values.
  absl::Status LeavePeers() {
    if (params_.peers == nullptr || num_rounds_ == 0) return absl::OkStatus();
    LF_RETURN_IF_ERROR(owner_.communication_timer_.Begin(exchange_));
    LF_RETURN_IF_ERROR(WaitForPeers());
    return owner_.communication_timer_.End(exchange_);
  }

  // Whether rows of other hosts come by way of the rank of this one that has their owner's place there.
  bool relayed() const { return params_.peers != nullptr && owner_.relay_group_ != nullptr; }

  // Gathers the keys and values of the ranks that have this one's place on their hosts.
  absl::Status Relay() {
    Communicator& hosts = *owner_.relay_group_;
    std::vector<int64_t> counts_bytes(hosts.size());
    for (int host = 0; host < hosts.size(); ++host) {
      counts_bytes[host] = RowBytes(geometry_.num_kv_heads * plan_.NumTokens(RelayedFrom(host)));
    }
    LF_RETURN_IF_ERROR(hosts.AllGather(params_.k.data, params_.peers->relay_k, counts_bytes, exchange_));
    return hosts.AllGather(params_.v.data, params_.peers->relay_v, counts_bytes, exchange_);
  }
  // The rank of a host that has this one's place there.
  int RelayedFrom(int host) const { return AtPlaceOf(rank_, host, owner_.options_.hosts); }
  int LocalOf(int rank) const { return relayed() ? owner_.options_.hosts.LocalOf(rank) : rank; }

  // Where this rank reads the keys (buffer 0) or values (1) of a rank: [num_kv_heads, its tokens, head_dim].
  const char* RowsOf(int rank, size_t buffer) const {
    const auto* const at = static_cast<const char*>(params_.peers->memory->At(LocalOf(rank), buffer));
    if (!relayed()) return at;
    const PeerHosts& hosts = owner_.options_.hosts;
    int64_t rows_before = 0;
    for (int host = 0; host < hosts.HostOf(rank); ++host) {
      rows_before += plan_.NumTokens(AtPlaceOf(rank, host, hosts));
    }
    return at + RowBytes(geometry_.num_kv_heads * rows_before);
  }

  // Of all tokens but those that this device has, in the order of the prompt, from the ranks that have them.
  // Every rank begins with another one.
  absl::Status ReadPeers(std::span<const int32_t> kv_heads, const AttentionLayout::Received& place,
                         RoundInput* input) {
    const int members = sequence_group_.size();
    const auto copy = [&](const Copy2DParams& params) {
      return params_.peers->memory->access().Copy(params, exchange_);
    };
    const HeadsView<void> to[] = {Dense(place.all_k, layout_.padded_tokens),
                                  Dense(place.all_v, layout_.padded_tokens)};
    for (int i = 1; i < members; ++i) {
      const int member = (sequence_group_.rank() + i) % members;
      if (LocalOf(member) == LocalOf(rank_)) continue;  // own and relayed rows: CopyFrom
      const int64_t bytes = RowBytes(plan_.GroupNumTokens(member));
      for (size_t buffer = 0; buffer < std::size(to); ++buffer) {
        const char* const all = RowsOf(member, buffer);
        for (size_t head = 0; head < kv_heads.size() && bytes > 0; ++head) {
          LF_RETURN_IF_ERROR(CopyToPlaces(copy, AtHead(to[buffer], head).data, plan_.GroupPositions(member),
                                          all + kv_heads[head] * bytes, RowBytes(1), bytes));
        }
      }
    }
    input->k = to[0];
    input->v = to[1];
    return absl::OkStatus();
  }

  // Own rows and relayed ones of a round whose place attention has just left: they are there once a launch of
  // attention ends.
  absl::Status CopyLate(size_t round) {
    LF_RETURN_IF_ERROR(copies_.WaitFor(*owner_.attended_[(round - turns()) % 2]));
    LF_RETURN_IF_ERROR(CopyFrom(rank_, round));
    if (relayed()) LF_RETURN_IF_ERROR(CopyRelayed(round));
    return owner_.copied_->Record(copies_);
  }

  // What this rank relays of other hosts.
  absl::Status CopyRelayed(size_t round) {
    for (int host = 0; host < owner_.options_.hosts.num_hosts(); ++host) {
      if (RelayedFrom(host) != rank_) LF_RETURN_IF_ERROR(CopyFrom(RelayedFrom(host), round));
    }
    return absl::OkStatus();
  }

  // The rows of a rank, which this device has, of a round's heads to their places.
  absl::Status CopyFrom(int rank, size_t round) {
    const std::vector<int32_t>& kv_heads = rounds_[plan_.HeadIndex(rank_)][round].kv;  // neighbours
    const int64_t bytes = RowBytes(plan_.NumTokens(rank));
    if (bytes == 0 || kv_heads.empty()) return absl::OkStatus();
    const AttentionLayout::Received& place = Received(round);
    const HeadsView<void> to[] = {Dense(place.all_k, layout_.padded_tokens),
                                  Dense(place.all_v, layout_.padded_tokens)};
    // A relay has own rows too, but later.
    const char* const from[] = {rank == rank_ ? static_cast<const char*>(params_.k.data) : RowsOf(rank, 0),
                                rank == rank_ ? static_cast<const char*>(params_.v.data) : RowsOf(rank, 1)};
    for (size_t buffer = 0; buffer < std::size(to); ++buffer) {
      LF_RETURN_IF_ERROR(CopyToPlaces(kernels_, to[buffer].data, plan_.TokenPositions(rank),
                                      from[buffer] + kv_heads.front() * bytes, RowBytes(1), bytes, copies_,
                                      {.count = std::ssize(kv_heads),
                                       .to_pitch = to[buffer].head_stride * element_,
                                       .from_pitch = bytes}));
    }
    return absl::OkStatus();
  }

  // [num_heads][rows] of one member, all of whose rows have `places`. Returns the byte behind what was read.
  absl::StatusOr<const char*> Place(const char* from, int64_t num_heads, const TokenRange& rows,
                                    const PositionMap& places, HeadsView<void> to) {
    const int64_t bytes = RowBytes(rows);
    if (bytes == 0 || num_heads == 0) return from;
    LF_RETURN_IF_ERROR(
        CopyToPlaces(kernels_, to.data, places.From(rows.begin), from, RowBytes(1), bytes, exchange_,
                     {.count = num_heads, .to_pitch = to.head_stride * element_, .from_pitch = bytes}));
    return from + num_heads * bytes;
  }

  // Where the rows of a member of the head group lie in those of the group.
  PositionMap InGroup(int member) const {
    const int64_t deal = plan_.deal_block();
    return {.first = member * deal, .block = deal, .stride = head_group_.size() * deal};
  }

  // Rows of the dealt blocks [block, block + count) of a buffer with so many rows.
  TokenRange Slice(int64_t rows, int64_t block, int64_t count) const {
    return {std::min(rows, block * plan_.deal_block()), std::min(rows, (block + count) * plan_.deal_block())};
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
  Stream& exchange_;
  Stream& copies_;  // within the device, of what peers do not bring
  Communicator& head_group_;
  Communicator& sequence_group_;
  const AttentionGeometry& geometry_;
  const ShardPlan plan_;
  const int rank_;
  ParallelAttentionParams params_;
  const AttentionLayout layout_;
  const int64_t width_;    // head_dim
  const int64_t element_;  // bytes
  const int64_t local_rows_;
  const int64_t group_rows_;
  Buffer memory_;
  std::vector<std::vector<RoundHeads>> rounds_;  // [member of the head group][round]
  size_t num_rounds_ = 0;
  std::array<RoundInput, 2> inputs_;  // of the rounds on their way
  std::vector<SampledRow> own_sampled_;
  std::vector<int32_t> computed_heads_;  // in the order of the sampled lse on the device
  int cta_limit_ = 0;                    // of the round that is being launched
  size_t num_launches_ = 0;
  bool started_ = false;
  bool stopped_ = false;
};

namespace {

// Of ParallelAttentionParams::peers.
absl::Status CheckPeers(const ShardPlan& plan, const ParallelAttentionParams& params, const Mesh& mesh,
                        const AttentionGeometry& geometry, int rank, int64_t relay_bytes) {
  if (params.peers == nullptr) return absl::OkStatus();
  if (!ParallelAttention::BeginsEarly(mesh)) {
    return absl::InvalidArgumentError(
        absl::StrCat("attention: keys and values of peers are for meshes with head=1, not ", ToString(mesh)));
  }
  const bool has_room = params.peers->relay_k != nullptr && params.peers->relay_v != nullptr;
  if (relay_bytes > 0 && !has_room) {
    return absl::InvalidArgumentError(absl::StrCat("attention: keys and values of other hosts need twice ",
                                                   relay_bytes, " bytes, there are none"));
  }
  const int64_t dense = plan.NumTokens(rank) * geometry.head_dim;
  for (const HeadsView<const void>& view : {params.k, params.v}) {
    if (dense == 0 || (view.row_stride == geometry.head_dim && view.head_stride == dense)) continue;
    return absl::InvalidArgumentError(absl::StrCat("attention: peers read keys and values with strides ",
                                                   geometry.head_dim, " and ", dense, ", these have ",
                                                   view.row_stride, " and ", view.head_stride));
  }
  return absl::OkStatus();
}

absl::Status CheckParams(const ShardPlan& plan, const ParallelAttentionParams& params, const Mesh& mesh,
                         const AttentionGeometry& geometry, int rank, int64_t relay_bytes) {
  if (!(plan.mesh() == mesh)) {
    return absl::InvalidArgumentError(
        absl::StrCat("attention: plan for mesh ", ToString(plan.mesh()), ", groups for ", ToString(mesh)));
  }
  LF_RETURN_IF_ERROR(CheckPeers(plan, params, mesh, geometry, rank, relay_bytes));
  const size_t heads = static_cast<size_t>(geometry.num_q_heads);
  const auto chunks = static_cast<size_t>(geometry.dual_chunk.NumChunks(plan.num_tokens()));
  if (params.indices.size() != chunks * heads || params.pairs.size() != heads) {
    return absl::InvalidArgumentError(absl::StrCat("attention: ", params.indices.size(), " indices and ",
                                                   params.pairs.size(), " pair counts for ", heads,
                                                   " query heads in ", chunks, " chunks"));
  }
  if (geometry.dual_chunk.Splits(plan.num_tokens()) && params.query_rotary.head_dim != geometry.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat("attention: queries are rotated in rows of ",
                                                   params.query_rotary.head_dim, ", heads have ",
                                                   geometry.head_dim));
  }
  if (geometry.dual_chunk.Splits(plan.num_tokens()) && !params.sampled.empty()) {
    return absl::UnimplementedError(
        "attention: the lse of sampled rows is not kept with dual chunk attention");
  }
  for (size_t i = 0; i < params.heads.size(); ++i) {
    const int32_t head = params.heads[i];
    if (head < 0 || head >= geometry.num_q_heads || (i > 0 && head <= params.heads[i - 1])) {
      return absl::InvalidArgumentError(
          absl::StrCat("attention: heads[", i, "] = ", head, " of ", heads, " query heads; they ascend"));
    }
  }
  for (size_t i = 0; i < params.sampled.size(); ++i) {
    const int64_t position = params.sampled[i];
    if (position < 0 || position >= plan.num_tokens() || (i > 0 && position <= params.sampled[i - 1])) {
      return absl::InvalidArgumentError(absl::StrCat("attention: sampled[", i, "] = ", position, " of ",
                                                     plan.num_tokens(), " tokens; they ascend"));
    }
  }
  const bool missing = params.q.data == nullptr || params.k.data == nullptr || params.v.data == nullptr ||
                       params.out == nullptr;
  if (missing && plan.NumTokens(rank) > 0)
    return absl::InvalidArgumentError("attention: q, k, v or out is missing");
  return absl::OkStatus();
}

}  // namespace

ParallelAttention::ParallelAttention(Backend& backend, Communicator& world, const Mesh& mesh,
                                     const AttentionGeometry& geometry,
                                     const ParallelAttentionOptions& options)
    : backend_(backend),
      world_(world),
      mesh_(mesh),
      geometry_(geometry),
      options_(options),
      attention_timer_(backend),
      communication_timer_(backend),
      exposed_timer_(backend) {}

ParallelAttention::~ParallelAttention() = default;

absl::StatusOr<std::unique_ptr<ParallelAttention>> ParallelAttention::Create(
    Backend& backend, Communicator& world, const Mesh& mesh, const AttentionGeometry& geometry,
    const ParallelAttentionOptions& options) {
  LF_RETURN_IF_ERROR(Validate(geometry));
  if (mesh.sequence < 1 || mesh.head < 1 || mesh.size() != world.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("mesh ", ToString(mesh), " needs ", mesh.size(), " ranks, there are ", world.size()));
  }
  LF_RETURN_IF_ERROR(options.hosts.CheckAlike());
  std::unique_ptr<ParallelAttention> attention(
      new ParallelAttention(backend, world, mesh, geometry, options));
  const ShardPlan plan(mesh, 0);
  const int s = plan.SequenceIndex(world.rank());
  const int h = plan.HeadIndex(world.rank());
  LF_ASSIGN_OR_RETURN(attention->head_group_, world.Split(s, h));
  LF_ASSIGN_OR_RETURN(attention->sequence_group_, world.Split(h, s));
  if (BeginsEarly(mesh) && options.hosts.num_hosts() > 1) {
    LF_ASSIGN_OR_RETURN(attention->relay_group_,
                        world.Split(options.hosts.LocalOf(world.rank()), options.hosts.HostOf(world.rank())));
  }
  LF_ASSIGN_OR_RETURN(attention->exchange_stream_, backend.NewStream());
  LF_ASSIGN_OR_RETURN(attention->copy_stream_, backend.NewStream());
  for (std::unique_ptr<Event>* event :
       {&attention->launch_ended_[0], &attention->launch_ended_[1], &attention->inputs_ready_,
        &attention->exchanges_ended_, &attention->relayed_, &attention->copied_, &attention->received_[0],
        &attention->received_[1], &attention->attended_[0], &attention->attended_[1]}) {
    LF_ASSIGN_OR_RETURN(*event, backend.NewEvent());
  }
  return attention;
}

int64_t ParallelAttention::RelayBytes(const AttentionGeometry& geometry, DType dtype, const ShardPlan& plan,
                                      const PeerHosts& hosts, int rank) {
  int64_t rows = 0;
  for (int host = 0; host < hosts.num_hosts() && hosts.num_hosts() > 1; ++host) {
    rows += plan.NumTokens(AtPlaceOf(rank, host, hosts));
  }
  return rows * geometry.num_kv_heads * geometry.head_dim * DTypeBytes(dtype);
}

int64_t ParallelAttention::PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry,
                                     const ShardPlan& plan, const AttentionLayout::Options& options) {
  return AttentionLayout(kernels, geometry, plan, options).total_bytes;
}

int64_t ParallelAttention::OwnRelayBytes(const ShardPlan& plan) const {
  if (relay_group_ == nullptr) return 0;
  return RelayBytes(geometry_, backend_.kernels().compute_dtype(), plan, options_.hosts, world_.rank());
}

absl::Status ParallelAttention::Begin(const ShardPlan& plan, const ParallelAttentionParams& params) {
  LF_CHECK(BeginsEarly(mesh_) && params.heads.empty());
  LF_RETURN_IF_ERROR(Drop());
  begun_ = std::make_unique<AttentionRun>(*this, plan, params);
  CpuStream host;
  absl::Status status = CheckPeers(plan, params, mesh_, geometry_, world_.rank(), OwnRelayBytes(plan));
  if (status.ok()) status = begun_->Allocate();
  status = AgreeOnStatus(world_, status, host);
  if (!status.ok()) {
    begun_.reset();
    return status;
  }
  if (plan.num_tokens() > 0) status = begun_->Start();
  if (status.ok()) return status;
  internal::AbortGroup(world_, status);
  Drop().IgnoreError();  // of a group that has ended; what was enqueued ends before its memory goes back
  return status;
}

absl::Status ParallelAttention::Drop() {
  const std::unique_ptr<AttentionRun> begun = std::move(begun_);
  return begun != nullptr && begun->started() ? begun->WaitForExchanges() : absl::OkStatus();
}

absl::StatusOr<ParallelAttentionStats> ParallelAttention::Run(const ShardPlan& plan,
                                                              const ParallelAttentionParams& params) {
  absl::Status ready = CheckParams(plan, params, mesh_, geometry_, world_.rank(), OwnRelayBytes(plan));
  if (ready.ok() && begun_ != nullptr && !begun_->IsFor(plan, params)) {
    ready = absl::InvalidArgumentError("attention: something else was begun");
  }
  std::unique_ptr<AttentionRun> run = std::move(begun_);
  if (run == nullptr) {
    run = std::make_unique<AttentionRun>(*this, plan, params);
    if (ready.ok()) ready = run->Allocate();
  }
  CpuStream host;
  if (const absl::Status agreed = AgreeOnStatus(world_, ready, host); !agreed.ok()) {
    begun_ = std::move(run);
    LF_RETURN_IF_ERROR(Drop());
    return agreed;
  }
  if (plan.num_tokens() == 0) return ParallelAttentionStats{};
  run->SetParams(params);
  absl::StatusOr<ParallelAttentionStats> stats = run->Execute();
  if (!stats.ok() && !absl::IsCancelled(stats.status())) internal::AbortGroup(world_, stats.status());
  return stats;
}

}  // namespace longfill
