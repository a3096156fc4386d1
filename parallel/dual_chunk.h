#ifndef LONGFILL_PARALLEL_DUAL_CHUNK_H_
#define LONGFILL_PARALLEL_DUAL_CHUNK_H_

// Dual chunk attention (arXiv 2402.17463) as Qwen2.5-1M is served with it (arXiv 2501.15383): attention with
// rotary positions that stay near those of the training. Pure arithmetic, and the rotation of queries.
//
// With L = chunk_len the token at position p is token r = p mod L of chunk p / L. Its key is rotated at r,
// whoever asks for it. A query is rotated anew for each part of the keys, so that the distance that the
// product sees is
//   intra  the keys of its own chunk       at r                        the true one
//   succ   those of the chunk before       at min(r + L, chunk_size)   the true one, unless capped
//   inter  those of all chunks before that at min(2 L - 1, chunk_size) of the key alone
// The paper caps at chunk_size - 1; the cap here is what the checkpoints are served with. Attention over all
// keys is the softmax over the three parts together.
//
// Selections (vertical-slash) ask with critical positions, which keep diagonals straight: succ without the
// cap, inter at r + chunk_size.

#include <cstdint>
#include <span>
#include <string_view>

#include "kernels/api/kernel_set.h"
#include "kernels/base/status.h"
#include "kernels/sparse/head_pattern.h"
#include "parallel/mesh.h"

namespace longfill {

enum class ChunkPart : uint8_t { kIntra, kSucc, kInter };
inline constexpr ChunkPart kChunkParts[] = {ChunkPart::kIntra, ChunkPart::kSucc, ChunkPart::kInter};

struct DualChunk {
  int64_t chunk_size = 0;  // 0: there is none, attention is plain
  int64_t local_size = 0;  // tokens of a chunk whose distances to the chunk before are true: [1, chunk_size)
  friend bool operator==(const DualChunk&, const DualChunk&) = default;

  int64_t chunk_len() const { return chunk_size - local_size; }
  // Whether such a prompt goes beyond the first chunk. Within it attention is plain.
  bool Splits(int64_t num_tokens) const { return chunk_size > 0 && num_tokens > chunk_len(); }
  int64_t NumChunks(int64_t num_tokens) const {  // at least 1
    return Splits(num_tokens) ? (num_tokens + chunk_len() - 1) / chunk_len() : 1;
  }
  int64_t ChunkOf(int64_t position, int64_t num_tokens) const {
    return Splits(num_tokens) ? position / chunk_len() : 0;
  }
  // Tokens of a chunk of such a prompt; all of it where it is not split.
  TokenRange Tokens(int64_t chunk, int64_t num_tokens) const;
  // The keys of a part for the queries of a chunk; empty where it has none.
  TokenRange Keys(ChunkPart part, int64_t chunk, int64_t num_tokens) const;
};

// Unimplemented naming the first pattern whose selection is not defined over dual chunks, or the coverage
// where what the public kernels cover there is another thing.
absl::Status CheckDualChunkPatterns(std::span<const HeadPattern> patterns, Coverage coverage);

// Queries of one chunk.
struct ChunkQueries {
  int64_t chunk = 0;
  HeadsView<const void> rows;  // [num_heads, num_rows, head_dim], not rotated
  int64_t num_heads = 0;
  int64_t num_rows = 0;
  PositionMap positions;  // of the rows in the prompt
};

// Enqueues the rotation of queries for a part of the keys, to [num_heads, num_rows, head_dim] at `out`. Of
// `rotary` inv_freq, attention_scale, form, rotary_dim and head_dim count. `critical`: for a selection.
absl::Status RotateQueries(KernelSet& kernels, const DualChunk& dual_chunk, const RotaryParams& rotary,
                           ChunkPart part, bool critical, const ChunkQueries& queries, void* out,
                           Stream& stream);

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_DUAL_CHUNK_H_
