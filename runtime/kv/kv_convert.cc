#include "runtime/kv/kv_convert.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace longfill {
namespace {

// `count` elements that lie one behind the other.
void Convert(const void* from, DType from_dtype, int64_t count, DType to_dtype, void* to) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, static_cast<size_t>(count * DTypeBytes(to_dtype)));
    return;
  }
  if (from_dtype == DType::kFloat32) {
    NarrowFromFloat(static_cast<const float*>(from), count, to_dtype, to);
    return;
  }
  if (to_dtype == DType::kFloat32) {
    WidenToFloat(from, from_dtype, count, static_cast<float*>(to));
    return;
  }
  std::array<float, 1024> wide;  // stays in the nearest cache
  constexpr auto kPiece = static_cast<int64_t>(wide.size());
  for (int64_t done = 0; done < count; done += kPiece) {
    const int64_t piece = std::min(kPiece, count - done);
    WidenToFloat(Advance(from, done, from_dtype), from_dtype, piece, wide.data());
    NarrowFromFloat(wide.data(), piece, to_dtype, Advance(to, done, to_dtype));
  }
}

}  // namespace

void ConvertHeadRows(HeadsView<const void> from, DType from_dtype, int64_t head, int64_t num_rows,
                     int64_t head_dim, DType to_dtype, void* to) {
  if (num_rows == 0) return;  // `to` may be nullptr
  const void* source = Advance(from.data, head * from.head_stride, from_dtype);
  if (from.row_stride == head_dim) {
    Convert(source, from_dtype, num_rows * head_dim, to_dtype, to);
    return;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    Convert(Advance(source, row * from.row_stride, from_dtype), from_dtype, head_dim, to_dtype,
            Advance(to, row * head_dim, to_dtype));
  }
}

}  // namespace longfill
