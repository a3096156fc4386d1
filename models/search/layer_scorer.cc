#include "models/search/layer_scorer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/base/median.h"
#include "kernels/sparse/coverage.h"
#include "kernels/sparse/sparse_index.h"
#include "parallel/packing.h"

namespace longfill {
namespace {

// A launch of at most about 200 ms on a GPU, and of a second or so on a CPU, so that a stop is seen soon.
constexpr double kCpuLaunchFlops = 5e10;
constexpr double kDeviceLaunchFlops = 0.2 * 200e12;

int64_t BlocksOf(int64_t num_tokens) { return (num_tokens + kScoreBlock - 1) / kScoreBlock; }

}  // namespace

RowSample SampleRows(int64_t num_tokens, int64_t max_rows) {
  const int64_t blocks = BlocksOf(num_tokens);
  const int64_t most = std::max<int64_t>(1, max_rows / kScoreBlock);
  const int64_t step = (blocks + most - 1) / most;
  if (step <= 1 || max_rows >= num_tokens) return {num_tokens, PositionMap::Contiguous(0)};
  RowSample sample;
  sample.positions = {(blocks - 1) % step * kScoreBlock, kScoreBlock, step * kScoreBlock};
  sample.num_rows = sample.positions.RowsBelow(num_tokens);
  return sample;
}

LayerScorer::LayerScorer(Backend& backend, const AttentionGeometry& geometry,
                         const LayerScorerOptions& options)
    : backend_(backend),
      kernels_(backend.kernels()),
      stream_(backend.stream()),
      geometry_(geometry),
      options_(options),
      plan_(Mesh{1, 1}, options.num_tokens),
      all_rows_{options.num_tokens, PositionMap::Contiguous(0)},
      sample_(SampleRows(options.num_tokens, options.max_rows)),
      single_(CreateSingleCommunicator()),
      threads_(options.num_threads) {}

absl::StatusOr<std::unique_ptr<LayerScorer>> LayerScorer::Create(Backend& backend,
                                                                 const AttentionGeometry& geometry,
                                                                 const LayerScorerOptions& options) {
  LF_RETURN_IF_ERROR(Validate(geometry));
  LF_CHECK(options.num_tokens > 0 && options.max_rows > 0 && options.should_stop);
  std::unique_ptr<LayerScorer> scorer(new LayerScorer(backend, geometry, options));
  LF_ASSIGN_OR_RETURN(SparseIndexBuilder builder,
                      SparseIndexBuilder::Create(backend, *scorer->single_, geometry, options.coverage));
  scorer->builder_ = std::make_unique<SparseIndexBuilder>(std::move(builder));
  LF_ASSIGN_OR_RETURN(scorer->attention_,
                      ParallelAttention::Create(backend, *scorer->single_, Mesh{1, 1}, geometry));
  LF_RETURN_IF_ERROR(scorer->Allocate());
  return scorer;
}

absl::Status LayerScorer::Allocate() {
  const int64_t heads = geometry_.num_q_heads;
  const int64_t row_bytes = heads * geometry_.head_dim * DTypeBytes(kernels_.compute_dtype());
  const int64_t lse_bytes = heads * static_cast<int64_t>(sizeof(float));
  const int64_t out_bytes = sample_.num_rows * row_bytes;
  const PackedIndices dense(std::vector<SparseIndex>(static_cast<size_t>(heads), MakeDenseIndex()));
  const int64_t workspace_bytes = kernels_.AttentionWorkspaceBytes({.num_sequences = 1,
                                                                    .num_q_heads = heads,
                                                                    .num_q_rows = options_.num_tokens,
                                                                    .head_dim = geometry_.head_dim});
  const auto take = [](MemoryResource& memory, int64_t bytes, std::string_view what,
                       Buffer* buffer) -> absl::Status {
    LF_ASSIGN_OR_RETURN(*buffer, memory.Allocate(bytes, what));
    return absl::OkStatus();
  };
  MemoryResource& device = backend_.memory();
  MemoryResource& host = backend_.host_memory();
  LF_RETURN_IF_ERROR(take(device, dense.size_bytes(), "the index of full attention", &dense_index_));
  LF_RETURN_IF_ERROR(take(device, workspace_bytes, "the workspace of attention", &workspace_));
  LF_RETURN_IF_ERROR(take(device, options_.num_tokens * lse_bytes, "lse of full attention", &full_lse_));
  LF_RETURN_IF_ERROR(take(device, out_bytes, "sampled queries", &q_));
  LF_RETURN_IF_ERROR(take(device, out_bytes, "sampled outputs", &out_));
  LF_RETURN_IF_ERROR(take(device, sample_.num_rows * lse_bytes, "sampled lse", &lse_));
  LF_RETURN_IF_ERROR(take(host, out_bytes, "sampled outputs of full attention", &host_full_out_));
  LF_RETURN_IF_ERROR(
      take(host, sample_.num_rows * lse_bytes, "sampled lse of full attention", &host_full_lse_));
  LF_RETURN_IF_ERROR(take(host, out_bytes, "sampled outputs of a pattern", &host_out_));
  LF_RETURN_IF_ERROR(take(host, sample_.num_rows * lse_bytes, "sampled lse of a pattern", &host_lse_));
  for (std::unique_ptr<Event>& event : launch_ended_) {
    LF_ASSIGN_OR_RETURN(event, backend_.NewEvent());
  }
  LF_RETURN_IF_ERROR(kernels_.CopyIn(dense_index_.data(), dense.data(), dense.size_bytes(), stream_));
  dense_views_ = dense.Views(dense_index_.data());
  return absl::OkStatus();
}

absl::Status LayerScorer::AttendFully(const LayerHeads& heads, bool keep) {
  const double pairs = static_cast<double>(CausalPairs(options_.num_tokens) * geometry_.num_q_heads);
  LF_RETURN_IF_ERROR(
      Launch(heads, heads.q, heads.out, full_lse_.as<float>(), all_rows_, dense_views_, pairs));
  if (!keep) return absl::OkStatus();
  const int64_t lse_bytes = sizeof(float);
  for (int64_t head = 0; head < geometry_.num_q_heads; ++head) {
    LF_RETURN_IF_ERROR(GatherRows(full_lse_.as<float>() + head * options_.num_tokens, lse_bytes,
                                  lse_.as<float>() + head * sample_.num_rows));
  }
  const int64_t head_bytes = geometry_.head_dim * DTypeBytes(kernels_.compute_dtype());
  LF_RETURN_IF_ERROR(GatherRows(heads.out.data, geometry_.num_q_heads * head_bytes, out_.data()));
  LF_RETURN_IF_ERROR(Fetch(host_full_out_, host_full_lse_));
  for (int64_t head = 0; head < geometry_.num_q_heads; ++head) {
    LF_RETURN_IF_ERROR(GatherRows(Advance(heads.q.data, head * heads.q.head_stride, kernels_.compute_dtype()),
                                  head_bytes,
                                  static_cast<char*>(q_.data()) + head * sample_.num_rows * head_bytes));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<HeadScore>> LayerScorer::Score(const LayerHeads& heads,
                                                          std::span<const HeadPattern> patterns) {
  LF_RETURN_IF_ERROR(options_.should_stop());
  LF_ASSIGN_OR_RETURN(const LayerIndex index, builder_->Build(plan_, heads.q, heads.k, patterns));
  double pairs = 0;
  for (const PairCounts& counts : index.pairs) pairs += static_cast<double>(counts.covered);
  const int64_t dim = geometry_.head_dim;
  LF_RETURN_IF_ERROR(Launch(heads, {q_.data(), sample_.num_rows * dim, dim},
                            {out_.data(), dim, geometry_.num_q_heads * dim}, lse_.as<float>(), sample_,
                            index.heads, pairs));
  LF_RETURN_IF_ERROR(Fetch(host_out_, host_lse_));
  std::vector<HeadScore> scores(static_cast<size_t>(geometry_.num_q_heads));
  threads_.ParallelFor(geometry_.num_q_heads, [&](int64_t head, int) {
    scores[static_cast<size_t>(head)] = Compare(head, index.pairs[static_cast<size_t>(head)].covered);
  });
  return scores;
}

absl::StatusOr<LayerTime> LayerScorer::Measure(const LayerHeads& heads, std::span<const HeadPattern> patterns,
                                               int runs) {
  const int64_t dim = geometry_.head_dim;
  LF_ASSIGN_OR_RETURN(const Buffer out,
                      backend_.memory().Allocate(options_.num_tokens * geometry_.num_q_heads * dim *
                                                     DTypeBytes(kernels_.compute_dtype()),
                                                 "outputs of a pattern that is timed"));
  LayerTime time;
  std::vector<double> index_seconds, attention_seconds;
  for (int run = 0; run <= runs; ++run) {
    LF_RETURN_IF_ERROR(options_.should_stop());
    LF_ASSIGN_OR_RETURN(const LayerIndex index, builder_->Build(plan_, heads.q, heads.k, patterns));
    LF_ASSIGN_OR_RETURN(
        const ParallelAttentionStats stats,
        attention_->Run(plan_, {.q = heads.q,
                                .k = heads.k,
                                .v = heads.v,
                                .indices = index.heads,
                                .pairs = index.pairs,
                                .out = out.data(),
                                .should_stop = [this] { return !options_.should_stop().ok(); }}));
    time.pairs = stats.covered_pairs;
    if (run == 0 && runs > 0) continue;
    index_seconds.push_back(index.seconds);
    attention_seconds.push_back(stats.attention_seconds);
  }
  time.index_seconds = Median(std::move(index_seconds));
  time.attention_seconds = Median(std::move(attention_seconds));
  return time;
}

// Attention of some rows of all heads, in launches of bounded length. `pairs`: of all rows and heads of the
// prompt; the last rows of a dense prompt have twice the mean.
absl::Status LayerScorer::Launch(const LayerHeads& heads, HeadsView<const void> q, HeadsView<void> out,
                                 float* lse, const RowSample& rows, std::span<const IndexView> indices,
                                 double pairs) {
  const double most = stream_.device() == DeviceKind::kCpu ? kCpuLaunchFlops : kDeviceLaunchFlops;
  const double block_flops = 8.0 * static_cast<double>(geometry_.head_dim * kScoreBlock) * pairs /
                             static_cast<double>(options_.num_tokens);
  const auto blocks = static_cast<int64_t>(std::clamp(most / (block_flops + 1), 1.0, double{1 << 20}));
  const int64_t step = blocks * kScoreBlock;
  for (int64_t row = 0; row < rows.num_rows; row += step) {
    LF_RETURN_IF_ERROR(options_.should_stop());
    Event& ended = *launch_ended_[num_launches_ % 2];
    if (num_launches_ >= 2) LF_RETURN_IF_ERROR(ended.Wait());
    AttentionSequence sequence;
    sequence.q_begin = row;
    sequence.q_end = std::min(row + step, rows.num_rows);
    sequence.k_end = options_.num_tokens;
    sequence.q_positions = rows.positions.From(row);
    sequence.num_tokens = options_.num_tokens;
    sequence.key_range_end = options_.num_tokens;
    sequence.indices = indices;
    AttentionParams launch;
    launch.q = q;
    launch.k = heads.k;
    launch.v = heads.v;
    launch.out = out;
    launch.lse = lse;
    launch.lse_head_stride = rows.num_rows;
    launch.num_q_heads = geometry_.num_q_heads;
    launch.num_kv_heads = geometry_.num_kv_heads;
    launch.head_dim = geometry_.head_dim;
    launch.scale = geometry_.scale;
    launch.sequences = {&sequence, 1};
    LF_RETURN_IF_ERROR(kernels_.Attention(launch, {workspace_.data(), workspace_.size_bytes()}, stream_));
    ++num_launches_;
    LF_RETURN_IF_ERROR(ended.Record(stream_));
  }
  return absl::OkStatus();
}

// The sampled rows of [num_tokens] rows of row_bytes, one behind the other.
absl::Status LayerScorer::GatherRows(const void* from, int64_t row_bytes, void* to) {
  const PositionMap& positions = sample_.positions;
  const int64_t block = std::min(positions.block, sample_.num_rows);
  const int64_t stride = std::min(positions.stride, options_.num_tokens);
  return CopyBlocks(kernels_, static_cast<char*>(to), block * row_bytes,
                    static_cast<const char*>(from) + positions.first * row_bytes, stride * row_bytes,
                    block * row_bytes, sample_.num_rows * row_bytes, stream_);
}

// out_ and lse_ to the host, there at return.
absl::Status LayerScorer::Fetch(const Buffer& host_out, const Buffer& host_lse) {
  LF_RETURN_IF_ERROR(kernels_.CopyOut(host_out.data(), out_.data(), out_.size_bytes(), stream_));
  LF_RETURN_IF_ERROR(kernels_.CopyOut(host_lse.data(), lse_.data(), lse_.size_bytes(), stream_));
  return stream_.Sync();
}

HeadScore LayerScorer::Compare(int64_t head, int64_t pairs) const {
  const DType dtype = kernels_.compute_dtype();
  const int64_t dim = geometry_.head_dim;
  const float* sparse_lse = host_lse_.as<float>() + head * sample_.num_rows;
  const float* full_lse = host_full_lse_.as<float>() + head * sample_.num_rows;
  const int64_t first_last = sample_.positions.RowsBelow(options_.num_tokens - kLastRows);
  const int64_t num_last = sample_.num_rows - first_last;
  std::vector<float> sparse(static_cast<size_t>(dim)), full(sparse.size());
  double recall = 0, last_recall = 0, difference = 0, norm = 0;
  for (int64_t row = 0; row < sample_.num_rows; ++row) {
    const double kept = std::exp(double{sparse_lse[row]} - double{full_lse[row]});
    recall += kept;
    if (row >= first_last) last_recall += kept;
    const int64_t at = (row * geometry_.num_q_heads + head) * dim;
    WidenToFloat(Advance(static_cast<const void*>(host_out_.data()), at, dtype), dtype, dim, sparse.data());
    WidenToFloat(Advance(static_cast<const void*>(host_full_out_.data()), at, dtype), dtype, dim,
                 full.data());
    for (size_t i = 0; i < full.size(); ++i) {
      const double off = double{sparse[i]} - double{full[i]};
      difference += off * off;
      norm += double{full[i]} * double{full[i]};
    }
  }
  HeadScore score;
  score.recall = recall / static_cast<double>(sample_.num_rows);
  score.last_recall = last_recall / static_cast<double>(num_last);
  score.error = norm > 0 ? std::sqrt(difference / norm) : 0;
  score.pairs = pairs;
  return score;
}

}  // namespace longfill
