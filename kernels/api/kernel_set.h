#ifndef LONGFILL_KERNELS_API_KERNEL_SET_H_
#define LONGFILL_KERNELS_API_KERNEL_SET_H_

// The one interface that every backend implements. Rules of every operation:
// - pointers are memory of the backend's device; shapes are in elements, row-major, strides explicit;
// - work is enqueued on `stream` in order and not synchronised; the CPU backend has finished when a call
// returns;
// - nothing is allocated: an operation that needs scratch takes a workspace of at least its
// ...WorkspaceBytes;
// - 0 rows, heads or sequences are legal and do nothing;
// - shapes that the backend has no variant for give Unimplemented naming them, broken preconditions
// InvalidArgument. Thread-compatible: one call at a time per KernelSet.

#include <cstdint>
#include <span>
#include <string_view>

#include "kernels/base/dtype.h"
#include "kernels/base/memory.h"
#include "kernels/base/status.h"
#include "kernels/base/stream.h"
#include "kernels/sparse/position_map.h"
#include "kernels/sparse/sparse_index.h"

namespace longfill {

struct Workspace {
  void* data = nullptr;
  int64_t size_bytes = 0;
};

// Activations are in the backend's compute dtype (fp32 on the CPU); only weights, KV and tables say their
// dtype.

struct EmbedParams {
  std::span<const int32_t> ids;  // [num_rows] host memory, each in [0, vocab_size)
  const void* table = nullptr;   // [vocab_size, width] of table_dtype
  DType table_dtype = DType::kFloat32;
  int64_t vocab_size = 0;
  int64_t width = 0;
  float* out = nullptr;  // [num_rows, width]
};

struct RmsNormParams {            // out = x / sqrt(mean(x^2) + epsilon) * weight, arXiv 1910.07467
  const float* x = nullptr;       // [num_rows, width]; may equal out
  const float* weight = nullptr;  // [width]
  float epsilon = 0;
  int64_t num_rows = 0;
  int64_t width = 0;
  float* out = nullptr;  // [num_rows, width]
};

struct GemmParams {          // out = (accumulate ? out : 0) + x * weight^T + bias
  const float* x = nullptr;  // [num_rows, in_width], row stride x_stride
  int64_t x_stride = 0;
  const void* weight =
      nullptr;  // [out_width, in_width] of weight_dtype, as Hugging Face stores linear layers
  DType weight_dtype = DType::kFloat32;
  const float* bias = nullptr;  // [out_width] or nullptr
  int64_t num_rows = 0;
  int64_t in_width = 0;
  int64_t out_width = 0;
  bool accumulate = false;
  float* out = nullptr;  // [num_rows, out_width], row stride out_stride
  int64_t out_stride = 0;
};

enum class Activation : uint8_t { kSilu, kGeluTanh };

struct GatedActivationParams {  // out = activation(gate) * up
  const float* gate = nullptr;  // [num_rows, width], row stride in_stride
  const float* up = nullptr;    // [num_rows, width], row stride in_stride
  int64_t in_stride = 0;
  Activation activation = Activation::kSilu;
  int64_t num_rows = 0;
  int64_t width = 0;
  float* out = nullptr;  // [num_rows, width] dense; may equal gate when in_stride == width
};

enum class RotaryForm : uint8_t {
  kHalfSplit,    // pairs (i, i + rotary_dim / 2): Hugging Face Llama, Qwen, Phi-3
  kInterleaved,  // pairs (2i, 2i + 1): GLM-4
};

// Rotates the first rotary_dim of head_dim and moves rows from token-major to head-major:
// out[h][row] = scale_and_rotate(x[row][h]) with angle position * inv_freq[i]; the rest of the row is copied.
// Angles are formed in fp64, so that position 1,048,575 is as exact as position 1.
struct RotaryParams {
  const float* x = nullptr;  // [num_rows, num_heads * head_dim], row stride x_stride
  int64_t x_stride = 0;
  const double* inv_freq = nullptr;  // [rotary_dim / 2] host memory
  float attention_scale = 1;         // multiplies cos and sin (YaRN, LongRoPE)
  RotaryForm form = RotaryForm::kHalfSplit;
  int64_t rotary_dim = 0;  // even, <= head_dim; 0: only moves rows (values)
  PositionMap positions;   // of row_offset + row
  int64_t row_offset = 0;
  int64_t num_rows = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  float* out = nullptr;  // [num_heads, head_stride / head_dim rows, head_dim], written from row_offset
  int64_t head_stride = 0;
};

// A head-major view: element (head, row, i) is data[head * head_stride + row * row_stride + i].
template <typename T>
struct HeadsView {
  T* data = nullptr;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

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
  std::span<const SparseIndex* const>
      indices;  // [num_q_heads]; the head's coverage; host memory, alive until done
};

// Softmax attention over exactly the covered pairs. Query head h reads KV head kv_head[h] (or h /
// (num_q_heads / num_kv_heads) when kv_head is empty). A row without any covered key gives 0 and lse
// -infinity. With `merge`, out and lse hold an earlier result over other keys and are updated to the
// attention over the union; otherwise overwritten.
struct AttentionParams {
  HeadsView<const float> q;     // [num_q_heads, q rows, head_dim]
  HeadsView<const float> k, v;  // [num_kv_heads, k rows, head_dim]
  HeadsView<float> out;         // [num_q_heads, q rows, head_dim]
  float* lse = nullptr;  // [num_q_heads, q rows], natural log, head stride lse_head_stride; may be nullptr
  int64_t lse_head_stride = 0;  // unless merge is set
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  std::span<const int32_t> kv_head;  // [num_q_heads] or empty
  int64_t head_dim = 0;
  float scale = 0;  // multiplies q k, usually 1 / sqrt(head_dim)
  bool merge = false;
  std::span<const AttentionSequence> sequences;
  // If not nullptr, receives the pairs of this call: covered, and multiplied (masked parts of tiles
  // included).
  int64_t* covered_pairs = nullptr;
  int64_t* computed_pairs = nullptr;
};

// Attention mass of the last queries, in three passes that a sequence-parallel caller joins by reductions
// (max of row_max, sum of row_sum) so that the scores are bit-identical however the keys are dealt to ranks:
//   row_max[h][i] = max_j s(i, j);  row_sum[h][i] = sum_j fixed(exp(s - row_max));  p(i, j) = exp(s -
//   row_max) / sum.
// s(i, j) = scale * q_i k_j for key position <= position of query i. exp is rounded to multiples of 2^-40 in
// row_sum, an integer sum, exact for up to 2^23 keys.
struct LastQueryParams {
  HeadsView<const float> q;          // [num_heads, num_queries, head_dim]: the selecting queries, replicated
  int64_t num_queries = 0;           // at most 64
  int64_t first_query_position = 0;  // they are consecutive
  HeadsView<const float> k;          // [num_kv_heads, num_keys, head_dim]: this rank's keys
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

struct LastQueryScores {
  float* vertical = nullptr;  // [heads.size(), num_keys]: sum over queries of p(i, key row)
  // [heads.size(), ceil(num_keys / 128), kDiagonalWindow]: for local key block b whose first key has position
  // kb, entry e is the sum of p(i, j) over its keys j and queries i with distance d = last_query - kb - e,
  // that is e = (last_query - i)
  // + (j - kb). Each distance is in the windows of at most two key blocks; their sum is its slash score.
  float* slash = nullptr;
};

// Radix selection over 64-bit keys, larger first. A caller passes digits from the top until every list is
// settled.
struct SelectionHistogramParams {
  const uint64_t* keys = nullptr;  // [num_lists, list_stride], num_keys valid in each
  int64_t list_stride = 0;
  int64_t num_keys = 0;
  int64_t num_lists = 0;
  const uint64_t* prefixes = nullptr;  // [num_lists]: only keys with (key >> prefix_shift) == prefix count
  int prefix_shift = 64;               // 64: all keys count
  int digit_shift = 0;                 // the digit is (key >> digit_shift) & (num_bins - 1)
  int num_bins = 0;                    // a power of two
  uint64_t* histogram = nullptr;       // [num_lists, num_bins], overwritten
};

// Mean of each 64-row block (at absolute positions) that this rank holds. Blocks are whole but for the
// prompt's last, whose mean is over its true rows.
struct PoolParams {
  HeadsView<const float> x;  // [num_heads, num_rows, head_dim]
  int64_t num_heads = 0;
  int64_t num_rows = 0;  // a multiple of 64 but for the prompt's end
  int64_t head_dim = 0;
  float* out = nullptr;  // [num_heads, ceil(num_rows / 64), head_dim]
};

// For each given query row block the K key blocks with the largest product of means, ties to the lower block.
struct SelectBlocksParams {
  const float* pooled_q = nullptr;      // [num_row_blocks, head_dim] of one query head
  std::span<const int32_t> row_blocks;  // [num_row_blocks] absolute row block numbers
  const float* pooled_k = nullptr;  // [num_key_blocks, head_dim] of its KV head, all key blocks of the prompt
  int64_t num_key_blocks = 0;
  int64_t head_dim = 0;
  int64_t num_blocks = 0;       // K; a row block m keeps min(K, m + 1) blocks
  bool force = true;            // diagonal and block 0 kept, within K (K = 1 keeps the diagonal)
  int32_t* selected = nullptr;  // [num_row_blocks, K] ascending, the first min(K, m + 1) valid
};

class KernelSet {
 public:
  virtual ~KernelSet() = default;
  virtual std::string_view name() const = 0;  // with the instruction set in use, for reports
  virtual DeviceKind device() const = 0;
  virtual MemoryResource& memory() = 0;

  virtual absl::Status Embed(const EmbedParams& params, Stream& stream) = 0;
  virtual absl::Status RmsNorm(const RmsNormParams& params, Stream& stream) = 0;
  virtual int64_t GemmWorkspaceBytes(int64_t max_rows, int64_t max_in_width, int64_t max_out_width) const = 0;
  virtual absl::Status Gemm(const GemmParams& params, Workspace workspace, Stream& stream) = 0;
  virtual absl::Status GatedActivation(const GatedActivationParams& params, Stream& stream) = 0;
  virtual absl::Status Rotary(const RotaryParams& params, Stream& stream) = 0;

  virtual int64_t AttentionWorkspaceBytes(int64_t head_dim) const = 0;
  virtual absl::Status Attention(const AttentionParams& params, Workspace workspace, Stream& stream) = 0;

  virtual int64_t LastQueryWorkspaceBytes(int64_t head_dim) const = 0;
  virtual absl::Status LastQueryRowMax(
      const LastQueryParams& params, float* row_max, Workspace workspace,
      Stream& stream) = 0;  // [heads.size(), 64], -inf where no key is visible
  virtual absl::Status LastQueryRowSum(const LastQueryParams& params, const float* row_max, uint64_t* row_sum,
                                       Workspace workspace, Stream& stream) = 0;  // [heads.size(), 64]
  virtual absl::Status LastQueryScore(const LastQueryParams& params, const float* row_max,
                                      const uint64_t* row_sum, const LastQueryScores& scores,
                                      Workspace workspace, Stream& stream) = 0;
  virtual absl::Status SelectionHistogram(const SelectionHistogramParams& params, Stream& stream) = 0;
  virtual absl::Status Pool(const PoolParams& params, Stream& stream) = 0;
  virtual absl::Status SelectBlocks(const SelectBlocksParams& params, Stream& stream) = 0;
};

}  // namespace longfill

#endif  // LONGFILL_KERNELS_API_KERNEL_SET_H_
