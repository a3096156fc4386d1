#ifndef LONGFILL_KERNELS_API_KERNEL_SET_H_
#define LONGFILL_KERNELS_API_KERNEL_SET_H_

// The one interface that every backend implements. Rules of every operation:
// - pointers are memory of the backend's device unless a field says host, or is a span: spans are host memory
//   that is read before the call returns; shapes are in elements, row-major, strides explicit;
// - `void` activations have compute_dtype(); memory is aligned to 16 bytes, and so is each row of a HeadsView
//   on a GPU (the CPU takes any alignment of its elements);
// - work is enqueued on `stream` in order and never synchronised, so that it can be captured in a graph; the
//   CPU backend has finished when a call returns;
// - nothing is allocated: an operation that needs scratch takes a workspace of at least its
// ...WorkspaceBytes,
//   which may be used again as soon as the call has returned, for work on the same stream;
// - what only the device knows (counts, overflow) stays there: results say so in a status word;
// - 0 rows, heads or sequences are legal and do nothing;
// - shapes that the backend has no variant for give Unimplemented naming them, broken preconditions
//   InvalidArgument. Thread-compatible: one call at a time per KernelSet, but CopyOut on a stream of its own
//   may run beside another call.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "kernels/base/dtype.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "kernels/base/stream.h"
#include "kernels/sparse/head_pattern.h"
#include "kernels/sparse/index_view.h"
#include "kernels/sparse/position_map.h"

namespace longfill {

struct Workspace {
  void* data = nullptr;
  int64_t size_bytes = 0;
};

// Deterministic pseudo-random weights: element i is stddev * (twelve uniform numbers' centred sum), drawn
// from (seed, i) alone (kernels/base/random_weights.h), so that every backend and every split of the array
// gives the same values before rounding.
struct FillRandomParams {
  void* out = nullptr;  // [count] of dtype
  DType dtype = DType::kFloat32;
  int64_t count = 0;
  float stddev = 1;
  uint64_t seed = 0;
  int64_t first = 0;  // i of out[0]
};

struct EmbedParams {
  const int32_t* ids = nullptr;  // [num_rows], each in [0, vocab_size): checked by the caller
  int64_t num_rows = 0;
  const void* table = nullptr;  // [vocab_size, width] of table_dtype
  DType table_dtype = DType::kFloat32;
  int64_t vocab_size = 0;
  int64_t width = 0;
  void* out = nullptr;  // [num_rows, width]
};

struct RmsNormParams {            // out = x / sqrt(mean(x^2) + epsilon) * weight, arXiv 1910.07467
  const void* x = nullptr;        // [num_rows, width]; may equal out
  const float* weight = nullptr;  // [width]
  float epsilon = 0;
  int64_t num_rows = 0;
  int64_t width = 0;
  void* out = nullptr;  // [num_rows, width]
};

struct GemmParams {         // out = (accumulate ? out : 0) + x * weight^T + bias, accumulated in fp32
  const void* x = nullptr;  // [num_rows, in_width], row stride x_stride
  int64_t x_stride = 0;
  const void* weight =
      nullptr;  // [out_width, in_width] of weight_dtype, as Hugging Face stores linear layers
  DType weight_dtype = DType::kFloat32;  // the CPU takes any, a GPU its compute dtype
  const void* bias = nullptr;            // [out_width] of the compute dtype, or nullptr
  int64_t num_rows = 0;
  int64_t in_width = 0;
  int64_t out_width = 0;
  bool accumulate = false;
  void* out = nullptr;                // [num_rows, out_width] of out_dtype, row stride out_stride
  DType out_dtype = DType::kFloat32;  // the compute dtype, or fp32 (logits)
  int64_t out_stride = 0;
};

enum class Activation : uint8_t { kSilu, kGeluTanh };

struct GatedActivationParams {  // out = activation(gate) * up
  const void* gate = nullptr;   // [num_rows, width], row stride in_stride
  const void* up = nullptr;     // [num_rows, width], row stride in_stride
  int64_t in_stride = 0;
  Activation activation = Activation::kSilu;
  int64_t num_rows = 0;
  int64_t width = 0;
  void* out = nullptr;  // [num_rows, width] dense; may equal gate when in_stride == width
};

enum class RotaryForm : uint8_t {
  kHalfSplit,    // pairs (i, i + rotary_dim / 2): Hugging Face Llama, Qwen, Phi-3
  kInterleaved,  // pairs (2i, 2i + 1): GLM-4
};

// Rotates the first rotary_dim of head_dim and moves rows from token-major to head-major:
// out[h][row] = scale_and_rotate(x[row][h]) with angle position * inv_freq[i]; the rest of the row is copied.
// The angle is rounded to fp32 as decoders round it (transformers, vLLM, SGLang), whose queries meet these
// keys: at position 1,048,575 an exact angle would be up to 0.03 rad from theirs. Its cosine and sine are
// exact to fp32.
struct RotaryParams {
  const void* x = nullptr;  // [num_rows, num_heads * head_dim], row stride x_stride
  int64_t x_stride = 0;
  std::span<const double> inv_freq;  // [rotary_dim / 2], at most 128
  float attention_scale = 1;         // multiplies cos and sin (YaRN, LongRoPE)
  RotaryForm form = RotaryForm::kHalfSplit;
  int64_t rotary_dim = 0;  // even, <= head_dim; 0: only moves rows (values)
  PositionMap positions;   // of row_offset + row; need not ascend: {p, 1, 0} is p for all rows
  int64_t row_offset = 0;
  int64_t num_rows = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  void* out = nullptr;  // [num_heads, head_stride / head_dim rows, head_dim], written from row_offset
  int64_t head_stride = 0;
};

// A head-major view: element (head, row, i) is data[head * head_stride + row * row_stride + i], counted in
// elements of T, or of the compute dtype where T is void.
template <typename T>
struct HeadsView {
  T* data = nullptr;
  int64_t head_stride = 0;
  int64_t row_stride = 0;

  // Typed views pass as untyped ones, mutable ones as const ones.
  operator HeadsView<const void>() const requires(!std::is_same_v<T, const void>) {
    return {data, head_stride, row_stride};
  }
  operator HeadsView<void>() const requires(!std::is_const_v<T> && !std::is_same_v<T, void>) {
    return {data, head_stride, row_stride};
  }
};

// `offset` elements of `dtype` further on.
inline const void* Advance(const void* data, int64_t offset, DType dtype) {
  return static_cast<const char*>(data) + offset * DTypeBytes(dtype);
}
inline void* Advance(void* data, int64_t offset, DType dtype) {
  return static_cast<char*>(data) + offset * DTypeBytes(dtype);
}

// One prompt, or one piece of one, inside a variable-length batch.
struct AttentionSequence {
  int64_t q_begin = 0, q_end = 0;  // rows of q, out and lse
  int64_t k_begin = 0,
          k_end = 0;  // rows of k and v; row k_begin holds key position `key_first`, the rest follow it
  int64_t key_first = 0;
  PositionMap q_positions;  // of row q - q_begin
  int64_t num_tokens = 0;   // length of the prompt that the indices describe
  // Only keys at positions [key_range_begin, key_range_end) take part; must lie within the rows given.
  int64_t key_range_begin = 0, key_range_end = 0;
  std::span<const IndexView> indices;  // [num_q_heads]; the head's coverage
};

// What bounds the scratch of a call.
struct AttentionBounds {
  int64_t num_sequences = 1;
  int64_t num_q_heads = 0;
  int64_t num_q_rows = 0;  // of all sequences
  int64_t head_dim = 0;
};

inline constexpr int64_t kMaxBlockFinishTimes = 1024;

// Softmax attention over exactly the covered pairs. Query head h reads KV head kv_head[h] (or h /
// (num_q_heads / num_kv_heads) when kv_head is empty). A row without any covered key gives 0 and lse
// -infinity. With `merge`, out and lse hold an earlier result over other keys and are updated to the
// attention over the union; otherwise overwritten.
struct AttentionParams {
  HeadsView<const void> q;     // [num_q_heads, q rows, head_dim]
  HeadsView<const void> k, v;  // [num_kv_heads, k rows, head_dim]
  HeadsView<void> out;         // [num_q_heads, q rows, head_dim]
  float* lse = nullptr;  // [num_q_heads, q rows], natural log, head stride lse_head_stride; may be nullptr
  int64_t lse_head_stride = 0;  // unless merge is set
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  std::span<const int32_t> kv_head;  // [num_q_heads] or empty
  int64_t head_dim = 0;
  float scale = 0;  // multiplies q k, usually 1 / sqrt(head_dim)
  bool merge = false;
  std::span<const AttentionSequence> sequences;
  int cta_limit = 0;  // thread blocks at a time, so that other SMs stay free; 0: as many as fit. GPU only
  // If not nullptr, grow by the pairs of this call: covered, and multiplied (masked parts of tiles included).
  int64_t* covered_pairs = nullptr;
  int64_t* computed_pairs = nullptr;
  // If not nullptr, [kMaxBlockFinishTimes], zeroed by the caller: thread block i writes to entry i when it
  // ended, in nanoseconds of the device's clock. Backends and kernels that cannot say leave zeros.
  int64_t* block_finish_ns = nullptr;
};

// Attention mass of the last queries, in three steps that a sequence-parallel caller joins by reductions
// (max of row_max, sum of row_sum) so that the scores are bit-identical however the keys are dealt to ranks:
//   row_max[h][i] = max_j s(i, j);  row_sum[h][i] = sum_j exp(s - row_max);  p(i, j) = exp(s - row_max) /
//   sum.
// s(i, j) = scale * q_i k_j for key position <= position of query i. row_sum is a sum of integers in units of
// 2^-40, of terms that depend on one key, or on one block of 128 keys (the unit in which keys are dealt), and
// on row_max alone: exact for up to 2^23 keys. The three calls of a step share one workspace, whose contents
// must stay between them: a backend may keep there what LastQueryRowMax found for each block.
struct LastQueryParams {
  HeadsView<const void> q;           // [num_heads, num_queries, head_dim]: the selecting queries, replicated
  int64_t num_queries = 0;           // at most 64
  int64_t first_query_position = 0;  // they are consecutive
  HeadsView<const void> k;           // [num_kv_heads, num_keys, head_dim]: this rank's keys
  int64_t num_keys = 0;
  PositionMap
      key_positions;  // block is a multiple of 128 and first too, unless one piece holds all keys from 0
  std::span<const int32_t> heads;  // query heads that take part; outputs are indexed by place in this list
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  float scale = 0;
};

inline constexpr int64_t kSelectionBlock = 128;  // keys whose diagonal sums are formed together
inline constexpr int64_t kMaxSelectingQueries = 64;
inline constexpr int64_t kDiagonalWindow = kSelectionBlock + kMaxSelectingQueries - 1;
inline constexpr int64_t kDiagonalOverlap = kMaxSelectingQueries - 1;

struct LastQueryScores {
  // [heads.size(), num_keys], head stride vertical_stride: sum over queries of p(i, key row)
  float* vertical = nullptr;
  int64_t vertical_stride = 0;
  // [heads.size(), ceil(num_keys / 128), kDiagonalWindow]: for local key block b whose first key has position
  // kb, entry e is the sum of p(i, j) over its keys j and queries i with distance d = last_query - kb - e,
  // that is e = (last_query - i)
  // + (j - kb). Each distance is in the windows of at most two key blocks; their sum is its slash score.
  float* slash = nullptr;
};

// Joins windows to slash scores. Distances are dealt like keys: entry e of a head is the distance of local
// key e from the last query, whose score is entry e % 128 of its block's window plus, for e % 128 < 63, entry
// 128 + e % 128 of the window of the block before it in position. Scores of forced entries (the keys below
// forced_keys, the distances below forced_distances) become +infinity.
struct JoinScoresParams {
  const float* slash = nullptr;  // [num_heads, blocks, kDiagonalWindow] as LastQueryScore leaves them
  // [num_heads, blocks, kDiagonalOverlap]: entries 128 on of the window of the block before each, 0 where it
  // has none; nullptr: the local blocks are the prompt's, all in order.
  const float* overlaps = nullptr;
  int64_t num_heads = 0;
  int64_t num_keys = 0;
  PositionMap key_positions;
  int64_t last_query = 0;
  int64_t forced_keys = 0;
  int64_t forced_distances = 0;
  // [2 * num_heads, score_stride]: list 2h holds the vertical scores of head h, where forced entries are
  // marked, list 2h + 1 is overwritten with its slash scores.
  float* scores = nullptr;
  int64_t score_stride = 0;
};

// Exact selection of the k largest of each of several lists whose entries may be spread over ranks. Entry e
// of an even list stands for the key at positions.Position(e), of an odd one for the distance last_query -
// positions.Position(e). Larger scores come first, then smaller indices: an entry's rank is its 64-bit key,
// score bits << 32 | (2^32 - 1 - index), unique in its list. Digits of the keys are taken from the top:
//   SelectionStart; for each pass: SelectionHistogram, (sum over ranks), SelectionAdvance; SelectionMark.
struct SelectionLists {
  const float* scores = nullptr;  // [num_lists, list_stride], >= 0, +infinity is legal
  int64_t list_stride = 0;
  int64_t num_entries = 0;  // of this rank, in each list
  int64_t num_lists = 0;
  PositionMap positions;
  int64_t last_query = 0;
};

inline constexpr int kSelectionDigitBits[] = {11, 11, 10, 11, 11, 10};  // of a pass; three of the score first
inline constexpr int kSelectionPasses = 6;
inline constexpr int64_t kSelectionBins = 2048;

// One list on its way to its k-th largest key.
struct SelectionCut {
  uint64_t prefix = 0;     // the digits known so far
  uint64_t threshold = 0;  // once settled: keys at or above it are selected
  int64_t missing = 0;     // still to be taken among the keys that share `prefix`
  int64_t settled = 0;     // 1: threshold is valid
};

// Where the index of one head goes, and how much of it fits. One that does not fit is cut off and sets
// counts->overflow.
struct IndexBuffers {
  int32_t* columns = nullptr;
  int32_t* distances = nullptr;
  DistanceRun* runs = nullptr;
  IndexCounts* counts = nullptr;
  int32_t column_capacity = 0;
  int32_t distance_capacity = 0;
  int32_t run_capacity = 0;
};

// Selected bits to ascending lists and, for tiles, their coarse runs (sparse_index.h). Distance 0 is added
// where it is missing.
struct BuildIndexParams {
  // [2 * heads, words_per_list]: bit i of list 2h is column i of head h, of list 2h + 1 its distance i
  const uint64_t* bits = nullptr;
  int64_t words_per_list = 0;
  Coverage coverage = Coverage::kTiles;  // parity: no runs
  std::span<const IndexBuffers> out;     // [heads]
};

// Pairs of a prompt (coverage.h), or of its first rows. For a block list both counts are its own.
struct CountPairsParams {
  std::span<const IndexView> indices;
  int64_t num_tokens = 0;                                  // of the prompt that the indices are of
  PairCounts* counts = nullptr;                            // [indices.size()], overwritten
  int64_t num_rows = std::numeric_limits<int64_t>::max();  // below num_tokens: a multiple of 64

  int64_t CountedRows() const { return std::min(num_rows, num_tokens); }
};
inline absl::Status CheckCountedRows(const CountPairsParams& params) {
  const int64_t rows = params.CountedRows();
  if (rows == params.num_tokens || (rows >= 0 && rows % kRowBlock == 0)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("count pairs: num_rows ", rows, " of ", params.num_tokens,
                                                 " tokens is no multiple of ", kRowBlock));
}

// Mean of each 64-row block (at absolute positions) that this rank holds. Blocks are whole but for the
// prompt's last, whose mean is over its true rows.
struct PoolParams {
  HeadsView<const void> x;  // [num_heads, num_rows, head_dim]
  int64_t num_heads = 0;
  int64_t num_rows = 0;  // a multiple of 64 but for the prompt's end
  int64_t head_dim = 0;
  float* out = nullptr;  // [num_heads, ceil(num_rows / 64), head_dim]
};

// For each given query row block the K key blocks with the largest product of means, ties to the lower block.
struct SelectBlocksParams {
  const float* pooled_q = nullptr;  // [num_row_blocks, head_dim] of one query head
  PositionMap positions;            // of the rows that were pooled: pooled row block r starts there
  int64_t num_row_blocks = 0;       // r of [0, num_row_blocks) is row block positions.Position(64 r) / 64
  const float* pooled_k = nullptr;  // [num_key_blocks, head_dim] of its KV head, all key blocks of the prompt
  int64_t num_key_blocks = 0;
  int64_t head_dim = 0;
  int64_t num_blocks = 0;       // K; a row block m keeps min(K, m + 1) blocks
  bool force = true;            // diagonal and block 0 kept, within K (K = 1 keeps the diagonal)
  int32_t* selected = nullptr;  // [num_row_blocks, K] ascending, the first min(K, m + 1) valid
};

// What stands for each whole block of 64 keys (head_pattern.h, BlockShare): in the first plane its mean,
// formed in fp32 and rounded to the compute dtype, or in the first num_samples ones its sampled keys; then in
// plane after plane the key that is next farthest from that mean before rounding. Distances are Euclidean, in
// fp32; of equal ones the lower key is the farther.
struct RepresentativesParams {
  HeadsView<const void> k;  // [num_heads, num_keys, head_dim], whole blocks but for the prompt's last
  int64_t num_heads = 0;
  int64_t num_keys = 0;
  int64_t head_dim = 0;
  int64_t num_outliers = 0;
  int64_t num_samples = 0;  // 0: the mean; else a power of two; both together at most kMaxOutliers
  // [num_heads, NumRepresentatives(num_samples, num_outliers), num_keys / 64, head_dim]; a partial block has
  // none
  void* out = nullptr;
};

// What stands for each coarse block, that is for kCoarseBlocks whole key blocks of one KV head
// (head_pattern.h, BlockShare): in the first plane the mean of their means, formed in fp32 and rounded to the
// compute dtype, or in the first num_samples ones its samples; then in plane after plane that representative
// of its blocks whose distance to the nearest plane before it is the largest. Distances are Euclidean, in
// fp32, those to the mean to the one before rounding; of equal ones the lower plane of representatives comes
// first, then the lower block. A key block behind the last whole coarse block is in none.
struct CoarseRepresentativesParams {
  const void* representatives = nullptr;  // [num_representatives, num_key_blocks, head_dim]
  int64_t num_representatives = 0;
  int64_t num_samples = 0;  // of these, the first ones; 0: the first one is the mean
  int64_t num_key_blocks = 0;
  int64_t head_dim = 0;
  int64_t num_coarse = 0;  // at least 1, with num_samples at most kMaxOutliers
  // [NumRepresentatives(num_samples, num_coarse), num_key_blocks / kCoarseBlocks, head_dim]
  void* out = nullptr;
};

// Selection of key blocks by share (head_pattern.h, BlockShare), for heads that read one KV head. The result
// of a row block depends on its queries, what stands for key blocks before it and, with samples, its keys:
// not on what else is in the call.
struct ShareSelectionParams {
  HeadsView<const void> q;  // [num_heads, num_rows, head_dim]
  int64_t num_heads = 0;
  int64_t num_rows = 0;
  PositionMap positions;  // of the rows: first, and block and stride unless all rows are one piece, are
                          // multiples of 64; the rows are whole 64-row blocks but for the prompt's last
  const void* representatives = nullptr;  // [num_representatives, num_key_blocks, head_dim], compute dtype
  int64_t num_representatives = 0;        // at most kMaxOutliers + 1
  int64_t num_samples = 0;                // of these, the first ones; 0: the first one is the mean
  // The keys of the rows, row for row: [num_rows, head_dim], where there are samples.
  const void* own_k = nullptr;
  int64_t own_k_row_stride = 0;  // elements
  int64_t num_key_blocks = 0;    // at least all before the last row block
  // Two levels: [NumRepresentatives(num_samples, num_coarse), num_key_blocks / kCoarseBlocks, head_dim],
  // compute dtype.
  const void* coarse = nullptr;
  int64_t num_coarse = 0;  // 0: one level
  bool fp8 = false;        // queries, representatives and own keys are rounded to E4M3 first
  int64_t head_dim = 0;
  float scale = 0;                   // multiplies q k, above 0
  std::span<const float> min_share;  // [num_heads], each in (0, 1]
  // [num_heads, ceil(num_rows / 64), words_per_row], overwritten: bit n of a row is key block n. Forced
  // blocks are set. words_per_row holds the last row block.
  uint64_t* bits = nullptr;
  int64_t words_per_row = 0;
};

// What bounds the scratch of a call.
struct ShareSelectionBounds {
  int64_t num_heads = 0;
  int64_t num_rows = 0;
  int64_t num_representatives = 0;
  int64_t num_key_blocks = 0;
  int64_t head_dim = 0;
  int64_t num_coarse = 0;
  int64_t num_samples = 0;
  bool fp8 = false;
};
inline ShareSelectionBounds BoundsOf(const ShareSelectionParams& params) {
  return {.num_heads = params.num_heads,
          .num_rows = params.num_rows,
          .num_representatives = params.num_representatives,
          .num_key_blocks = params.num_key_blocks,
          .head_dim = params.head_dim,
          .num_coarse = params.num_coarse,
          .num_samples = params.num_samples,
          .fp8 = params.fp8};
}

// Bits of row blocks to lists of key blocks, head after head in one array: they follow the entries of earlier
// calls. One call takes all row blocks of its heads, or some of one head, whose next ones come with the next
// call. Lists that do not fit in `capacity` are cut off there.
struct BuildBlockListsParams {
  const uint64_t* bits = nullptr;  // [num_heads, num_row_blocks, words_per_row]
  int64_t words_per_row = 0;
  int64_t num_heads = 0;
  int64_t num_row_blocks = 0;
  int64_t* row_offsets =
      nullptr;  // [num_heads, num_row_blocks + 1], head stride row_offsets_stride: places in
  int64_t row_offsets_stride = 0;  // key_blocks (IndexView::row_offsets)
  int32_t* key_blocks = nullptr;   // [capacity]
  int64_t capacity = 0;
  int64_t* num_entries = nullptr;  // [1], 0 before the first call: entries of all lists so far, also of those
                                   // that did not fit, so that more than `capacity` means overflow
};

// Copies `rows` pieces of `row_bytes`, whose starts lie to_pitch and from_pitch bytes apart, in each of
// `planes` planes, which lie to_plane_pitch and from_plane_pitch bytes apart. No overlap.
struct Copy2DParams {
  void* to = nullptr;
  int64_t to_pitch = 0;
  const void* from = nullptr;
  int64_t from_pitch = 0;
  int64_t row_bytes = 0;
  int64_t rows = 0;
  int64_t planes = 1;
  int64_t to_plane_pitch = 0;
  int64_t from_plane_pitch = 0;
};

class KernelSet {
 public:
  virtual ~KernelSet() = default;
  virtual std::string_view name() const = 0;  // with device and instruction set in use, for reports
  virtual DeviceKind device() const = 0;
  virtual DType compute_dtype() const = 0;  // of activations, Q, K and V; fp32 on the CPU
  virtual MemoryResource& memory() = 0;
  // Rows at which linear operations have reached their speed: what a caller should cut a long prompt into.
  virtual int64_t preferred_rows() const = 0;

  // Memory. CopyIn has read `host` when it returns. What CopyOut writes may be read after stream.Sync().
  virtual absl::Status CopyIn(void* to, const void* host, int64_t bytes, Stream& stream) = 0;
  virtual absl::Status CopyOut(void* host, const void* from, int64_t bytes, Stream& stream) = 0;
  virtual absl::Status Copy2D(const Copy2DParams& params, Stream& stream) = 0;  // within the device
  virtual absl::Status Zero(void* data, int64_t bytes, Stream& stream) = 0;
  virtual absl::Status FillRandom(const FillRandomParams& params, Stream& stream) = 0;

  // Linear parts.
  virtual absl::Status Embed(const EmbedParams& params, Stream& stream) = 0;
  virtual absl::Status RmsNorm(const RmsNormParams& params, Stream& stream) = 0;
  virtual int64_t GemmWorkspaceBytes(int64_t max_rows, int64_t max_in_width, int64_t max_out_width) const = 0;
  virtual absl::Status Gemm(const GemmParams& params, Workspace workspace, Stream& stream) = 0;
  virtual absl::Status GatedActivation(const GatedActivationParams& params, Stream& stream) = 0;
  virtual absl::Status Rotary(const RotaryParams& params, Stream& stream) = 0;

  virtual int64_t AttentionWorkspaceBytes(const AttentionBounds& bounds) const = 0;
  virtual absl::Status Attention(const AttentionParams& params, Workspace workspace, Stream& stream) = 0;

  // Vertical-slash selection.
  virtual int64_t LastQueryWorkspaceBytes(int64_t num_heads, int64_t num_keys, int64_t head_dim) const = 0;
  virtual absl::Status LastQueryRowMax(
      const LastQueryParams& params, float* row_max, Workspace workspace,
      Stream& stream) = 0;  // [heads.size(), 64], -inf where no key is visible
  virtual absl::Status LastQueryRowSum(const LastQueryParams& params, const float* row_max, uint64_t* row_sum,
                                       Workspace workspace, Stream& stream) = 0;  // [heads.size(), 64]
  virtual absl::Status LastQueryScore(const LastQueryParams& params, const float* row_max,
                                      const uint64_t* row_sum, const LastQueryScores& scores,
                                      Workspace workspace, Stream& stream) = 0;
  virtual absl::Status JoinScores(const JoinScoresParams& params, Stream& stream) = 0;
  // budgets [num_lists]: at most what all ranks' entries together are; 0 selects nothing.
  virtual absl::Status SelectionStart(std::span<const int64_t> budgets, SelectionCut* cuts,
                                      Stream& stream) = 0;
  // histogram [num_lists, kSelectionBins], overwritten; 0 for settled lists and beyond the pass's digit.
  virtual absl::Status SelectionHistogram(const SelectionLists& lists, int pass, const SelectionCut* cuts,
                                          uint64_t* histogram, Stream& stream) = 0;
  // A list with too few keys stays unsettled for good.
  virtual absl::Status SelectionAdvance(int64_t num_lists, int pass, const uint64_t* histogram,
                                        SelectionCut* cuts, Stream& stream) = 0;
  // Sets the bits of this rank's selected entries in bits [num_lists, words_per_list], which the caller
  // zeroed.
  virtual absl::Status SelectionMark(const SelectionLists& lists, const SelectionCut* cuts, uint64_t* bits,
                                     int64_t words_per_list, Stream& stream) = 0;
  virtual int64_t BuildIndexWorkspaceBytes(int64_t num_heads, int64_t words_per_list) const = 0;
  virtual absl::Status BuildIndex(const BuildIndexParams& params, Workspace workspace, Stream& stream) = 0;
  virtual int64_t CountPairsWorkspaceBytes(int64_t num_heads, int64_t num_tokens) const = 0;
  virtual absl::Status CountPairs(const CountPairsParams& params, Workspace workspace, Stream& stream) = 0;

  // Block-sparse selection.
  virtual absl::Status Pool(const PoolParams& params, Stream& stream) = 0;
  virtual int64_t SelectBlocksWorkspaceBytes(int64_t num_row_blocks, int64_t num_key_blocks,
                                             int64_t head_dim) const = 0;
  virtual absl::Status SelectBlocks(const SelectBlocksParams& params, Workspace workspace,
                                    Stream& stream) = 0;

  // Selection by share.
  virtual absl::Status Representatives(const RepresentativesParams& params, Stream& stream) = 0;
  virtual absl::Status CoarseRepresentatives(const CoarseRepresentativesParams& params, Stream& stream) = 0;
  virtual int64_t ShareSelectionWorkspaceBytes(const ShareSelectionBounds& bounds) const = 0;
  virtual absl::Status SelectByShare(const ShareSelectionParams& params, Workspace workspace,
                                     Stream& stream) = 0;
  virtual int64_t BuildBlockListsWorkspaceBytes(int64_t num_heads, int64_t num_row_blocks) const = 0;
  virtual absl::Status BuildBlockLists(const BuildBlockListsParams& params, Workspace workspace,
                                       Stream& stream) = 0;
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_API_KERNEL_SET_H_
