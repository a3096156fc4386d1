#include "parallel/sparse_index_builder.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "parallel/block_selector.h"
#include "parallel/communicator_internal.h"
#include "parallel/selection_context.h"
#include "parallel/share_selector.h"
#include "parallel/vertical_slash_selector.h"

namespace longfill {
namespace {

constexpr int64_t kMaxScoredTokens = int64_t{1} << 23;  // fixed-point row sums (kernels/api/kernel_set.h)

// The selectors of one layer for one of its chunks. They work one after the other, so their scratch is the
// same memory.
struct Selectors {
  // `plan`: up to the end of the chunk.
  Selectors(const KernelSet& kernels, const ShardPlan& plan, const AttentionGeometry& geometry,
            const SelectionScope& scope_in, std::span<const HeadPattern> patterns)
      : scope(scope_in),
        lines(kernels, plan, geometry, scope, patterns),
        blocks(kernels, plan, geometry, patterns),
        shares(kernels, plan, geometry, patterns) {}

  int64_t ScratchBytes(int rank) const {
    return std::max({lines.ScratchBytes(rank), blocks.ScratchBytes(rank), shares.ScratchBytes(rank)});
  }

  SelectionScope scope;
  VerticalSlashSelector lines;
  BlockSelector blocks;
  ShareSelector shares;
};

// [chunks]; also of an empty prompt one.
std::vector<Selectors> SelectorsOf(const KernelSet& kernels, const ShardPlan& plan,
                                   const AttentionGeometry& geometry, std::span<const HeadPattern> patterns) {
  const DualChunk& dual_chunk = geometry.dual_chunk;
  std::vector<Selectors> chunks;
  for (int64_t chunk = 0; chunk < dual_chunk.NumChunks(plan.num_tokens()); ++chunk) {
    const SelectionScope scope = SelectionScope::LastQueriesOf(dual_chunk, chunk, plan.num_tokens());
    chunks.emplace_back(kernels, plan.Prefix(scope.num_keys()), geometry, scope, patterns);
  }
  return chunks;
}

int64_t MostScratchBytes(std::span<const Selectors> chunks, int rank) {
  int64_t most = 0;
  for (const Selectors& chunk : chunks) most = std::max(most, chunk.ScratchBytes(rank));
  return most;
}

}  // namespace

SparseIndexBuilder::SparseIndexBuilder(Backend& backend, Communicator& world,
                                       const AttentionGeometry& geometry, Coverage coverage)
    : backend_(&backend),
      world_(&world),
      geometry_(geometry),
      coverage_(coverage),
      report_(geometry.num_q_heads),
      timer_(backend) {}

absl::StatusOr<SparseIndexBuilder> SparseIndexBuilder::Create(Backend& backend, Communicator& world,
                                                              const AttentionGeometry& geometry,
                                                              Coverage coverage) {
  LF_RETURN_IF_ERROR(Validate(geometry));
  return SparseIndexBuilder(backend, world, geometry, coverage);
}

int64_t SparseIndexBuilder::IndexBytes(const AttentionGeometry& geometry, const ShardPlan& plan,
                                       std::span<const HeadPattern> patterns) {
  const DualChunk& dual_chunk = geometry.dual_chunk;
  int64_t bytes = 0;
  for (int64_t chunk = 0; chunk < dual_chunk.NumChunks(plan.num_tokens()); ++chunk) {
    bytes += IndexStorage::Bytes(dual_chunk.Tokens(chunk, plan.num_tokens()).end, patterns);
  }
  return bytes;
}

int64_t SparseIndexBuilder::PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry,
                                      const ShardPlan& plan, std::span<const HeadPattern> patterns) {
  const std::vector<Selectors> chunks = SelectorsOf(kernels, plan, geometry, patterns);
  int64_t most = 0;
  for (int rank = 0; rank < plan.mesh().size(); ++rank) most = std::max(most, MostScratchBytes(chunks, rank));
  return IndexBytes(geometry, plan, patterns) + most;
}

absl::Status SparseIndexBuilder::Check(const ShardPlan& plan, std::span<const HeadPattern> patterns) const {
  if (plan.mesh().size() != world_->size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("sparse index: mesh ", ToString(plan.mesh()), " for ", world_->size(), " ranks"));
  }
  if (patterns.size() != static_cast<size_t>(geometry_.num_q_heads)) {
    return absl::InvalidArgumentError(absl::StrCat("sparse index: ", patterns.size(), " patterns for ",
                                                   geometry_.num_q_heads, " query heads"));
  }
  if (geometry_.dual_chunk.Splits(plan.num_tokens())) {
    LF_RETURN_IF_ERROR(CheckDualChunkPatterns(patterns, coverage_));
  }
  for (const HeadPattern& pattern : patterns) {
    LF_RETURN_IF_ERROR(Validate(pattern));
    if (plan.num_tokens() > kMaxScoredTokens && std::holds_alternative<VerticalSlash>(pattern)) {
      return absl::InvalidArgumentError(absl::StrCat("sparse index: ", plan.num_tokens(),
                                                     " tokens; vertical-slash scores are exact up to ",
                                                     kMaxScoredTokens));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<LayerIndex> SparseIndexBuilder::Build(const ShardPlan& plan, HeadsView<const void> q,
                                                     HeadsView<const void> k,
                                                     std::span<const HeadPattern> patterns,
                                                     const RotaryParams& query_rotary,
                                                     const std::function<bool()>& should_stop) {
  absl::Status ready = Check(plan, patterns);
  // Of patterns that did not pass only their number is looked at.
  const std::span<const HeadPattern> checked = ready.ok() ? patterns : std::span<const HeadPattern>();
  const std::vector<Selectors> chunks = SelectorsOf(backend_->kernels(), plan, geometry_, checked);
  Buffer scratch;
  if (ready.ok()) ready = AllocateStorage(plan, patterns);
  if (ready.ok()) {
    absl::StatusOr<Buffer> taken =
        backend_->memory().Allocate(MostScratchBytes(chunks, world_->rank()), "scratch of the sparse index");
    ready = taken.status();
    if (taken.ok()) scratch = *std::move(taken);
  }
  CpuStream host;
  LF_RETURN_IF_ERROR(AgreeOnStatus(*world_, ready, host));

  const auto select = [&]() -> absl::StatusOr<LayerIndex> {
    Stream& stream = backend_->stream();
    const double communication_before = world_->seconds();
    timer_.Reset();
    LayerIndex layer{.pairs = std::vector<PairCounts>(patterns.size())};
    for (size_t chunk = 0; chunk < chunks.size(); ++chunk) {
      const IndexStorage& storage = storage_[chunk];
      LF_RETURN_IF_ERROR(timer_.Begin(stream));
      LF_RETURN_IF_ERROR(storage.ZeroReport(*backend_));
      const SelectionContext context{*backend_, *world_, coverage_,    scratch.data(),
                                     storage,   report_, query_rotary, should_stop};
      LF_RETURN_IF_ERROR(chunks[chunk].lines.Select(context, q, k));
      LF_RETURN_IF_ERROR(chunks[chunk].blocks.Select(context, q, k));
      LF_RETURN_IF_ERROR(chunks[chunk].shares.Select(context, q, k));
      if (world_->size() > 1) LF_RETURN_IF_ERROR(JoinPairCounts(storage));
      LF_RETURN_IF_ERROR(timer_.End(stream));
      LF_RETURN_IF_ERROR(report_.Fetch(*backend_, storage));
      LF_RETURN_IF_ERROR(chunks[chunk].lines.Check(report_));
      layer.heads.insert(layer.heads.end(), storage.views().begin(), storage.views().end());
      AddPairs(patterns, storage, chunks[chunk].scope, &layer.pairs);
    }
    LF_ASSIGN_OR_RETURN(layer.seconds, timer_.Seconds());
    layer.communication_seconds = world_->seconds() - communication_before;
    return layer;
  };
  absl::StatusOr<LayerIndex> layer = select();
  if (!layer.ok()) {
    internal::AbortGroup(*world_, layer.status());
    return layer;
  }
  // The same on all ranks, which are through with their exchanges. Block-share heads are of one chunk.
  LF_RETURN_IF_ERROR(chunks.back().shares.Check(report_));
  return layer;
}

// One for each chunk; those that stay keep what they can.
absl::Status SparseIndexBuilder::AllocateStorage(const ShardPlan& plan,
                                                 std::span<const HeadPattern> patterns) {
  const DualChunk& dual_chunk = geometry_.dual_chunk;
  storage_.resize(static_cast<size_t>(dual_chunk.NumChunks(plan.num_tokens())));
  for (size_t chunk = 0; chunk < storage_.size(); ++chunk) {
    const int64_t num_tokens = dual_chunk.Tokens(static_cast<int64_t>(chunk), plan.num_tokens()).end;
    LF_RETURN_IF_ERROR(storage_[chunk].Allocate(*backend_, num_tokens, coverage_, patterns));
  }
  return absl::OkStatus();
}

// Each head was counted by one rank.
absl::Status SparseIndexBuilder::JoinPairCounts(const IndexStorage& storage) {
  const int64_t numbers =
      2 * geometry_.num_q_heads * static_cast<int64_t>(sizeof(PairCounts) / sizeof(int64_t));
  return world_->AllReduce(storage.covered(), numbers, ReduceType::kInt64, ReduceOp::kSum,
                           backend_->stream());
}

// Those of the rows that the index is for.
void SparseIndexBuilder::AddPairs(std::span<const HeadPattern> patterns, const IndexStorage& storage,
                                  const SelectionScope& scope, std::vector<PairCounts>* pairs) const {
  for (size_t h = 0; h < patterns.size() && scope.num_keys() > 0; ++h) {
    PairCounts& sum = (*pairs)[h];
    const PairCounts& covered = report_.covered(h);
    if (std::holds_alternative<VerticalSlash>(patterns[h])) {
      const PairCounts& before = report_.published(h);  // of the rows before the chunk
      sum.published += covered.published - before.published;
      sum.covered += covered.covered - before.covered;
    } else if (std::holds_alternative<BlockShare>(patterns[h])) {
      sum = covered;
    } else if (std::holds_alternative<BlockSparse>(patterns[h])) {
      sum = {.published = report_.published(h).covered, .covered = covered.covered};
    } else {
      sum = storage.static_pairs(h);  // of all rows so far, whose index is the same
    }
  }
}

}  // namespace longfill
