#include "parallel/index_storage.h"

#include <algorithm>
#include <utility>

#include "kernels/base/piece_layout.h"
#include "kernels/sparse/coverage.h"

namespace longfill {
namespace {

constexpr int64_t kMinVertical = 30;
constexpr int64_t kMinSlash = 50;
constexpr int64_t kId = sizeof(int32_t);

// Runs of distances that are more than 64 apart from each other.
int64_t MaxRuns(int64_t distances, int64_t num_tokens) {
  return std::min(distances, (num_tokens + kRowBlock) / (kRowBlock + 1));
}

// The last of it is the number of entries of block-share heads.
int64_t ReportBytes(size_t num_heads) {
  return static_cast<int64_t>(num_heads *
                                  (2 * sizeof(PairCounts) + 2 * sizeof(SelectionCut) + sizeof(IndexCounts)) +
                              sizeof(int64_t));
}

bool Selects(const HeadPattern& pattern, int64_t num_tokens) {
  return num_tokens > 0 &&
         (std::holds_alternative<VerticalSlash>(pattern) || std::holds_alternative<BlockSparse>(pattern) ||
          std::holds_alternative<BlockShare>(pattern));
}

SparseIndex StaticIndex(const HeadPattern& pattern, int64_t num_tokens) {
  struct Visitor {
    int64_t num_tokens;
    SparseIndex operator()(const Dense&) const { return MakeDenseIndex(); }
    SparseIndex operator()(const AShape& a_shape) const { return MakeAShapeIndex(a_shape, num_tokens); }
    SparseIndex operator()(const VerticalSlash&) const {
      return DiagonalColumnIndex{};
    }  // of an empty prompt
    SparseIndex operator()(const BlockSparse&) const { return BlockListIndex{.row_offsets = {0}}; }
    SparseIndex operator()(const BlockShare&) const { return BlockListIndex{.row_offsets = {0}}; }
  };
  return std::visit(Visitor{num_tokens}, pattern);
}

// The different patterns that select nothing, and which of them each head has.
struct StaticPatterns {
  StaticPatterns(int64_t num_tokens, std::span<const HeadPattern> patterns) : place(patterns.size(), -1) {
    for (size_t h = 0; h < patterns.size(); ++h) {
      if (Selects(patterns[h], num_tokens)) continue;
      auto known = std::find(distinct.begin(), distinct.end(), patterns[h]);
      if (known == distinct.end()) {
        known = distinct.insert(known, patterns[h]);
        indices.push_back(StaticIndex(patterns[h], num_tokens));
      }
      place[h] = static_cast<int>(known - distinct.begin());
    }
  }
  std::vector<HeadPattern> distinct;
  std::vector<SparseIndex> indices;
  std::vector<int> place;  // [heads], -1: selects something
};

// Offsets of what the selectors write.
struct SelectedLayout {
  struct Head {
    int64_t columns = 0, distances = 0, runs = 0, key_blocks = 0;
  };
  SelectedLayout(int64_t num_tokens, std::span<const HeadPattern> patterns) : heads(patterns.size()) {
    PieceLayout pieces;
    pieces.Add(ReportBytes(patterns.size()));
    for (size_t h = 0; h < patterns.size() && num_tokens > 0; ++h) {
      if (const auto* lines = std::get_if<VerticalSlash>(&patterns[h])) {
        const VerticalSlashBudget budget(*lines, num_tokens);
        heads[h].columns = pieces.Add(budget.columns * kId);
        heads[h].distances = pieces.Add(budget.distances * kId);
        heads[h].runs =
            pieces.Add(MaxRuns(budget.distances, num_tokens) * static_cast<int64_t>(sizeof(DistanceRun)));
      } else if (const auto* blocks = std::get_if<BlockSparse>(&patterns[h])) {
        heads[h].key_blocks = pieces.Add(RowBlocksOf(num_tokens) * RowLength(*blocks, num_tokens) * kId);
      } else if (std::holds_alternative<BlockShare>(patterns[h])) {
        ++num_share_heads;
      }
    }
    if (num_share_heads > 0) {
      share_offsets =
          pieces.Add(num_share_heads * (RowBlocksOf(num_tokens) + 1) * static_cast<int64_t>(sizeof(int64_t)));
      share_blocks = pieces.Add(ShareListCapacity(num_tokens, num_share_heads) * kId);
    }
    total_bytes = pieces.total_bytes();
  }
  std::vector<Head> heads;
  int64_t num_share_heads = 0;  // with BlockShare
  int64_t share_offsets = 0, share_blocks = 0;
  int64_t total_bytes = 0;
};

}  // namespace

VerticalSlashBudget::VerticalSlashBudget(const VerticalSlash& pattern, int64_t num_keys)
    : columns(std::min(num_keys, std::max(pattern.vertical, kMinVertical))),
      distances(std::min(num_keys, std::max(pattern.slash, kMinSlash))) {}

int64_t RowLength(const BlockSparse& pattern, int64_t num_tokens) {
  return std::min(pattern.num_blocks, RowBlocksOf(num_tokens));
}

int64_t ShareListCapacity(int64_t num_tokens, int64_t num_heads) {
  const int64_t row_blocks = RowBlocksOf(num_tokens);
  return num_heads * std::min(row_blocks * (row_blocks + 1) / 2, row_blocks * kMeanShareListBlocks);
}

int64_t IndexStorage::Bytes(int64_t num_tokens, std::span<const HeadPattern> patterns) {
  return SelectedLayout(num_tokens, patterns).total_bytes +
         PackedIndices(StaticPatterns(num_tokens, patterns).indices).size_bytes();
}

void IndexStorage::DropOtherStatic(int64_t num_tokens, std::span<const HeadPattern> patterns) {
  if (static_num_tokens_ == num_tokens && std::ranges::equal(patterns, static_patterns_)) return;
  static_num_tokens_ = -1;
  static_ = Buffer();
}

absl::Status IndexStorage::PackStatic(Backend& backend, int64_t num_tokens,
                                      std::span<const HeadPattern> patterns) {
  if (static_num_tokens_ >= 0) return absl::OkStatus();
  const StaticPatterns heads(num_tokens, patterns);
  const PackedIndices packed(heads.indices);
  LF_ASSIGN_OR_RETURN(static_,
                      backend.memory().Allocate(packed.size_bytes(), "indices that nothing selects"));
  LF_RETURN_IF_ERROR(
      backend.kernels().CopyIn(static_.data(), packed.data(), packed.size_bytes(), backend.stream()));
  const std::vector<IndexView> views = packed.Views(static_.data());
  std::vector<PairCounts> pairs;
  for (const IndexView& index : packed.Views(packed.data())) pairs.push_back(CountPairs(index, num_tokens));
  static_views_.assign(patterns.size(), {});
  static_pairs_.assign(patterns.size(), {});
  for (size_t h = 0; h < patterns.size(); ++h) {
    if (heads.place[h] < 0) continue;
    static_views_[h] = views[heads.place[h]];
    static_pairs_[h] = pairs[heads.place[h]];
  }
  static_patterns_.assign(patterns.begin(), patterns.end());
  static_num_tokens_ = num_tokens;
  return absl::OkStatus();
}

absl::Status IndexStorage::Allocate(Backend& backend, int64_t num_tokens, Coverage coverage,
                                    std::span<const HeadPattern> patterns) {
  views_.clear();
  DropOtherStatic(num_tokens, patterns);  // first, so that memory never holds parts of two layers
  const SelectedLayout layout(num_tokens, patterns);
  if (selected_.size_bytes() != layout.total_bytes) {
    selected_ = Buffer();
    LF_ASSIGN_OR_RETURN(selected_, backend.memory().Allocate(layout.total_bytes, "the index of a layer"));
  }
  LF_RETURN_IF_ERROR(PackStatic(backend, num_tokens, patterns));

  void* const base = selected_.data();
  report_ = PieceAt<PairCounts>(base, 0);
  views_ = static_views_;
  buffers_.assign(patterns.size(), {});
  share_lists_ = {.row_offsets = PieceAt<int64_t>(base, layout.share_offsets),
                  .key_blocks = PieceAt<int32_t>(base, layout.share_blocks),
                  .capacity = ShareListCapacity(num_tokens, layout.num_share_heads),
                  .num_entries = PieceAt<int64_t>(base, ReportBytes(patterns.size())) - 1};
  int64_t* share_offsets = share_lists_.row_offsets;  // of the next such head
  for (size_t h = 0; h < patterns.size() && num_tokens > 0; ++h) {
    const SelectedLayout::Head& at = layout.heads[h];
    if (const auto* lines = std::get_if<VerticalSlash>(&patterns[h])) {
      const VerticalSlashBudget budget(*lines, num_tokens);
      IndexBuffers& to = buffers_[h];
      to.columns = PieceAt<int32_t>(base, at.columns);
      to.distances = PieceAt<int32_t>(base, at.distances);
      to.runs = PieceAt<DistanceRun>(base, at.runs);
      to.counts = counts() + h;
      to.column_capacity = static_cast<int32_t>(budget.columns);
      to.distance_capacity = static_cast<int32_t>(budget.distances);
      to.run_capacity = static_cast<int32_t>(MaxRuns(budget.distances, num_tokens));
      views_[h] = {.form = IndexView::Form::kDiagonalColumn,
                   .coverage = coverage,
                   .columns = to.columns,
                   .distances = to.distances,
                   .runs = to.runs,
                   .counts = to.counts};
    } else if (const auto* blocks = std::get_if<BlockSparse>(&patterns[h])) {
      views_[h] = {.form = IndexView::Form::kBlockList,
                   .key_blocks = PieceAt<int32_t>(base, at.key_blocks),
                   .row_length = RowLength(*blocks, num_tokens)};
    } else if (std::holds_alternative<BlockShare>(patterns[h])) {
      views_[h] = {.form = IndexView::Form::kBlockList,
                   .row_offsets = share_offsets,
                   .key_blocks = share_lists_.key_blocks};
      share_offsets += RowBlocksOf(num_tokens) + 1;
    }
  }
  return absl::OkStatus();
}

absl::Status IndexStorage::ZeroReport(Backend& backend) const {
  return backend.kernels().Zero(report_, ReportBytes(views_.size()), backend.stream());
}

IndexReport::IndexReport(int64_t num_heads)
    : num_heads_(static_cast<size_t>(num_heads)), words_(ReportBytes(num_heads_) / sizeof(uint64_t)) {}

absl::Status IndexReport::Fetch(Backend& backend, const IndexStorage& storage) {
  LF_RETURN_IF_ERROR(backend.stream().Sync());  // with its deadline, which a copy to pageable memory has not
  LF_RETURN_IF_ERROR(
      backend.kernels().CopyOut(words_.data(), storage.covered(), ReportBytes(num_heads_), backend.stream()));
  return backend.stream().Sync();
}

}  // namespace longfill
