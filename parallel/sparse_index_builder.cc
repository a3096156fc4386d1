#include "parallel/sparse_index_builder.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "parallel/block_selector.h"
#include "parallel/communicator_internal.h"
#include "parallel/vertical_slash_selector.h"

namespace longfill {
namespace {

constexpr int64_t kMaxScoredTokens = int64_t{1} << 23;  // fixed-point row sums (kernels/api/kernel_set.h)

// Pair counts cost far more than the index itself: each head is counted by one rank.
absl::StatusOr<std::vector<PairCounts>> CountPairsOverRanks(Communicator& world,
                                                            std::span<const SparseIndex> heads,
                                                            int64_t num_tokens, Stream& stream) {
  std::vector<int64_t> counts(2 * heads.size());
  for (size_t h = 0; h < heads.size(); ++h) {
    if (static_cast<int>(h % world.size()) != world.rank()) continue;
    const PairCounts pairs = CountPairs(heads[h], num_tokens);
    counts[2 * h] = pairs.published;
    counts[2 * h + 1] = pairs.covered;
  }
  LF_RETURN_IF_ERROR(world.AllReduce(counts.data(), static_cast<int64_t>(counts.size()), ReduceType::kInt64,
                                     ReduceOp::kSum, stream));
  std::vector<PairCounts> pairs(heads.size());
  for (size_t h = 0; h < heads.size(); ++h) pairs[h] = {counts[2 * h], counts[2 * h + 1]};
  return pairs;
}

SparseIndex Lower(const HeadPattern& pattern, Coverage coverage, VerticalSlashSelection vertical_slash,
                  BlockListIndex blocks) {
  struct Visitor {
    Coverage coverage;
    VerticalSlashSelection& vertical_slash;
    BlockListIndex& blocks;
    SparseIndex operator()(const Dense&) const { return MakeDenseIndex(); }
    SparseIndex operator()(const AShape& a_shape) const { return MakeAShapeIndex(a_shape); }
    SparseIndex operator()(const VerticalSlash&) const {
      if (vertical_slash.distances.empty()) return DiagonalColumnIndex{};  // of an empty prompt
      return MakeVerticalSlashIndex(std::move(vertical_slash.columns), std::move(vertical_slash.distances),
                                    coverage);
    }
    SparseIndex operator()(const BlockSparse&) const {
      if (blocks.row_offsets.empty()) blocks.row_offsets = {0};  // of an empty prompt
      return std::move(blocks);
    }
  };
  return std::visit(Visitor{coverage, vertical_slash, blocks}, pattern);
}

}  // namespace

absl::StatusOr<SparseIndexBuilder> SparseIndexBuilder::Create(KernelSet& kernels, Communicator& world,
                                                              const AttentionGeometry& geometry,
                                                              Coverage coverage) {
  LF_RETURN_IF_ERROR(Validate(geometry));
  if (kernels.device() != DeviceKind::kCpu) {
    return absl::UnimplementedError(
        absl::StrCat("sparse index: selection keys are composed on the host, not for ",
                     absl::string_view(kernels.name().data(), kernels.name().size())));
  }
  return SparseIndexBuilder(kernels, world, geometry, coverage);
}

int64_t SparseIndexBuilder::PlanBytes(KernelSet& kernels, const AttentionGeometry& geometry,
                                      const ShardPlan& plan, std::span<const HeadPattern> patterns) {
  const auto scope = SelectionScope::LastQueriesOf(plan.num_tokens());
  const std::unique_ptr<Communicator> rank_0 =
      CreateSingleCommunicator();  // holds the most tokens of every plan
  return VerticalSlashSelector(kernels, *rank_0, plan, geometry, scope, patterns).PlanBytes() +
         BlockSelector(kernels, *rank_0, plan, geometry, Coverage::kTiles, patterns).PlanBytes();
}

absl::StatusOr<LayerIndex> SparseIndexBuilder::Build(const ShardPlan& plan, HeadsView<const float> q,
                                                     HeadsView<const float> k,
                                                     std::span<const HeadPattern> patterns, Stream& stream) {
  const auto start = std::chrono::steady_clock::now();
  const double communication_before = world_->seconds();
  const auto scope = SelectionScope::LastQueriesOf(plan.num_tokens());
  const auto check = [&]() -> absl::Status {
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
  };
  VerticalSlashSelector vertical_slash(*kernels_, *world_, plan, geometry_, scope, patterns);
  BlockSelector blocks(*kernels_, *world_, plan, geometry_, coverage_, patterns);
  absl::Status ready = check();
  if (ready.ok()) ready = vertical_slash.Allocate();
  if (ready.ok()) ready = blocks.Allocate();
  LF_RETURN_IF_ERROR(AgreeOnStatus(*world_, ready, stream));

  const auto select = [&]() -> absl::StatusOr<LayerIndex> {
    LayerIndex layer;
    LF_ASSIGN_OR_RETURN(auto selections, vertical_slash.Select(q, k, stream));
    LF_ASSIGN_OR_RETURN(auto lists, blocks.Select(q, k, stream));
    for (size_t h = 0; h < patterns.size(); ++h) {
      layer.heads.push_back(Lower(patterns[h], coverage_, std::move(selections[h]), std::move(lists[h])));
      LF_RETURN_IF_ERROR(
          Annotate(ValidateIndex(layer.heads.back(), plan.num_tokens()), absl::StrCat("head ", h)));
    }
    LF_ASSIGN_OR_RETURN(layer.pairs, CountPairsOverRanks(*world_, layer.heads, plan.num_tokens(), stream));
    return layer;
  };
  absl::StatusOr<LayerIndex> layer = select();
  if (!layer.ok()) {
    internal::AbortGroup(*world_, layer.status());
    return layer;
  }
  layer->seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  layer->communication_seconds = world_->seconds() - communication_before;
  return layer;
}

}  // namespace longfill
