#include "parallel/block_selector.h"

#include <algorithm>

#include "kernels/base/piece_layout.h"
#include "parallel/packing.h"

namespace longfill {
namespace {

constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kId = sizeof(int32_t);

}  // namespace

BlockSelector::BlockSelector(const KernelSet& kernels, const ShardPlan& plan,
                             const AttentionGeometry& geometry, std::span<const HeadPattern> patterns)
    : kernels_(kernels), plan_(plan), geometry_(geometry), num_row_blocks_(RowBlocksOf(plan.num_tokens())) {
  for (size_t h = 0; h < patterns.size() && plan.num_tokens() > 0; ++h) {
    if (const auto* blocks = std::get_if<BlockSparse>(&patterns[h])) {
      heads_.push_back(static_cast<int32_t>(h));
      row_lengths_.push_back(RowLength(*blocks, plan.num_tokens()));
    }
  }
}

BlockSelector::Scratch BlockSelector::ScratchFor(int64_t local_tokens) const {
  Scratch at;
  if (heads_.empty()) return at;
  const int64_t own = RowBlocksOf(local_tokens);
  const int64_t row_bytes = *std::max_element(row_lengths_.begin(), row_lengths_.end()) * kId;
  const int64_t mean_bytes = geometry_.head_dim * kFloat;
  PieceLayout pieces;
  at.pooled_q = pieces.Add(own * mean_bytes);
  at.pooled_k = pieces.Add(num_row_blocks_ * mean_bytes);
  at.published = pieces.Add(num_row_blocks_ * row_bytes);
  if (plan_.mesh().size() > 1) {
    at.own = pieces.Add(own * std::max(row_bytes, mean_bytes));
    at.gathered = pieces.Add(num_row_blocks_ * std::max(row_bytes, mean_bytes));
  }
  at.workspace_bytes = std::max(kernels_.SelectBlocksWorkspaceBytes(own, num_row_blocks_, geometry_.head_dim),
                                kernels_.CountPairsWorkspaceBytes(1, plan_.num_tokens()));
  at.workspace = pieces.Add(at.workspace_bytes);
  at.total_bytes = pieces.total_bytes();
  return at;
}

int64_t BlockSelector::ScratchBytes(int rank) const { return ScratchFor(plan_.NumTokens(rank)).total_bytes; }

// The block-sparse heads of a layer, on one rank.
class BlockSelector::Selection {
 public:
  Selection(const BlockSelector& selector, const SelectionContext& context)
      : selector_(selector),
        context_(context),
        kernels_(context.kernels()),
        stream_(context.stream()),
        world_(context.world),
        plan_(selector.plan_),
        several_ranks_(context.world.size() > 1),
        local_tokens_(plan_.NumTokens(world_.rank())),
        at_(selector.ScratchFor(local_tokens_)) {}

  absl::Status Run(size_t i, HeadsView<const void> q, HeadsView<const void> k) {
    const int32_t head = selector_.heads_[i];
    if (const int64_t kv_head = head / selector_.geometry_.q_per_kv(); kv_head != pooled_kv_head_) {
      LF_RETURN_IF_ERROR(PoolKeys(k, kv_head));
      pooled_kv_head_ = kv_head;
    }
    LF_RETURN_IF_ERROR(Pool(q, head, Piece<float>(at_.pooled_q)));
    const int64_t row_length = selector_.row_lengths_[i];
    int32_t* const lists = context_.storage.key_blocks(head);
    const bool counts_here = static_cast<int>(i % world_.size()) == world_.rank();
    const bool tiles = context_.coverage == Coverage::kTiles;
    int32_t* const published = tiles ? Piece<int32_t>(at_.published) : lists;
    LF_RETURN_IF_ERROR(SelectAll(row_length, /*force=*/false, published));
    if (counts_here) LF_RETURN_IF_ERROR(Count(published, row_length, context_.storage.published() + head));
    if (tiles) LF_RETURN_IF_ERROR(SelectAll(row_length, /*force=*/true, lists));
    if (!counts_here) return absl::OkStatus();
    return Count(lists, row_length, context_.storage.covered() + head);
  }

 private:
  template <typename T>
  T* Piece(int64_t offset) const {
    return PieceAt<T>(context_.scratch, offset);
  }
  Workspace workspace() const { return {Piece<char>(at_.workspace), at_.workspace_bytes}; }

  // Means of this rank's row blocks of one head.
  absl::Status Pool(HeadsView<const void> x, int64_t head, float* out) {
    PoolParams params;
    params.x = {Advance(x.data, head * x.head_stride, kernels_.compute_dtype()), x.head_stride, x.row_stride};
    params.num_heads = 1;
    params.num_rows = local_tokens_;
    params.head_dim = selector_.geometry_.head_dim;
    params.out = out;
    return kernels_.Pool(params, stream_);
  }

  // Mean keys of one KV head, of all blocks in order, on all ranks.
  absl::Status PoolKeys(HeadsView<const void> k, int64_t kv_head) {
    float* const means = Piece<float>(at_.pooled_k);
    if (!several_ranks_) return Pool(k, kv_head, means);
    LF_RETURN_IF_ERROR(Pool(k, kv_head, Piece<float>(at_.own)));
    return GatherRows(selector_.geometry_.head_dim * kFloat, means);
  }

  // lists [row blocks of the prompt, row_length] on all ranks, for the head whose mean queries are pooled.
  absl::Status SelectAll(int64_t row_length, bool force, int32_t* lists) {
    SelectBlocksParams params;
    params.pooled_q = Piece<float>(at_.pooled_q);
    params.positions = plan_.TokenPositions(world_.rank());
    params.num_row_blocks = RowBlocksOf(local_tokens_);
    params.pooled_k = Piece<float>(at_.pooled_k);
    params.num_key_blocks = selector_.num_row_blocks_;
    params.head_dim = selector_.geometry_.head_dim;
    params.num_blocks = row_length;
    params.force = force;
    params.selected = several_ranks_ ? Piece<int32_t>(at_.own) : lists;
    LF_RETURN_IF_ERROR(kernels_.SelectBlocks(params, workspace(), stream_));
    return several_ranks_ ? GatherRows(row_length * kId, lists) : absl::OkStatus();
  }

  // One row for each row block: this rank's in at_.own, all ranks' to `to`, in the order of the prompt.
  absl::Status GatherRows(int64_t row_bytes, void* to) {
    const int size = world_.size();
    std::vector<int64_t> counts_bytes(size);
    for (int r = 0; r < size; ++r) counts_bytes[r] = RowBlocksOf(plan_.NumTokens(r)) * row_bytes;
    LF_RETURN_IF_ERROR(
        world_.AllGather(Piece<void>(at_.own), Piece<void>(at_.gathered), counts_bytes, stream_));
    const char* from = Piece<char>(at_.gathered);
    for (int r = 0; r < size; ++r) {
      LF_RETURN_IF_ERROR(CopyToPlaces(kernels_, to, plan_.TokenPositions(r).OfBlocks(kRowBlock), from,
                                      row_bytes, counts_bytes[r], stream_));
      from += counts_bytes[r];
    }
    return absl::OkStatus();
  }

  absl::Status Count(const int32_t* lists, int64_t row_length, PairCounts* counts) {
    const IndexView view{.form = IndexView::Form::kBlockList, .key_blocks = lists, .row_length = row_length};
    return kernels_.CountPairs({.indices = {&view, 1}, .num_tokens = plan_.num_tokens(), .counts = counts},
                               workspace(), stream_);
  }

  const BlockSelector& selector_;
  const SelectionContext& context_;
  KernelSet& kernels_;
  Stream& stream_;
  Communicator& world_;
  const ShardPlan& plan_;
  const bool several_ranks_;
  const int64_t local_tokens_;
  const BlockSelector::Scratch at_;
  int64_t pooled_kv_head_ = -1;
};

absl::Status BlockSelector::Select(const SelectionContext& context, HeadsView<const void> q,
                                   HeadsView<const void> k) const {
  Selection selection(*this, context);
  for (size_t i = 0; i < heads_.size(); ++i) LF_RETURN_IF_ERROR(selection.Run(i, q, k));
  return absl::OkStatus();
}

}  // namespace longfill
