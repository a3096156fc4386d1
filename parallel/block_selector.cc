#include "parallel/block_selector.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace longfill {
namespace {

constexpr int64_t kFloat = sizeof(float);

int64_t RowBlocksOf(int64_t tokens) { return (tokens + kRowBlock - 1) / kRowBlock; }

// Row block m has m + 1 causal key blocks.
int64_t ListLength(int64_t num_blocks, int64_t row_block) { return std::min(num_blocks, row_block + 1); }

}  // namespace

BlockSelector::BlockSelector(KernelSet& kernels, Communicator& world, const ShardPlan& plan,
                             const AttentionGeometry& geometry, Coverage coverage,
                             std::span<const HeadPattern> patterns)
    : kernels_(kernels),
      world_(world),
      plan_(plan),
      geometry_(geometry),
      coverage_(coverage),
      patterns_(patterns) {
  num_row_blocks_ = RowBlocksOf(plan.num_tokens());
  for (const HeadPattern& pattern : patterns) {
    if (const BlockSparse* blocks = std::get_if<BlockSparse>(&pattern)) {
      max_blocks_ = std::max(max_blocks_, std::min(blocks->num_blocks, num_row_blocks_));
    }
  }
  if (max_blocks_ > 0) row_blocks_ = RowBlocks(world.rank());
}

std::vector<int32_t> BlockSelector::RowBlocks(int rank) const {
  std::vector<int32_t> blocks;
  for (const TokenRange& range : plan_.TokenRanges(rank)) {
    for (int64_t m = range.begin / kRowBlock; m < RowBlocksOf(range.end); ++m) {
      blocks.push_back(static_cast<int32_t>(m));
    }
  }
  return blocks;
}

BlockSelector::Sizes BlockSelector::BytesFor(int64_t local_tokens) const {
  if (max_blocks_ == 0) return {};
  const int64_t own = RowBlocksOf(local_tokens);
  Sizes sizes;
  sizes.pooled = own * geometry_.head_dim * kFloat;
  sizes.pooled_all = num_row_blocks_ * geometry_.head_dim * kFloat;
  sizes.selected = own * max_blocks_ * static_cast<int64_t>(sizeof(int32_t));
  return sizes;
}

int64_t BlockSelector::PlanBytes() const {
  const Sizes s = BytesFor(plan_.NumTokens(0));  // rank 0 has slot 0
  return s.pooled + 2 * s.pooled_all + s.selected;
}

absl::Status BlockSelector::Allocate() {
  const Sizes s = BytesFor(plan_.NumTokens(world_.rank()));
  MemoryResource& memory = kernels_.memory();
  LF_ASSIGN_OR_RETURN(pooled_, memory.Allocate(s.pooled, "own block means"));
  LF_ASSIGN_OR_RETURN(pooled_keys_, memory.Allocate(s.pooled_all, "mean keys"));
  LF_ASSIGN_OR_RETURN(pooled_staging_, memory.Allocate(s.pooled_all, "mean keys received"));
  LF_ASSIGN_OR_RETURN(selected_, memory.Allocate(s.selected, "selected key blocks"));
  return absl::OkStatus();
}

// Mean keys of one KV head, of all blocks in order, on all ranks.
absl::Status BlockSelector::GatherPooledKeys(HeadsView<const float> k, int64_t kv_head, Stream& stream) {
  const int64_t width = geometry_.head_dim;
  PoolParams pool;
  pool.x = {k.data + kv_head * k.head_stride, k.head_stride, k.row_stride};
  pool.num_heads = 1;
  pool.num_rows = plan_.NumTokens(world_.rank());
  pool.head_dim = width;
  pool.out = pooled_.as<float>();
  LF_RETURN_IF_ERROR(kernels_.Pool(pool, stream));
  std::vector<int64_t> counts_bytes(world_.size());
  for (int r = 0; r < world_.size(); ++r) counts_bytes[r] = RowBlocksOf(plan_.NumTokens(r)) * width * kFloat;
  LF_RETURN_IF_ERROR(world_.AllGather(pooled_.data(), pooled_staging_.data(), counts_bytes, stream));
  LF_RETURN_IF_ERROR(stream.Sync());
  const float* from = pooled_staging_.as<float>();
  for (int r = 0; r < world_.size(); ++r) {
    for (const int32_t m : RowBlocks(r)) {
      std::memcpy(pooled_keys_.as<float>() + m * width, from, static_cast<size_t>(width * kFloat));
      from += width;
    }
  }
  return absl::OkStatus();
}

// selected_ [own row blocks, num_blocks] for the head whose mean queries are in pooled_.
absl::Status BlockSelector::SelectOwn(int64_t num_blocks, bool force, Stream& stream) {
  SelectBlocksParams params;
  params.pooled_q = pooled_.as<float>();
  params.row_blocks = row_blocks_;
  params.pooled_k = pooled_keys_.as<float>();
  params.num_key_blocks = num_row_blocks_;
  params.head_dim = geometry_.head_dim;
  params.num_blocks = num_blocks;
  params.force = force;
  params.selected = selected_.as<int32_t>();
  LF_RETURN_IF_ERROR(kernels_.SelectBlocks(params, stream));
  return stream.Sync();
}

int64_t BlockSelector::CountOwnPairs(int64_t num_blocks) const {
  int64_t pairs = 0;
  for (size_t i = 0; i < row_blocks_.size(); ++i) {
    const int64_t m = row_blocks_[i];
    const int64_t rows = std::min(kRowBlock, plan_.num_tokens() - m * kRowBlock);
    const int32_t* list = selected_.as<int32_t>() + static_cast<int64_t>(i) * num_blocks;
    for (int64_t e = 0; e < ListLength(num_blocks, m); ++e) {
      pairs += list[e] < m ? rows * kRowBlock : rows * (rows + 1) / 2;
    }
  }
  return pairs;
}

absl::Status BlockSelector::GatherLists(int64_t num_blocks, BlockListIndex* index, Stream& stream) {
  std::vector<int32_t> mine;
  for (size_t i = 0; i < row_blocks_.size(); ++i) {
    const int32_t* list = selected_.as<int32_t>() + static_cast<int64_t>(i) * num_blocks;
    mine.insert(mine.end(), list, list + ListLength(num_blocks, row_blocks_[i]));
  }
  index->row_offsets.resize(static_cast<size_t>(num_row_blocks_) + 1);
  for (int64_t m = 0; m < num_row_blocks_; ++m) {
    index->row_offsets[m + 1] = index->row_offsets[m] + ListLength(num_blocks, m);
  }
  std::vector<int64_t> counts_bytes(world_.size());
  for (int r = 0; r < world_.size(); ++r) {
    for (const int32_t m : RowBlocks(r)) {
      counts_bytes[r] += ListLength(num_blocks, m) * static_cast<int64_t>(sizeof(int32_t));
    }
  }
  std::vector<int32_t> gathered(static_cast<size_t>(index->row_offsets.back()));
  LF_RETURN_IF_ERROR(world_.AllGather(mine.data(), gathered.data(), counts_bytes, stream));
  LF_RETURN_IF_ERROR(stream.Sync());
  index->key_blocks.resize(gathered.size());
  auto from = gathered.cbegin();
  for (int r = 0; r < world_.size(); ++r) {
    for (const int32_t m : RowBlocks(r)) {
      const int64_t length = ListLength(num_blocks, m);
      std::copy(from, from + length, index->key_blocks.begin() + index->row_offsets[m]);
      from += length;
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<BlockListIndex>> BlockSelector::Select(HeadsView<const float> q,
                                                                  HeadsView<const float> k, Stream& stream) {
  std::vector<BlockListIndex> result(patterns_.size());
  if (max_blocks_ == 0) return result;
  std::vector<int64_t> published(patterns_.size());
  int64_t pooled_kv_head = -1;
  for (size_t h = 0; h < patterns_.size(); ++h) {
    const BlockSparse* pattern = std::get_if<BlockSparse>(&patterns_[h]);
    if (pattern == nullptr) continue;
    const int64_t head = static_cast<int64_t>(h);
    if (const int64_t kv_head = head / geometry_.q_per_kv(); kv_head != pooled_kv_head) {
      LF_RETURN_IF_ERROR(GatherPooledKeys(k, kv_head, stream));
      pooled_kv_head = kv_head;
    }
    PoolParams pool;
    pool.x = {q.data + head * q.head_stride, q.head_stride, q.row_stride};
    pool.num_heads = 1;
    pool.num_rows = plan_.NumTokens(world_.rank());
    pool.head_dim = geometry_.head_dim;
    pool.out = pooled_.as<float>();
    LF_RETURN_IF_ERROR(kernels_.Pool(pool, stream));
    const int64_t num_blocks = std::min(pattern->num_blocks, num_row_blocks_);
    LF_RETURN_IF_ERROR(SelectOwn(num_blocks, /*force=*/false, stream));
    published[h] = CountOwnPairs(num_blocks);
    if (coverage_ == Coverage::kTiles) LF_RETURN_IF_ERROR(SelectOwn(num_blocks, /*force=*/true, stream));
    LF_RETURN_IF_ERROR(GatherLists(num_blocks, &result[h], stream));
  }
  LF_RETURN_IF_ERROR(world_.AllReduce(published.data(), static_cast<int64_t>(published.size()),
                                      ReduceType::kInt64, ReduceOp::kSum, stream));
  for (size_t h = 0; h < patterns_.size(); ++h) result[h].published_pairs = published[h];
  return result;
}

}  // namespace longfill
