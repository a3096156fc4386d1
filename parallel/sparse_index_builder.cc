#include "parallel/sparse_index_builder.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "parallel/block_selector.h"
#include "parallel/communicator_internal.h"
#include "parallel/selection_context.h"
#include "parallel/vertical_slash_selector.h"

namespace longfill {
namespace {

constexpr int64_t kMaxScoredTokens = int64_t{1} << 23;  // fixed-point row sums (kernels/api/kernel_set.h)

// The selectors of one layer. They work one after the other, so their scratch is the same memory.
struct Selectors {
  Selectors(const KernelSet& kernels, const ShardPlan& plan, const AttentionGeometry& geometry,
            std::span<const HeadPattern> patterns)
      : lines(kernels, plan, geometry, SelectionScope::LastQueriesOf(plan.num_tokens()), patterns),
        blocks(kernels, plan, geometry, patterns) {}

  int64_t ScratchBytes(int rank) const {
    return std::max(lines.ScratchBytes(rank), blocks.ScratchBytes(rank));
  }

  VerticalSlashSelector lines;
  BlockSelector blocks;
};

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

int64_t SparseIndexBuilder::IndexBytes(const ShardPlan& plan, std::span<const HeadPattern> patterns) {
  return IndexStorage::Bytes(plan.num_tokens(), patterns);
}

int64_t SparseIndexBuilder::PlanBytes(const KernelSet& kernels, const AttentionGeometry& geometry,
                                      const ShardPlan& plan, std::span<const HeadPattern> patterns) {
  return IndexBytes(plan, patterns) + Selectors(kernels, plan, geometry, patterns).ScratchBytes(0);
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
                                                     std::span<const HeadPattern> patterns) {
  absl::Status ready = Check(plan, patterns);
  // Of patterns that did not pass only their number is looked at.
  const std::span<const HeadPattern> checked = ready.ok() ? patterns : std::span<const HeadPattern>();
  const Selectors selectors(backend_->kernels(), plan, geometry_, checked);
  Buffer scratch;
  if (ready.ok()) ready = storage_.Allocate(*backend_, plan.num_tokens(), coverage_, patterns);
  if (ready.ok()) {
    absl::StatusOr<Buffer> taken =
        backend_->memory().Allocate(selectors.ScratchBytes(world_->rank()), "scratch of the sparse index");
    ready = taken.status();
    if (taken.ok()) scratch = *std::move(taken);
  }
  CpuStream host;
  LF_RETURN_IF_ERROR(AgreeOnStatus(*world_, ready, host));

  const auto select = [&]() -> absl::StatusOr<LayerIndex> {
    Stream& stream = backend_->stream();
    const double communication_before = world_->seconds();
    timer_.Reset();
    LF_RETURN_IF_ERROR(timer_.Begin(stream));
    LF_RETURN_IF_ERROR(storage_.ZeroReport(*backend_));
    const SelectionContext context{*backend_, *world_, coverage_, scratch.data(), storage_, report_};
    LF_RETURN_IF_ERROR(selectors.lines.Select(context, q, k));
    LF_RETURN_IF_ERROR(selectors.blocks.Select(context, q, k));
    if (world_->size() > 1) LF_RETURN_IF_ERROR(JoinPairCounts());
    LF_RETURN_IF_ERROR(timer_.End(stream));
    LF_RETURN_IF_ERROR(report_.Fetch(*backend_, storage_));
    LF_RETURN_IF_ERROR(selectors.lines.Check(report_));
    LayerIndex layer{.heads = storage_.views(), .pairs = PairsOf(patterns, plan.num_tokens())};
    LF_ASSIGN_OR_RETURN(layer.seconds, timer_.Seconds());
    layer.communication_seconds = world_->seconds() - communication_before;
    return layer;
  };
  absl::StatusOr<LayerIndex> layer = select();
  if (!layer.ok()) internal::AbortGroup(*world_, layer.status());
  return layer;
}

// Each head was counted by one rank.
absl::Status SparseIndexBuilder::JoinPairCounts() {
  const int64_t numbers =
      2 * geometry_.num_q_heads * static_cast<int64_t>(sizeof(PairCounts) / sizeof(int64_t));
  return world_->AllReduce(storage_.covered(), numbers, ReduceType::kInt64, ReduceOp::kSum,
                           backend_->stream());
}

std::vector<PairCounts> SparseIndexBuilder::PairsOf(std::span<const HeadPattern> patterns,
                                                    int64_t num_tokens) const {
  std::vector<PairCounts> pairs;
  for (size_t h = 0; h < patterns.size() && num_tokens > 0; ++h) {
    if (std::holds_alternative<VerticalSlash>(patterns[h])) {
      pairs.push_back(report_.covered(h));
    } else if (std::holds_alternative<BlockSparse>(patterns[h])) {
      pairs.push_back({.published = report_.published(h).covered, .covered = report_.covered(h).covered});
    } else {
      pairs.push_back(storage_.static_pairs(h));
    }
  }
  pairs.resize(patterns.size());  // an empty prompt has none
  return pairs;
}

}  // namespace longfill
