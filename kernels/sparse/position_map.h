#ifndef LONGFILL_KERNELS_SPARSE_POSITION_MAP_H_
#define LONGFILL_KERNELS_SPARSE_POSITION_MAP_H_

#include <cstdint>

namespace longfill {

// Where the rows of a local buffer lie in the sequence: row r is token first + (r / block) * stride + r %
// block. A contiguous piece is {offset, rows, rows}; rank p of P of a sequence dealt in blocks of 128 is {128
// p, 128, 128 P}. Positions ascend with the row: block >= 1, stride >= block, first >= 0.
struct PositionMap {
  int64_t first = 0;
  int64_t block = int64_t{1} << 40;
  int64_t stride = int64_t{1} << 40;

  constexpr int64_t Position(int64_t row) const { return first + row / block * stride + row % block; }
  // Rows (a prefix of the buffer) whose position is below `position`.
  constexpr int64_t RowsBelow(int64_t position) const {
    if (position <= first) return 0;
    const int64_t whole = (position - first) / stride;
    const int64_t rest = (position - first) % stride;
    return whole * block + (rest < block ? rest : block);
  }
  static constexpr PositionMap Contiguous(int64_t offset) {
    return {offset, int64_t{1} << 40, int64_t{1} << 40};
  }
  friend bool operator==(const PositionMap&, const PositionMap&) = default;
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_SPARSE_POSITION_MAP_H_
