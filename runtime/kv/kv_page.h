#ifndef LONGFILL_RUNTIME_KV_KV_PAGE_H_
#define LONGFILL_RUNTIME_KV_KV_PAGE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/status.h"
#include "runtime/kv/kv_store.h"

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

// Appends keys or values (`from` is view.key or view.value) of one piece to *bytes in the layout asked for.
void CopyPiece(const KvLayerView& view, const std::byte* from, const KvSelection& selection,
               const KvPiece& piece, KvLayout layout, std::string* bytes);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_KV_KV_PAGE_H_
