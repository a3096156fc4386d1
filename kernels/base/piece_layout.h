#ifndef LONGFILL_KERNELS_BASE_PIECE_LAYOUT_H_
#define LONGFILL_KERNELS_BASE_PIECE_LAYOUT_H_

#include <cstdint>

#include "kernels/base/memory.h"

namespace longfill {

// Pieces of one allocation, each of which starts at a multiple of 256 bytes: first all are added, then the
// total is taken, then each is found at its offset.
class PieceLayout {
 public:
  int64_t Add(int64_t bytes) {
    const int64_t offset = total_bytes_;
    total_bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  }
  int64_t total_bytes() const { return total_bytes_; }

 private:
  static constexpr int64_t kAlignment = 256;
  int64_t total_bytes_ = 0;
};

template <typename T>
T* PieceAt(void* base, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

}  // namespace longfill

#endif  // LONGFILL_KERNELS_BASE_PIECE_LAYOUT_H_
