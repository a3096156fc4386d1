#ifndef LONGFILL_PARALLEL_INDEX_STORAGE_H_
#define LONGFILL_PARALLEL_INDEX_STORAGE_H_

// Memory of a layer's index: on the device what attention reads, on the host what is learnt of it.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/api/backend.h"
#include "kernels/sparse/head_pattern.h"
#include "kernels/sparse/index_view.h"

namespace longfill {

// Entries that a vertical-slash head selects among num_keys keys (head_pattern.h).
struct VerticalSlashBudget {
  VerticalSlashBudget(const VerticalSlash& pattern, int64_t num_keys);
  int64_t columns = 0;
  int64_t distances = 0;
};
// Key blocks that a row block of a block-sparse head keeps at most.
int64_t RowLength(const BlockSparse& pattern, int64_t num_tokens);

// Block-share heads have lists of any length, which only the device knows. So that memory is planned without
// them, the lists of a layer share one array with room for so many key blocks for each row block of each
// head, in the mean; nothing overflows up to 65,536 tokens, whatever is selected, and a density of 6 % does
// not at 1,048,576. Lists that need more are an error (share_selector.h).
inline constexpr int64_t kMeanShareListBlocks = 513;
int64_t ShareListCapacity(int64_t num_tokens, int64_t num_heads);

// Where they go, in the backend's memory.
struct ShareLists {
  int64_t* row_offsets = nullptr;  // [block-share heads, row blocks + 1]
  int32_t* key_blocks = nullptr;   // [capacity]
  int64_t capacity = 0;
  int64_t* num_entries = nullptr;  // [1], of all lists, also of what did not fit
};

// The index of a layer in a backend's memory, sized by the budgets of its patterns. Heads that select
// something are written by the selectors; those that do not (dense, A-shape, any of an empty prompt) are
// complete after Allocate, and are kept for following layers with the same ones.
class IndexStorage {
 public:
  static int64_t Bytes(int64_t num_tokens, std::span<const HeadPattern> patterns);

  // Ends all views given out. patterns [num_q_heads] have passed Validate.
  absl::Status Allocate(Backend& backend, int64_t num_tokens, Coverage coverage,
                        std::span<const HeadPattern> patterns);

  // [num_q_heads], in the backend's memory.
  const std::vector<IndexView>& views() const { return views_; }
  // Of each head that selects nothing, counted on the host.
  const PairCounts& static_pairs(size_t head) const { return static_pairs_[head]; }
  // Where a vertical-slash head goes, and where a block-sparse one: [row blocks, RowLength].
  const IndexBuffers& buffers(size_t head) const { return buffers_[head]; }
  int32_t* key_blocks(size_t head) const { return const_cast<int32_t*>(views_[head].key_blocks); }
  const ShareLists& share_lists() const { return share_lists_; }

  // What the host learns at the end, in the backend's memory. [num_q_heads] each: pairs of the index, pairs
  // of the lists that published kernels would select for block-sparse heads, list lengths of vertical-slash
  // heads. One for all: the entries of the block-share heads' lists (share_lists().num_entries).
  PairCounts* covered() const { return report_; }
  PairCounts* published() const { return report_ + views_.size(); }
  IndexCounts* counts() const { return reinterpret_cast<IndexCounts*>(cuts() + 2 * views_.size()); }
  // Two lists of each vertical-slash head, without gaps for others.
  SelectionCut* cuts() const { return reinterpret_cast<SelectionCut*>(report_ + 2 * views_.size()); }
  absl::Status ZeroReport(Backend& backend) const;

 private:
  void DropOtherStatic(int64_t num_tokens, std::span<const HeadPattern> patterns);
  absl::Status PackStatic(Backend& backend, int64_t num_tokens, std::span<const HeadPattern> patterns);

  Buffer selected_;
  std::vector<IndexView> views_;
  std::vector<IndexBuffers> buffers_;
  ShareLists share_lists_;
  PairCounts* report_ = nullptr;

  Buffer static_;
  int64_t static_num_tokens_ = -1;            // -1: static_ is of no layer
  std::vector<HeadPattern> static_patterns_;  // of the whole layer that static_ was packed for
  std::vector<IndexView> static_views_;       // [num_q_heads]
  std::vector<PairCounts> static_pairs_;
};

// A copy of that on the host.
class IndexReport {
 public:
  explicit IndexReport(int64_t num_heads);

  // Waits for the backend's main stream.
  absl::Status Fetch(Backend& backend, const IndexStorage& storage);

  const PairCounts& covered(size_t head) const { return pairs()[head]; }
  const PairCounts& published(size_t head) const { return pairs()[num_heads_ + head]; }
  const SelectionCut& cut(size_t list) const { return cuts()[list]; }
  const IndexCounts& counts(size_t head) const {
    return reinterpret_cast<const IndexCounts*>(cuts() + 2 * num_heads_)[head];
  }
  int64_t share_entries() const { return static_cast<int64_t>(words_.back()); }

 private:
  const PairCounts* pairs() const { return reinterpret_cast<const PairCounts*>(words_.data()); }
  const SelectionCut* cuts() const { return reinterpret_cast<const SelectionCut*>(pairs() + 2 * num_heads_); }

  size_t num_heads_;
  std::vector<uint64_t> words_;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_INDEX_STORAGE_H_
