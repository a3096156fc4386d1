#ifndef LONGFILL_KERNELS_CPU_ORACLE_ORACLE_H_
#define LONGFILL_KERNELS_CPU_ORACLE_ORACLE_H_

// What every operation means, written from the definitions in fp64 and plain loops, for tests. Calls no
// production code and is not fast: masks are dense, [num_queries, num_keys]. All arrays are row-major and
// dense. Preconditions are the caller's business; sizes of 0 are legal. The facts followed are those of
// MInference 1.0 (arXiv 2407.02490).

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sparse/head_pattern.h"

namespace longfill::oracle {

// ---- Coverage (coverage.cc): which (query, key) pairs are computed.

struct Mask {
  int64_t num_queries = 0;
  int64_t num_keys = 0;
  std::vector<uint8_t> covered;  // [num_queries, num_keys], 0 or 1

  Mask() = default;
  Mask(int64_t queries, int64_t keys) : num_queries(queries), num_keys(keys), covered(queries * keys, 0) {}
  bool At(int64_t query, int64_t key) const { return covered[query * num_keys + key] != 0; }
  void Set(int64_t query, int64_t key) { covered[query * num_keys + key] = 1; }
  int64_t CountPairs() const;
  friend bool operator==(const Mask&, const Mask&) = default;
};

// Of a whole prompt of num_tokens; position equals row. `columns` and `distances` in any order.
Mask DenseMask(int64_t num_tokens);
Mask AShapeMask(const AShape& pattern, int64_t num_tokens);
// Places p of the 64-key pieces that cover the diagonals `distances` of a row block: the keys [64m - p, 64m -
// p + 64) of row block m. One at the largest distance; each next one 64 below, or, where no distance lies in
// these 64, at the next distance. The last may be below 0.
std::vector<int64_t> TilePieces(std::span<const int32_t> distances);
// Causal pairs whose key is in `columns` or in a piece of the row block.
Mask TilesMask(std::span<const int32_t> columns, std::span<const int32_t> distances, int64_t num_tokens);
// What the published kernels compute for the output of the published conversion.
Mask ParityMask(std::span<const int32_t> columns, std::span<const int32_t> distances, int64_t num_tokens);
// blocks[m] lists the 64-key blocks of row block m.
Mask BlockMask(const std::vector<std::vector<int32_t>>& blocks, int64_t num_tokens);

// The published conversion for one 64-row block, serial as one of its threads walks the lists.
struct PublishedTile {
  std::vector<int64_t> range_starts;  // of 64-key ranges
  std::vector<int64_t> columns;
};
PublishedTile ConvertPublished(std::span<const int32_t> columns, std::span<const int32_t> distances,
                               int64_t row_block);

// ---- Vertical-slash selection (vertical_slash.cc)

struct VerticalSlashSelection {
  // [num_tokens]: attention mass of the last min(64, num_tokens) queries, by key and by distance; forced
  // entries are not marked here.
  std::vector<double> vertical_scores;
  std::vector<double> slash_scores;
  std::vector<int32_t> columns;    // selected keys, ascending
  std::vector<int32_t> distances;  // selected distances, ascending
};
// One head; q and k [num_tokens, head_dim]. Budgets are clamped, 30 keys and 100 distances forced, ties to
// the lower.
VerticalSlashSelection SelectVerticalSlash(const float* q, const float* k, int64_t num_tokens,
                                           int64_t head_dim, double scale, const VerticalSlash& budget);

// ---- Block-sparse selection (block_sparse.cc)

struct BlockSelection {
  // [num_row_blocks][m + 1]: product of the mean query of row block m with the mean key of every block up to
  // m.
  std::vector<std::vector<double>> scores;
  std::vector<std::vector<int32_t>>
      blocks;  // [num_row_blocks]: the min(num_blocks, m + 1) selected, ascending
};
// Means over the rows that exist. `force` keeps the diagonal and block 0 within num_blocks (only the diagonal
// if 1).
BlockSelection SelectBlocks(const float* q, const float* k, int64_t num_tokens, int64_t head_dim,
                            int64_t num_blocks, bool force);

// ---- Selection by share (block_share.cc)

struct RepresentativeChoice {
  std::vector<double> means;                   // [whole blocks, head_dim]
  std::vector<double> distances;               // [64 * whole blocks]: of each key from the mean of its block
  std::vector<std::vector<int32_t>> outliers;  // [whole blocks]: keys, the farthest first, ties to the lower
};
// k [num_tokens, head_dim]; a partial last block is left out.
RepresentativeChoice ChooseRepresentatives(const float* k, int64_t num_tokens, int64_t head_dim,
                                           int64_t num_outliers);

// What stands for the key blocks of a KV head, and with two levels for its coarse blocks, of 8 key blocks.
struct Representatives {
  std::vector<double> rows;  // [count, num_tokens / 64, head_dim]
  int64_t count = 0;
  int64_t num_samples = 0;     // the first ones
  std::vector<double> coarse;  // [max(1, num_samples) + num_coarse, num_tokens / 512, head_dim]
  int64_t num_coarse = 0;      // 0: one level
  bool fp8 = false;            // they, keys and queries are rounded to E4M3, as BlockShare::fp8 has it
};
// What `coarse` is for representatives [count, num_key_blocks, head_dim] of which the first num_samples are
// samples: the mean of the first ones, or every eighth of all samples of eight blocks from the fifth on, then
// in turn the one that is farthest from it and from those chosen before, ties to the lower plane and then the
// lower block.
std::vector<double> ChooseCoarse(const std::vector<double>& rows, int64_t count, int64_t num_samples,
                                 int64_t num_key_blocks, int64_t head_dim, int64_t num_coarse);

struct ShareSelection {
  // [num_row_blocks][m]: the largest share that a row of row block m gives each block before it; 0 of a block
  // that is not open to them.
  std::vector<std::vector<double>> shares;
  // [num_row_blocks][m / 8]: that a row gives each coarse block wholly before it; empty with one level.
  std::vector<std::vector<double>> coarse_shares;
  std::vector<std::vector<int32_t>> blocks;  // [num_row_blocks]: selected, ascending
};
// One head; q and k [num_tokens, head_dim]. k is read only if there are samples. The representatives may be a
// backend's, which are rounded to its compute dtype; fp8 rounds them after that.
ShareSelection SelectByShare(const float* q, const float* k, int64_t num_tokens, int64_t head_dim,
                             const Representatives& representatives, double scale, double min_share);
// The same from the keys.
ShareSelection SelectByShare(const float* q, const float* k, int64_t num_tokens, int64_t head_dim,
                             double scale, const BlockShare& pattern);

// ---- Attention (attention.cc)

struct AttentionInput {
  const float* q = nullptr;  // [num_q_heads, num_queries, head_dim]
  const float* k = nullptr;  // [num_kv_heads, num_keys, head_dim]
  const float* v = nullptr;  // [num_kv_heads, num_keys, head_dim]
  int64_t num_q_heads =
      0;  // a multiple of num_kv_heads; head h reads KV head h / (num_q_heads / num_kv_heads)
  int64_t num_kv_heads = 0;
  int64_t num_queries = 0;
  int64_t num_keys = 0;
  int64_t head_dim = 0;
  double scale = 1;
};

template <typename T>
struct AttentionOutput {
  std::vector<T> out;  // [num_q_heads, num_queries, head_dim]; 0 where a row covers no key
  std::vector<T> lse;  // [num_q_heads, num_queries], natural log; -infinity where a row covers no key
};

// Softmax over the covered keys; masks[h] is [num_queries, num_keys].
AttentionOutput<double> Attention(const AttentionInput& input, std::span<const Mask* const> masks);
// The same in fp32 throughout: scores, maximum, exponentials and sums in the order of the keys. Its error
// against Attention() is the yardstick for fp32 kernels.
AttentionOutput<float> NaiveFloatAttention(const AttentionInput& input, std::span<const Mask* const> masks);

// ---- Everything else of a layer (elementwise.cc)

// out [num_rows, width] = table[ids[row]]; table [vocab_size, width].
std::vector<double> Embed(std::span<const int32_t> ids, const float* table, int64_t width);

// out = x / sqrt(mean(x^2) + epsilon) * weight; x [num_rows, width], weight [width].
std::vector<double> RmsNorm(const float* x, const float* weight, double epsilon, int64_t num_rows,
                            int64_t width);

// out [num_rows, out_width] = x * weight^T + bias; x [num_rows, in_width], weight [out_width, in_width], bias
// [out_width] or nullptr.
std::vector<double> Gemm(const float* x, const float* weight, const float* bias, int64_t num_rows,
                         int64_t in_width, int64_t out_width);

enum class Gate { kSilu, kGeluTanh };
// out = gate(a) * b; a and b [count].
std::vector<double> GatedActivation(const float* a, const float* b, Gate gate, int64_t count);

enum class RotaryPairs {
  kHalfSplit,    // (i, i + rotary_dim / 2)
  kInterleaved,  // (2i, 2i + 1)
};
struct RotaryInput {
  const float* x = nullptr;           // [num_rows, num_heads, head_dim]
  std::span<const double> inv_freq;   // [rotary_dim / 2]
  std::span<const int64_t> position;  // [num_rows]
  double attention_scale = 1;         // multiplies cos and sin
  RotaryPairs pairs = RotaryPairs::kHalfSplit;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
};
// out [num_heads, num_rows, head_dim]; dims from rotary_dim on are copied. Angles are rounded to fp32, as the
// models that one takes as given were trained and are decoded.
std::vector<double> Rotary(const RotaryInput& input);

// ---- Dual chunk attention (dual_chunk.cc): arXiv 2402.17463, capped as served checkpoints are

// The distance at which a query sees a key that is not after it. In chunks of length = chunk_size -
// local_size: its own chunk's at the true one; those of the chunk before from min(query % length + length,
// chunk_size); those before that from where the last query of a chunk sees the chunk before it.
int64_t DualChunkDistance(int64_t query, int64_t key, int64_t chunk_size, int64_t local_size);

struct DualChunkInput {
  AttentionInput attention;  // q and k not rotated; scores below 700 in magnitude; queries are the keys'
  std::span<const double> inv_freq;  // [rotary_dim / 2]
  RotaryPairs pairs = RotaryPairs::kHalfSplit;
  double attention_scale = 1;  // multiplies the rotated dims, which are all, of queries and of keys
  int64_t chunk_size = 0;
  int64_t local_size = 0;
};
// Score of one query and one key: the scaled product with the query rotated by `distance`.
double DualChunkScore(const DualChunkInput& input, const float* q, const float* k, int64_t distance);
// Every pair by its own distance; each query must be covered with some key.
AttentionOutput<double> DualChunkAttention(const DualChunkInput& input, std::span<const Mask* const> masks);
// SelectVerticalSlash of a chunk: by its last queries, at most 64, over all keys up to its end. They see keys
// of their own chunk and of the one before at the true distance, others at query % length + chunk_size - key
// % length.
VerticalSlashSelection SelectInDualChunk(const DualChunkInput& input, int64_t head, int64_t chunk,
                                         const VerticalSlash& budget);

}  // namespace longfill::oracle

#endif  // LONGFILL_KERNELS_CPU_ORACLE_ORACLE_H_
