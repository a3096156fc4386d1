#include "runtime/kv/kv_page.h"

#include <algorithm>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "runtime/kv/kv_convert.h"

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

void PackRows(HeadsView<const void> from, DType from_dtype, int64_t num_rows, const KvPageShape& page,
              int64_t page_row, std::byte* to) {
  const int64_t row_bytes = page.head_dim * DTypeBytes(page.dtype);
  for (int64_t head = 0; head < page.num_heads; ++head) {
    if (page.layout == KvLayout::kHeadsTokens) {
      ConvertHeadRows(from, from_dtype, page.head_begin + head, num_rows, page.head_dim, page.dtype,
                      to + (head * page.num_rows + page_row) * row_bytes);
      continue;
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      HeadsView<const void> at = from;
      at.data = Advance(from.data, row * from.row_stride, from_dtype);
      ConvertHeadRows(at, from_dtype, page.head_begin + head, 1, page.head_dim, page.dtype,
                      to + ((page_row + row) * page.num_heads + head) * row_bytes);
    }
  }
}

}  // namespace longfill
