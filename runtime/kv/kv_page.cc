#include "runtime/kv/kv_page.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

absl::Status ResolveRange(std::string_view name, int64_t total, int64_t* begin, int64_t* end) {
  if (*end == 0) *end = total;
  if (*begin < 0 || *end > total || *begin >= *end) {
    return absl::InvalidArgumentError(absl::StrCat(std::string(name), " range [", *begin, ", ", *end,
                                                   ") is empty or outside of [0, ", total, ")"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<KvSelection> ResolveSelection(const KvSelection& asked, const KvTransferSpec& spec) {
  KvSelection selection = asked;
  LF_RETURN_IF_ERROR(ResolveRange("layer", spec.num_layers, &selection.layer_begin, &selection.layer_end));
  LF_RETURN_IF_ERROR(ResolveRange("head", spec.num_kv_heads, &selection.head_begin, &selection.head_end));
  LF_RETURN_IF_ERROR(
      ResolveRange("token", spec.plan.num_tokens(), &selection.token_begin, &selection.token_end));
  return selection;
}

std::vector<KvPiece> CutIntoPieces(const KvSelection& selection, const KvTransferSpec& spec,
                                   int64_t max_bytes) {
  const int64_t token_bytes =
      2 * (selection.head_end - selection.head_begin) * spec.head_dim * DTypeBytes(spec.dtype);
  const int64_t max_tokens = std::max<int64_t>(max_bytes / token_bytes, 1);
  std::vector<KvPiece> pieces;
  int64_t row = 0;
  for (const TokenRange& range : spec.plan.TokenRanges(spec.rank)) {
    const int64_t begin = std::max(range.begin, selection.token_begin);
    const int64_t end = std::min(range.end, selection.token_end);
    for (int64_t token = begin; token < end; token += max_tokens) {
      pieces.push_back({row + token - range.begin, token, std::min(max_tokens, end - token)});
    }
    row += range.end - range.begin;
  }
  return pieces;
}

void CopyPiece(const KvLayerView& view, const std::byte* from, const KvSelection& selection,
               const KvPiece& piece, KvLayout layout, std::string* bytes) {
  const int64_t num_heads = selection.head_end - selection.head_begin;
  const size_t before = bytes->size();
  bytes->resize(before + static_cast<size_t>(num_heads * piece.num_tokens * view.row_bytes));
  char* to = bytes->data() + before;
  const auto row_of = [&](int64_t head, int64_t token) {
    return from + (selection.head_begin + head) * view.head_stride_bytes +
           (piece.row_begin + token) * view.row_bytes;
  };
  if (layout == KvLayout::kHeadsTokens) {
    const size_t run = static_cast<size_t>(piece.num_tokens * view.row_bytes);
    for (int64_t head = 0; head < num_heads; ++head, to += run) std::memcpy(to, row_of(head, 0), run);
    return;
  }
  const size_t run = static_cast<size_t>(view.row_bytes);
  for (int64_t token = 0; token < piece.num_tokens; ++token) {
    for (int64_t head = 0; head < num_heads; ++head, to += run) std::memcpy(to, row_of(head, token), run);
  }
}

}  // namespace longfill
