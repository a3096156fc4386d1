#include "kernels/cpu/copy.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/random_weights.h"
#include "kernels/cpu/workspace.h"

namespace longfill {
namespace {

constexpr int64_t kBytesPerTask = int64_t{1} << 20;
constexpr int64_t kElementsPerTask = int64_t{1} << 16;
constexpr int64_t kElementsAtOnce = 1024;

// Calls body(begin, end) for pieces of [0, size).
template <typename Body>
void ForPieces(ThreadPool& pool, int64_t size, int64_t piece, const Body& body) {
  pool.ParallelFor((size + piece - 1) / piece,
                   [&](int64_t task, int) { body(task * piece, std::min(size, (task + 1) * piece)); });
}

}  // namespace

absl::Status CpuCopy(void* to, const void* from, int64_t bytes, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("copy", "bytes", bytes, 0));
  ForPieces(pool, bytes, kBytesPerTask, [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                static_cast<size_t>(end - begin));
  });
  return absl::OkStatus();
}

absl::Status CpuCopy2D(const Copy2DParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("copy 2D", "rows", params.rows, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("copy 2D", "row_bytes", params.row_bytes, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("copy 2D", "planes", params.planes, 0));
  if (params.row_bytes == 0 || params.rows == 0) return absl::OkStatus();
  if (params.rows > 1) {
    LF_RETURN_IF_ERROR(CheckAtLeast("copy 2D", "to_pitch", params.to_pitch, params.row_bytes));
    LF_RETURN_IF_ERROR(CheckAtLeast("copy 2D", "from_pitch", params.from_pitch, 0));
  }
  const int64_t rows_per_task = std::max<int64_t>(1, kBytesPerTask / params.row_bytes);
  ForPieces(pool, params.planes * params.rows, rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t plane = i / params.rows;
      const int64_t row = i % params.rows;
      std::memcpy(
          static_cast<char*>(params.to) + plane * params.to_plane_pitch + row * params.to_pitch,
          static_cast<const char*>(params.from) + plane * params.from_plane_pitch + row * params.from_pitch,
          static_cast<size_t>(params.row_bytes));
    }
  });
  return absl::OkStatus();
}

absl::Status CpuZero(void* data, int64_t bytes, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("zero", "bytes", bytes, 0));
  ForPieces(pool, bytes, kBytesPerTask, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(data) + begin, 0, static_cast<size_t>(end - begin));
  });
  return absl::OkStatus();
}

absl::Status CpuFillRandom(const FillRandomParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("fill random", "count", params.count, 0));
  if (!IsFloat(params.dtype)) {
    return absl::UnimplementedError(
        absl::StrCat("fill random: no variant for ", std::string(DTypeName(params.dtype))));
  }
  const uint64_t start = random_weights::Start(params.seed);
  ForPieces(pool, params.count, kElementsPerTask, [&](int64_t begin, int64_t end) {
    float values[kElementsAtOnce];
    for (int64_t count = 0; begin < end; begin += count) {
      count = std::min(kElementsAtOnce, end - begin);
      for (int64_t i = 0; i < count; ++i) {
        values[i] = random_weights::Element(start, params.first + begin + i, params.stddev);
      }
      NarrowFromFloat(values, count, params.dtype, Advance(params.out, begin, params.dtype));
    }
  });
  return absl::OkStatus();
}

}  // namespace longfill
