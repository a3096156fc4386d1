#ifndef LONGFILL_RUNTIME_KV_KV_PAGE_H_
#define LONGFILL_RUNTIME_KV_KV_PAGE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/base/status.h"
#include "runtime/kv/kv_sink.h"

namespace longfill {

enum class KvLayout : uint8_t { kHeadsTokens, kTokensHeads };  // "HND", "NHD"

// What a reader asks for; an end of 0 means up to the last.
struct KvSelection {
  int64_t layer_begin = 0, layer_end = 0;
  int64_t head_begin = 0, head_end = 0;
  int64_t token_begin = 0, token_end = 0;
};

// The selection with its ends filled in. InvalidArgument names the range that lies outside of the transfer.
absl::StatusOr<KvSelection> ResolveSelection(const KvSelection& asked, const KvTransferSpec& spec);

// Consecutive tokens that a rank owns, and the local row of the first.
struct KvPiece {
  int64_t row_begin = 0;
  int64_t token_begin = 0;
  int64_t num_tokens = 0;
};

// The selected tokens that spec.rank owns, ascending, in pieces whose keys and values of the selected heads
// take at most max_bytes (but at least one token each).
std::vector<KvPiece> CutIntoPieces(const KvSelection& selection, const KvTransferSpec& spec,
                                   int64_t max_bytes);

// Rows of some heads of one layer, on their way to a page: keys or values [num_heads, num_rows, head_dim], or
// [num_rows, num_heads, head_dim], of `dtype`, which is a float type.
struct KvPageShape {
  int64_t head_begin = 0;
  int64_t num_heads = 0;
  int64_t num_rows = 0;
  int64_t head_dim = 0;
  DType dtype = DType::kFloat32;
  KvLayout layout = KvLayout::kHeadsTokens;

  int64_t Bytes() const { return num_heads * num_rows * head_dim * DTypeBytes(dtype); }
};

// Puts the next `num_rows` rows of `from`, whose heads count from head 0 of the model and whose elements are
// of from_dtype in host memory, into the page `to` as its rows from page_row on.
void PackRows(HeadsView<const void> from, DType from_dtype, int64_t num_rows, const KvPageShape& page,
              int64_t page_row, std::byte* to);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_PAGE_H_
