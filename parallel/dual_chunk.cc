#include "parallel/dual_chunk.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

// Rows [begin, end) of all heads at positions of `positions`, where row 0 is `begin`.
absl::Status RotateRows(KernelSet& kernels, RotaryParams rotary, const ChunkQueries& queries, int64_t begin,
                        int64_t end, const PositionMap& positions, void* out, Stream& stream) {
  if (begin >= end) return absl::OkStatus();
  rotary.x_stride = queries.rows.row_stride;
  rotary.positions = positions;
  rotary.row_offset = 0;
  rotary.num_rows = end - begin;
  rotary.num_heads = 1;  // rows of a head lie together already
  rotary.head_stride = rotary.num_rows * rotary.head_dim;
  for (int64_t head = 0; head < queries.num_heads; ++head) {
    rotary.x = Advance(queries.rows.data, head * queries.rows.head_stride + begin * queries.rows.row_stride,
                       kernels.compute_dtype());
    rotary.out = Advance(out, (head * queries.num_rows + begin) * rotary.head_dim, kernels.compute_dtype());
    LF_RETURN_IF_ERROR(kernels.Rotary(rotary, stream));
  }
  return absl::OkStatus();
}

}  // namespace

TokenRange DualChunk::Tokens(int64_t chunk, int64_t num_tokens) const {
  if (!Splits(num_tokens)) return {0, num_tokens};
  return {chunk * chunk_len(), std::min(num_tokens, (chunk + 1) * chunk_len())};
}

TokenRange DualChunk::Keys(ChunkPart part, int64_t chunk, int64_t num_tokens) const {
  const TokenRange own = Tokens(chunk, num_tokens);
  const int64_t before = chunk == 0 ? 0 : own.begin - chunk_len();
  switch (part) {
    case ChunkPart::kIntra:
      return own;
    case ChunkPart::kSucc:
      return {before, own.begin};
    case ChunkPart::kInter:
      break;
  }
  return {0, before};
}

absl::Status CheckDualChunkPatterns(std::span<const HeadPattern> patterns, Coverage coverage) {
  for (const HeadPattern& pattern : patterns) {
    if (std::holds_alternative<Dense>(pattern) || std::holds_alternative<AShape>(pattern)) continue;
    if (!std::holds_alternative<VerticalSlash>(pattern)) {
      return absl::UnimplementedError(absl::StrCat(ToString(pattern),
                                                   " is not supported with dual chunk attention, only dense, "
                                                   "a-shape and vertical-slash are"));
    }
    if (coverage != Coverage::kTiles) {
      return absl::UnimplementedError(absl::StrCat("coverage ", std::string(CoverageName(coverage)),
                                                   " is not supported with dual chunk attention, only ",
                                                   std::string(CoverageName(Coverage::kTiles)), " is"));
    }
  }
  return absl::OkStatus();
}

absl::Status RotateQueries(KernelSet& kernels, const DualChunk& dual_chunk, const RotaryParams& rotary,
                           ChunkPart part, bool critical, const ChunkQueries& queries, void* out,
                           Stream& stream) {
  const int64_t chunk_len = dual_chunk.chunk_len();
  const int64_t rows = queries.num_rows;
  const int64_t chunk_begin = queries.chunk * chunk_len;
  PositionMap moving = queries.positions;
  moving.first -= chunk_begin;
  int64_t num_moving = rows;  // the rows behind them share one position
  int64_t last_position = dual_chunk.chunk_size;
  if (part == ChunkPart::kSucc) {
    moving.first += chunk_len;
    if (!critical)
      num_moving = std::min(rows, queries.positions.RowsBelow(chunk_begin + dual_chunk.local_size));
  } else if (part == ChunkPart::kInter) {
    moving.first += dual_chunk.chunk_size;
    if (!critical) num_moving = 0;
    last_position = std::min(2 * chunk_len - 1, dual_chunk.chunk_size);
  }
  LF_RETURN_IF_ERROR(RotateRows(kernels, rotary, queries, 0, num_moving, moving, out, stream));
  const PositionMap fixed = {.first = last_position, .block = 1, .stride = 0};
  return RotateRows(kernels, rotary, queries, num_moving, rows, fixed, out, stream);
}

}  // namespace longfill
