#ifndef LONGFILL_KERNELS_SPARSE_INDEX_VIEW_H_
#define LONGFILL_KERNELS_SPARSE_INDEX_VIEW_H_

// The index of one query head where kernels read it: pointers into the memory of a backend. It means what
// sparse_index.h says of the host form.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sparse/head_pattern.h"
#include "kernels/sparse/sparse_index.h"

namespace longfill {

// Lengths of the lists of one head; in the backend's memory, since only the device may know them.
struct IndexCounts {
  int32_t columns = 0;
  int32_t distances = 0;
  int32_t runs = 0;
  int32_t overflow = 0;  // not 0: a list did not fit, the index is not whole
  friend bool operator==(const IndexCounts&, const IndexCounts&) = default;
};

struct IndexView {
  enum class Form : uint8_t { kDiagonalColumn, kBlockList };
  Form form = Form::kDiagonalColumn;
  Coverage coverage = Coverage::kTiles;  // of a diagonal-column index

  // kDiagonalColumn: all four in the backend's memory
  const int32_t* columns = nullptr;
  const int32_t* distances = nullptr;
  const DistanceRun* runs = nullptr;
  const IndexCounts* counts = nullptr;

  // kBlockList: row block m has the key blocks key_blocks[row_offsets[m] .. row_offsets[m + 1]), or, where
  // row_offsets is nullptr, key_blocks[m * row_length + i] for i < min(row_length, m + 1).
  const int64_t* row_offsets = nullptr;
  const int32_t* key_blocks = nullptr;
  int64_t row_length = 0;
};

struct PairCounts {
  int64_t published = 0;  // causal pairs that the public MInference kernels cover for the same selection
  int64_t covered = 0;    // causal pairs that the index covers
  friend bool operator==(const PairCounts&, const PairCounts&) = default;
};

// Host indices packed into one piece of memory that can be copied to a device as it is.
class PackedIndices {
 public:
  explicit PackedIndices(std::span<const SparseIndex> indices);

  const void* data() const { return bytes_.data(); }
  int64_t size_bytes() const { return static_cast<int64_t>(bytes_.size() * sizeof(Unit)); }
  // Views into a copy of data() that starts at `base`, which is aligned to 16 bytes (data() is).
  std::vector<IndexView> Views(const void* base) const;

 private:
  struct alignas(16) Unit {
    std::byte bytes[16];
  };
  struct Place {  // byte offsets
    IndexView::Form form = IndexView::Form::kDiagonalColumn;
    Coverage coverage = Coverage::kTiles;
    int64_t first = 0, second = 0, third = 0, counts = 0;
  };
  std::vector<Unit> bytes_;
  std::vector<Place> places_;
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_INDEX_VIEW_H_
