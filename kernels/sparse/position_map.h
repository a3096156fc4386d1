#ifndef LONGFILL_KERNELS_SPARSE_POSITION_MAP_H_
#define LONGFILL_KERNELS_SPARSE_POSITION_MAP_H_

#include <cstdint>
#include <string>

namespace longfill {

// Where the rows of a local buffer lie in the sequence: row r of block b = r / block is token first + b *
// stride + r % block, and odd_shift further if b is odd; `skipped` rows before row 0 are left out. A
// contiguous piece is Contiguous(offset). Rank p of P of a sequence dealt in blocks of 128 has {128 p, 128,
// 128 P}; dealt there and back (to two ranks 0 1 1 0 0 1 1 0) it has {128 p, 128, 128 P, 128 (P - 1 - 2 p)}.
struct PositionMap {
  int64_t first = 0;
  int64_t block = int64_t{1} << 40;
  int64_t stride = int64_t{1} << 40;
  int64_t odd_shift = 0;
  int64_t skipped = 0;

  constexpr int64_t Position(int64_t row) const {
    const int64_t number = (row + skipped) / block;
    return first + number * stride + (number & 1) * odd_shift + (row + skipped) % block;
  }
  // Rows (a prefix of the buffer) whose position is below `position`, of a map that ascends.
  constexpr int64_t RowsBelow(int64_t position) const {
    if (position <= first) return 0;
    const int64_t pairs = (position - first) / (2 * stride);
    const int64_t beyond_even = (position - first) % (2 * stride);
    const int64_t beyond_odd = beyond_even - stride - odd_shift;
    const int64_t rows = pairs * 2 * block + (beyond_even < block ? beyond_even : block) +
                         (beyond_odd < 0       ? 0
                          : beyond_odd < block ? beyond_odd
                                               : block);
    return rows > skipped ? rows - skipped : 0;
  }
  // Of the rows from `row` on.
  constexpr PositionMap From(int64_t row) const { return {first, block, stride, odd_shift, skipped + row}; }

  // Whether no position is negative and they ascend with the row.
  constexpr bool Ascends() const {
    return first >= 0 && block >= 1 && stride >= block && odd_shift <= stride - block &&
           odd_shift >= block - stride && skipped >= 0;
  }
  // Whether its parts consist of whole blocks of `rows` rows that begin at multiples of `rows`.
  constexpr bool HasWholeBlocks(int64_t rows) const {
    return first % rows == 0 && block % rows == 0 && stride % rows == 0 && odd_shift % rows == 0 &&
           skipped % rows == 0;
  }
  // Whether the rows of each such block are together, in a buffer of num_rows.
  constexpr bool KeepsTogether(int64_t rows, int64_t num_rows) const {
    return HasWholeBlocks(rows) || (IsOnePiece(num_rows) && Position(0) % rows == 0);
  }
  // Where those blocks lie, in units of them.
  constexpr PositionMap OfBlocks(int64_t rows) const {
    return {first / rows, block / rows, stride / rows, odd_shift / rows, skipped / rows};
  }
  // Whether a buffer of so many rows is consecutive.
  constexpr bool IsOnePiece(int64_t num_rows) const { return skipped % block + num_rows <= block; }

  static constexpr PositionMap Contiguous(int64_t offset) {
    return {offset, int64_t{1} << 40, int64_t{1} << 40};
  }
  friend bool operator==(const PositionMap&, const PositionMap&) = default;
};

// "first 128, block 128, stride 512", and what else is not 0.
std::string ToString(const PositionMap& map);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_POSITION_MAP_H_
