#include "kernels/sparse/referenced_blocks.h"

#include <algorithm>

#include "kernels/base/status.h"
#include "kernels/sparse/coverage.h"

namespace longfill {

ReferencedBlocks::ReferencedBlocks(int64_t num_tokens, int64_t key_block)
    : num_tokens_(num_tokens),
      key_block_(key_block),
      steps_(static_cast<size_t>((num_tokens + key_block - 1) / key_block) + 1) {}

void ReferencedBlocks::AddKeys(int64_t begin, int64_t end) {
  begin = std::max<int64_t>(begin, 0);
  if (begin >= end) return;
  ++steps_[static_cast<size_t>(begin / key_block_)];
  --steps_[static_cast<size_t>((end - 1) / key_block_) + 1];
}

void ReferencedBlocks::Add(const IndexView& index, int64_t row_begin, int64_t row_end) {
  LF_CHECK(row_begin % kRowBlock == 0 && row_end <= num_tokens_);
  LF_CHECK(row_end % kRowBlock == 0 || row_end == num_tokens_);
  if (row_begin >= row_end) return;
  if (index.form == IndexView::Form::kBlockList || index.coverage == Coverage::kParity) {
    TileKeys keys;
    for (int64_t m = row_begin / kRowBlock; m < RowBlocksOf(row_end); ++m) {
      ExpandTile(index, m, num_tokens_, &keys);
      for (const KeyRange& range : keys.ranges) AddKeys(range.begin, range.end);
      for (const int32_t column : keys.columns) AddKeys(column, column + 1);
    }
    return;
  }
  // A run is at least a row block of keys wide in every row block, and moves on by one from each to the next.
  // So for neighbouring row blocks it is one range.
  for (int32_t i = 0; i < index.counts->runs; ++i) {
    const DistanceRun& run = index.runs[i];
    const int64_t last_row = run.exact ? row_end - 1 : RowBlocksOf(row_end) * kRowBlock - 1;
    AddKeys(row_begin - run.d_hi + 1, std::min(last_row + 1 - run.d_lo, row_end));
  }
  for (int32_t i = 0; i < index.counts->columns && index.columns[i] < row_end; ++i) {
    AddKeys(index.columns[i], index.columns[i] + 1);
  }
}

std::vector<bool> ReferencedBlocks::Blocks() const {
  std::vector<bool> blocks(steps_.size() - 1);
  int64_t ranges = 0;
  for (size_t b = 0; b < blocks.size(); ++b) blocks[b] = (ranges += steps_[b]) > 0;
  return blocks;
}

}  // namespace longfill
