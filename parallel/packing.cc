#include "parallel/packing.h"

namespace longfill {

absl::Status CopyBlocks(const CopyFunction& copy, void* to, int64_t to_pitch, const void* from,
                        int64_t from_pitch, int64_t block_bytes, int64_t bytes, const CopyPlanes& planes) {
  const int64_t whole = block_bytes > 0 ? bytes / block_bytes : 0;
  const int64_t rest = bytes - whole * block_bytes;
  Copy2DParams params{.to = to,
                      .to_pitch = to_pitch,
                      .from = from,
                      .from_pitch = from_pitch,
                      .row_bytes = block_bytes,
                      .rows = whole,
                      .planes = planes.count,
                      .to_plane_pitch = planes.to_pitch,
                      .from_plane_pitch = planes.from_pitch};
  if (whole > 0) LF_RETURN_IF_ERROR(copy(params));
  if (rest == 0) return absl::OkStatus();
  params.to = static_cast<char*>(to) + whole * to_pitch;
  params.from = static_cast<const char*>(from) + whole * from_pitch;
  params.to_pitch = params.from_pitch = params.row_bytes = rest;
  params.rows = 1;
  return copy(params);
}

absl::Status CopyBlocks(KernelSet& kernels, void* to, int64_t to_pitch, const void* from, int64_t from_pitch,
                        int64_t block_bytes, int64_t bytes, Stream& stream) {
  const auto copy = [&](const Copy2DParams& params) { return kernels.Copy2D(params, stream); };
  return CopyBlocks(copy, to, to_pitch, from, from_pitch, block_bytes, bytes);
}

absl::Status CopyToPlaces(const CopyFunction& copy, void* to, const PositionMap& places, const void* from,
                          int64_t row_bytes, int64_t bytes, const CopyPlanes& planes) {
  const auto place = [&](int64_t row) { return static_cast<char*>(to) + places.Position(row) * row_bytes; };
  if (places.IsOnePiece(bytes / row_bytes)) {
    return CopyBlocks(copy, place(0), bytes, from, bytes, bytes, bytes, planes);
  }
  LF_CHECK(places.skipped % places.block == 0);
  const int64_t block_bytes = places.block * row_bytes;
  const int64_t pitch = places.stride * row_bytes;
  if (places.odd_shift == 0) {
    return CopyBlocks(copy, place(0), pitch, from, block_bytes, block_bytes, bytes, planes);
  }
  // Every other block is at one distance from the next but one.
  const int64_t num_blocks = (bytes + block_bytes - 1) / block_bytes;
  for (int64_t first = 0; first < 2; ++first) {
    const bool has_last = (num_blocks - 1) % 2 == first;
    const int64_t whole_bytes = (num_blocks + 1 - first) / 2 * block_bytes;
    LF_RETURN_IF_ERROR(CopyBlocks(copy, place(first * places.block), 2 * pitch,
                                  static_cast<const char*>(from) + first * block_bytes, 2 * block_bytes,
                                  block_bytes,
                                  whole_bytes - (has_last ? num_blocks * block_bytes - bytes : 0), planes));
  }
  return absl::OkStatus();
}

absl::Status CopyToPlaces(KernelSet& kernels, void* to, const PositionMap& places, const void* from,
                          int64_t row_bytes, int64_t bytes, Stream& stream, const CopyPlanes& planes) {
  const auto copy = [&](const Copy2DParams& params) { return kernels.Copy2D(params, stream); };
  return CopyToPlaces(copy, to, places, from, row_bytes, bytes, planes);
}

absl::StatusOr<char*> PackHeads(KernelSet& kernels, HeadsView<const void> from,
                                std::span<const int32_t> heads, const TokenRange& rows, int64_t width,
                                char* to, Stream& stream) {
  const int64_t num_rows = rows.end - rows.begin;
  if (num_rows == 0) return to;  // a rank without tokens may have no buffer to copy from
  const DType dtype = kernels.compute_dtype();
  const int64_t head_bytes = num_rows * width * DTypeBytes(dtype);
  const auto start_of = [&](int32_t head) {
    return Advance(from.data, head * from.head_stride + rows.begin * from.row_stride, dtype);
  };
  size_t next = 0;
  while (next < heads.size()) {
    if (from.row_stride != width) {
      LF_RETURN_IF_ERROR(kernels.Copy2D({.to = to,
                                         .to_pitch = width * DTypeBytes(dtype),
                                         .from = start_of(heads[next]),
                                         .from_pitch = from.row_stride * DTypeBytes(dtype),
                                         .row_bytes = width * DTypeBytes(dtype),
                                         .rows = num_rows},
                                        stream));
      to += head_bytes;
      ++next;
      continue;
    }
    size_t end = next + 1;  // neighbours go together
    while (end < heads.size() && heads[end] == heads[end - 1] + 1) ++end;
    const int64_t count = static_cast<int64_t>(end - next);
    LF_RETURN_IF_ERROR(kernels.Copy2D({.to = to,
                                       .to_pitch = head_bytes,
                                       .from = start_of(heads[next]),
                                       .from_pitch = from.head_stride * DTypeBytes(dtype),
                                       .row_bytes = head_bytes,
                                       .rows = count},
                                      stream));
    to += count * head_bytes;
    next = end;
  }
  return to;
}

}  // namespace longfill
