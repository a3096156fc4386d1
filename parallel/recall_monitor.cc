#include "parallel/recall_monitor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "absl/strings/str_cat.h"
#include "kernels/base/piece_layout.h"
#include "kernels/sparse/sparse_index.h"
#include "parallel/communicator_internal.h"

namespace longfill {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kMinSampled = 8, kMaxSampled = 16;
constexpr int64_t kLastRows = 64;  // a quarter of the sampled rows is among these

// Keys [key_begin, key_end) and the sampled rows [row_begin, row_end) that see all of them.
struct KeyInterval {
  int64_t key_begin = 0, key_end = 0;
  size_t row_begin = 0, row_end = 0;
  int64_t num_rows() const { return static_cast<int64_t>(row_end - row_begin); }
};

// The keys that the sampled rows see, cut where a row begins or ceases to see them: in each piece, every row
// sees either all keys or none, and the rows that see it are neighbours.
std::vector<KeyInterval> CutKeys(std::span<const int64_t> positions, int64_t window) {
  const auto first_key = [&](int64_t position) {
    return window == 0 ? int64_t{0} : std::max<int64_t>(0, position - window + 1);
  };
  std::set<int64_t> cuts;
  for (const int64_t position : positions) {
    cuts.insert(first_key(position));
    cuts.insert(position + 1);
  }
  std::vector<KeyInterval> intervals;
  for (auto cut = cuts.begin(); cut != cuts.end() && std::next(cut) != cuts.end(); ++cut) {
    KeyInterval interval{.key_begin = *cut, .key_end = *std::next(cut)};
    const auto sees = [&](int64_t position) {
      return first_key(position) <= interval.key_begin && interval.key_end <= position + 1;
    };
    while (interval.row_begin < positions.size() && !sees(positions[interval.row_begin]))
      ++interval.row_begin;
    interval.row_end = interval.row_begin;
    while (interval.row_end < positions.size() && sees(positions[interval.row_end])) ++interval.row_end;
    if (interval.num_rows() > 0) intervals.push_back(interval);
  }
  return intervals;
}

// Memory of one Measure. Rows are sampled rows of all query heads of a KV head: row r of the sampled row i is
// query head r of the KV head's.
struct MonitorLayout {
  MonitorLayout(const KernelSet& kernels, const AttentionGeometry& geometry, const ShardPlan& plan,
                std::span<const int64_t> positions, std::span<const KeyInterval> intervals) {
    const int64_t row_bytes = geometry.head_dim * DTypeBytes(kernels.compute_dtype());
    for (const KeyInterval& interval : intervals) num_rows += interval.num_rows() * geometry.q_per_kv();
    const int64_t sampled_bytes = static_cast<int64_t>(positions.size()) * geometry.num_q_heads * row_bytes;
    PieceLayout pieces;
    sent = pieces.Add(plan.mesh().size() > 1 ? sampled_bytes : 0);
    gathered = pieces.Add(sampled_bytes);
    sampled = pieces.Add(sampled_bytes);
    q = pieces.Add(geometry.num_kv_heads * num_rows * row_bytes);
    out = pieces.Add(geometry.num_kv_heads * num_rows * row_bytes);
    lse = pieces.Add(geometry.num_kv_heads * num_rows * static_cast<int64_t>(sizeof(float)));
    index = pieces.Add(PackedIndices(std::vector<SparseIndex>{MakeDenseIndex()}).size_bytes());
    workspace_bytes =
        kernels.AttentionWorkspaceBytes({.num_sequences = static_cast<int64_t>(intervals.size()),
                                         .num_q_heads = geometry.num_kv_heads,
                                         .num_q_rows = num_rows,
                                         .head_dim = geometry.head_dim});
    workspace = pieces.Add(workspace_bytes);
    total_bytes = pieces.total_bytes();
  }

  int64_t num_rows = 0;  // of all intervals
  // Byte offsets.
  int64_t sent = 0;        // own sampled rows: [rows, num_q_heads, head_dim]
  int64_t gathered = 0;    // those of rank 0, 1, ...
  int64_t sampled = 0;     // [num_kv_heads, positions * q_per_kv, head_dim]
  int64_t q = 0, out = 0;  // [num_kv_heads, num_rows, head_dim]: the rows of each interval
  int64_t lse = 0;         // [num_kv_heads, num_rows], fp32
  int64_t index = 0;
  int64_t workspace = 0, workspace_bytes = 0;
  int64_t total_bytes = 0;
};

double JoinLse(double a, double b) {
  const double most = std::max(a, b);
  if (most == -kInfinity) return most;
  return most + std::log(std::exp(a - most) + std::exp(b - most));
}

// One Measure on one rank, up to the lse of this rank's own keys.
class OwnKeys {
 public:
  OwnKeys(Backend& backend, Communicator& world, const AttentionGeometry& geometry, const ShardPlan& plan,
          std::span<const int64_t> positions, int64_t window)
      : backend_(backend),
        kernels_(backend.kernels()),
        stream_(backend.stream()),
        world_(world),
        geometry_(geometry),
        plan_(plan),
        positions_(positions),
        intervals_(CutKeys(positions, window)),
        layout_(kernels_, geometry, plan, positions, intervals_),
        row_bytes_(geometry.head_dim * DTypeBytes(kernels_.compute_dtype())),
        position_bytes_(geometry.num_q_heads * row_bytes_) {}

  absl::Status Allocate() {
    LF_ASSIGN_OR_RETURN(memory_, backend_.memory().Allocate(layout_.total_bytes, "the recall monitor"));
    return absl::OkStatus();
  }

  // The sampled queries of all ranks, rank after rank.
  absl::Status Gather(HeadsView<const void> q) {
    const PositionMap rows = plan_.TokenPositions(world_.rank());
    const int64_t to = world_.size() > 1 ? layout_.sent : layout_.gathered;
    std::vector<int64_t> counts_bytes(static_cast<size_t>(world_.size()));
    const DType dtype = kernels_.compute_dtype();
    for (const int64_t position : positions_) {
      int64_t& bytes = counts_bytes[static_cast<size_t>(plan_.RankOfToken(position))];
      if (plan_.RankOfToken(position) == world_.rank()) {
        LF_RETURN_IF_ERROR(
            kernels_.Copy2D({.to = Piece<char>(to) + bytes,
                             .to_pitch = row_bytes_,
                             .from = Advance(q.data, rows.RowsBelow(position) * q.row_stride, dtype),
                             .from_pitch = q.head_stride * DTypeBytes(dtype),
                             .row_bytes = row_bytes_,
                             .rows = geometry_.num_q_heads},
                            stream_));
      }
      bytes += position_bytes_;
    }
    if (world_.size() == 1) return absl::OkStatus();
    return world_.AllGather(Piece<void>(layout_.sent), Piece<void>(layout_.gathered), counts_bytes, stream_);
  }

  // And those of each interval, as rows of tiles.
  absl::Status Pack() {
    std::vector<int64_t> first(static_cast<size_t>(world_.size()) + 1);  // gathered rows before each rank's
    for (const int64_t position : positions_) ++first[static_cast<size_t>(plan_.RankOfToken(position)) + 1];
    for (size_t rank = 1; rank < first.size(); ++rank) first[rank] += first[rank - 1];
    const int64_t kv_bytes = geometry_.q_per_kv() * row_bytes_;  // of one position
    const auto num_positions = static_cast<int64_t>(positions_.size());
    for (int64_t i = 0; i < num_positions; ++i) {
      const int64_t from = first[static_cast<size_t>(plan_.RankOfToken(positions_[i]))]++;
      LF_RETURN_IF_ERROR(CopyRows(layout_.sampled + i * kv_bytes, num_positions * kv_bytes,
                                  layout_.gathered + from * position_bytes_, kv_bytes, kv_bytes));
    }
    int64_t row = 0;
    for (const KeyInterval& interval : intervals_) {
      const int64_t bytes = interval.num_rows() * kv_bytes;
      LF_RETURN_IF_ERROR(CopyRows(layout_.q + row * row_bytes_, layout_.num_rows * row_bytes_,
                                  layout_.sampled + static_cast<int64_t>(interval.row_begin) * kv_bytes,
                                  num_positions * kv_bytes, bytes));
      row += interval.num_rows() * geometry_.q_per_kv();
    }
    return absl::OkStatus();
  }

  // Every row sees all keys of its interval: its position is set behind all of them.
  absl::Status Attend(HeadsView<const void> k) {
    const PackedIndices packed(std::vector<SparseIndex>{MakeDenseIndex()});
    LF_RETURN_IF_ERROR(
        kernels_.CopyIn(Piece<void>(layout_.index), packed.data(), packed.size_bytes(), stream_));
    const std::vector<IndexView> indices(static_cast<size_t>(geometry_.num_kv_heads),
                                         packed.Views(Piece<void>(layout_.index)).front());
    const PositionMap rows = plan_.TokenPositions(world_.rank());
    const int64_t num_keys = plan_.NumTokens(world_.rank());
    const int64_t behind = (num_keys + kTokenBlock - 1) / kTokenBlock * kTokenBlock;
    std::vector<AttentionSequence> sequences;
    int64_t row = 0;
    for (const KeyInterval& interval : intervals_) {
      AttentionSequence sequence;
      sequence.q_begin = row;
      row += interval.num_rows() * geometry_.q_per_kv();
      sequence.q_end = row;
      sequence.k_end = num_keys;
      sequence.q_positions = PositionMap::Contiguous(behind);
      sequence.num_tokens = behind + sequence.q_end - sequence.q_begin;
      sequence.key_range_begin = std::min(num_keys, rows.RowsBelow(interval.key_begin));
      sequence.key_range_end = std::min(num_keys, rows.RowsBelow(interval.key_end));
      sequence.indices = indices;
      if (sequence.key_range_begin < sequence.key_range_end) sequences.push_back(sequence);
      attended_.push_back(sequence.key_range_begin < sequence.key_range_end);
    }
    if (sequences.empty()) return absl::OkStatus();
    AttentionParams params;
    params.q = Rows(layout_.q);
    params.k = k;
    params.v = k;  // the lse alone is wanted, and depends on no values
    params.out = Rows(layout_.out);
    params.lse = Piece<float>(layout_.lse);
    params.lse_head_stride = layout_.num_rows;
    params.num_q_heads = params.num_kv_heads = geometry_.num_kv_heads;
    params.head_dim = geometry_.head_dim;
    params.scale = geometry_.scale;
    params.sequences = sequences;
    return kernels_.Attention(params, {Piece<void>(layout_.workspace), layout_.workspace_bytes}, stream_);
  }

  // [num_q_heads, positions]; -infinity where none of the keys that a row sees is here.
  absl::StatusOr<std::vector<double>> Lse() {
    std::vector<float> lse(static_cast<size_t>(geometry_.num_kv_heads * layout_.num_rows));
    LF_RETURN_IF_ERROR(stream_.Sync());
    LF_RETURN_IF_ERROR(kernels_.CopyOut(lse.data(), Piece<void>(layout_.lse),
                                        static_cast<int64_t>(lse.size() * sizeof(float)), stream_));
    LF_RETURN_IF_ERROR(stream_.Sync());
    const int64_t q_per_kv = geometry_.q_per_kv();
    const auto num_positions = static_cast<int64_t>(positions_.size());
    std::vector<double> joined(static_cast<size_t>(geometry_.num_q_heads * num_positions), -kInfinity);
    int64_t row = 0;
    for (size_t i = 0; i < intervals_.size(); ++i) {
      const KeyInterval& interval = intervals_[i];
      const int64_t num_rows = interval.num_rows() * q_per_kv;
      for (int64_t at = 0; at < geometry_.num_kv_heads * num_rows && attended_[i]; ++at) {
        const int64_t kv = at / num_rows;
        const int64_t r = at % num_rows;
        const int64_t position = static_cast<int64_t>(interval.row_begin) + r / q_per_kv;
        double& to = joined[(kv * q_per_kv + r % q_per_kv) * num_positions + position];
        to = JoinLse(to, lse[kv * layout_.num_rows + row + r]);
      }
      row += num_rows;
    }
    return joined;
  }

 private:
  template <typename T>
  T* Piece(int64_t offset) const {
    return PieceAt<T>(memory_.data(), offset);
  }
  HeadsView<void> Rows(int64_t offset) const {
    return {Piece<void>(offset), layout_.num_rows * geometry_.head_dim, geometry_.head_dim};
  }

  // `bytes` for each KV head, between pieces of the memory.
  absl::Status CopyRows(int64_t to, int64_t to_pitch, int64_t from, int64_t from_pitch, int64_t bytes) {
    return kernels_.Copy2D({.to = Piece<void>(to),
                            .to_pitch = to_pitch,
                            .from = Piece<void>(from),
                            .from_pitch = from_pitch,
                            .row_bytes = bytes,
                            .rows = geometry_.num_kv_heads},
                           stream_);
  }

  Backend& backend_;
  KernelSet& kernels_;
  Stream& stream_;
  Communicator& world_;
  const AttentionGeometry& geometry_;
  const ShardPlan& plan_;
  const std::span<const int64_t> positions_;
  const std::vector<KeyInterval> intervals_;
  const MonitorLayout layout_;
  const int64_t row_bytes_;
  const int64_t position_bytes_;  // of all query heads
  std::vector<bool> attended_;    // [intervals]: this rank has keys of it
  Buffer memory_;
};

}  // namespace

std::vector<int64_t> SampledPositions(int64_t num_tokens, int64_t q_per_kv) {
  const int64_t count = std::clamp(kRowBlock / q_per_kv, kMinSampled, kMaxSampled);
  const int64_t last = count / 4;
  const int64_t spread = count - last;
  std::set<int64_t> positions;
  for (int64_t i = 0; i < last; ++i)
    positions.insert(std::max<int64_t>(0, num_tokens - 1 - i * kLastRows / last));
  for (int64_t i = 0; i < spread; ++i) {
    // Anywhere in its part, by the multiples of the golden ratio: no period of tiles or of ranks is followed.
    const double place = std::fmod(static_cast<double>(i + 1) * 0.6180339887498949, 1.0);
    positions.insert(static_cast<int64_t>((static_cast<double>(i) + place) / static_cast<double>(spread) *
                                          static_cast<double>(num_tokens)));
  }
  if (num_tokens == 0) return {};
  return {positions.begin(), positions.end()};
}

RecallMonitor::RecallMonitor(Backend& backend, Communicator& world, const AttentionGeometry& geometry,
                             const ShardPlan& plan)
    : backend_(&backend),
      world_(&world),
      geometry_(geometry),
      plan_(plan),
      positions_(SampledPositions(plan.num_tokens(), geometry.q_per_kv())),
      timer_(backend) {}

absl::StatusOr<RecallMonitor> RecallMonitor::Create(Backend& backend, Communicator& world,
                                                    const AttentionGeometry& geometry,
                                                    const ShardPlan& plan) {
  LF_RETURN_IF_ERROR(Validate(geometry));
  if (plan.mesh().size() != world.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("recall: mesh ", ToString(plan.mesh()), " for ", world.size(), " ranks"));
  }
  return RecallMonitor(backend, world, geometry, plan);
}

int64_t RecallMonitor::ComputedPairs(const AttentionGeometry& geometry, int64_t num_tokens, int64_t window) {
  int64_t pairs = 0;
  for (const KeyInterval& interval : CutKeys(SampledPositions(num_tokens, geometry.q_per_kv()), window)) {
    const int64_t tiles = (interval.num_rows() * geometry.q_per_kv() + kRowBlock - 1) / kRowBlock;
    pairs += tiles * kRowBlock * (interval.key_end - interval.key_begin) * geometry.num_kv_heads;
  }
  return pairs;
}

int64_t RecallMonitor::PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry,
                                 const ShardPlan& plan, int64_t window) {
  const std::vector<int64_t> positions = SampledPositions(plan.num_tokens(), geometry.q_per_kv());
  return MonitorLayout(kernels, geometry, plan, positions, CutKeys(positions, window)).total_bytes;
}

absl::Status RecallMonitor::Measure(HeadsView<const void> q, HeadsView<const void> k, int64_t window) {
  OwnKeys own(*backend_, *world_, geometry_, plan_, positions_, window);
  CpuStream host;
  LF_RETURN_IF_ERROR(AgreeOnStatus(*world_, own.Allocate(), host));
  if (plan_.num_tokens() == 0) return absl::OkStatus();
  const auto measure = [&]() -> absl::Status {
    Stream& stream = backend_->stream();
    LF_RETURN_IF_ERROR(own.Gather(q));
    timer_.Reset();
    LF_RETURN_IF_ERROR(timer_.Begin(stream));
    LF_RETURN_IF_ERROR(own.Pack());
    LF_RETURN_IF_ERROR(own.Attend(k));
    LF_RETURN_IF_ERROR(timer_.End(stream));
    LF_ASSIGN_OR_RETURN(const std::vector<double> mine, own.Lse());
    LF_ASSIGN_OR_RETURN(const double seconds, timer_.Seconds());
    seconds_ += seconds;
    std::vector<double> all(mine.size() * static_cast<size_t>(world_->size()));
    const std::vector<int64_t> counts(static_cast<size_t>(world_->size()),
                                      static_cast<int64_t>(mine.size() * sizeof(double)));
    LF_RETURN_IF_ERROR(world_->AllGather(mine.data(), all.data(), counts, host));
    full_lse_.assign(mine.size(), -kInfinity);
    for (size_t i = 0; i < all.size(); ++i) {
      double& to = full_lse_[i % mine.size()];
      to = JoinLse(to, all[i]);
    }
    return absl::OkStatus();
  };
  absl::Status measured = measure();
  if (!measured.ok()) internal::AbortGroup(*world_, measured);
  return measured;
}

absl::StatusOr<std::vector<double>> RecallMonitor::Recall(std::span<const float> sampled_lse) {
  LF_CHECK(sampled_lse.size() == full_lse_.size());
  std::vector<float> sparse(sampled_lse.begin(), sampled_lse.end());
  std::vector<double> recall(static_cast<size_t>(geometry_.num_q_heads));
  if (sparse.empty()) return recall;
  // Which of NaN and a number is the larger depends on their order.
  std::replace_if(
      sparse.begin(), sparse.end(), [](float lse) { return std::isnan(lse); }, kInfinity);
  CpuStream host;
  LF_RETURN_IF_ERROR(world_->AllReduce(sparse.data(), static_cast<int64_t>(sparse.size()),
                                       ReduceType::kFloat32, ReduceOp::kMax, host));
  for (size_t i = 0; i < sparse.size(); ++i) {
    const bool is_number = sparse[i] < kInfinity && full_lse_[i] < kInfinity;
    const double of_row =
        is_number ? std::min(std::exp(static_cast<double>(sparse[i]) - full_lse_[i]), 1.0) : 0;
    recall[i / positions_.size()] += of_row / static_cast<double>(positions_.size());
  }
  return recall;
}

}  // namespace longfill
