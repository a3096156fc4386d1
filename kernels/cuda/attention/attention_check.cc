#include "kernels/cuda/attention/attention_check.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/check.h"

namespace longfill::cuda::attention {
namespace {

template <typename... Text>
absl::Status Bad(const Text&... text) {
  return absl::InvalidArgumentError(absl::StrCat("attention: ", text...));
}

template <typename T>
absl::Status CheckView(const char* name, const HeadsView<T>& view, int64_t head_dim) {
  if (view.row_stride < head_dim)
    return Bad(name, " row stride ", view.row_stride, " is below head_dim ", head_dim);
  if (!AlignedTo16(view.data, 2 * view.head_stride, 2 * view.row_stride)) {
    return Bad(name, " rows are not aligned to 16 bytes (head stride ", view.head_stride, ", row stride ",
               view.row_stride, ")");
  }
  return absl::OkStatus();
}

absl::Status CheckHeads(const AttentionParams& params) {
  LF_RETURN_IF_ERROR(CheckAtLeast("attention", "num_kv_heads", params.num_kv_heads, 1));
  if (params.kv_head.empty()) {
    if (params.num_q_heads % params.num_kv_heads == 0) return absl::OkStatus();
    return Bad(params.num_q_heads, " query heads do not divide among ", params.num_kv_heads,
               " KV heads and kv_head is empty");
  }
  if (static_cast<int64_t>(params.kv_head.size()) != params.num_q_heads) {
    return Bad("kv_head has ", params.kv_head.size(), " entries for ", params.num_q_heads, " query heads");
  }
  for (int32_t head : params.kv_head) {
    if (head < 0 || head >= params.num_kv_heads) return Bad("kv_head ", head, " of ", params.num_kv_heads);
  }
  return absl::OkStatus();
}

absl::Status CheckQueries(const AttentionSequence& sequence) {
  const int64_t rows = sequence.q_end - sequence.q_begin;
  const PositionMap& map = sequence.q_positions;
  if (!map.Ascends()) return Bad("position map ", ToString(map), " does not ascend");
  if (map.Position(rows - 1) >= sequence.num_tokens) {
    return Bad("last query at position ", map.Position(rows - 1), " of ", sequence.num_tokens, " tokens");
  }
  if (sequence.num_tokens > kMaxTokens) {
    return Bad(sequence.num_tokens, " tokens exceed ", kMaxTokens);
  }
  return absl::OkStatus();
}

absl::Status CheckKeys(const AttentionSequence& sequence) {
  if (sequence.key_range_begin >= sequence.key_range_end) return absl::OkStatus();
  const int64_t end = sequence.key_first + sequence.k_end - sequence.k_begin;
  if (sequence.key_range_begin < sequence.key_first || sequence.key_range_end > end) {
    return Bad("key range [", sequence.key_range_begin, ", ", sequence.key_range_end,
               ") outside of the keys [", sequence.key_first, ", ", end, ")");
  }
  return absl::OkStatus();
}

absl::Status CheckIndices(const AttentionParams& params, const AttentionSequence& sequence) {
  if (static_cast<int64_t>(sequence.indices.size()) != params.num_q_heads) {
    return Bad(sequence.indices.size(), " indices for ", params.num_q_heads, " query heads");
  }
  for (size_t head = 0; head < sequence.indices.size(); ++head) {
    const IndexView& index = sequence.indices[head];
    const bool missing =
        index.form == IndexView::Form::kBlockList ? index.key_blocks == nullptr : index.counts == nullptr;
    if (missing) return Bad("index of query head ", head, " is null");
  }
  return absl::OkStatus();
}

absl::Status CheckSequence(const AttentionParams& params, const AttentionSequence& sequence) {
  if (sequence.q_begin < 0 || sequence.q_end < sequence.q_begin) {
    return Bad("query rows [", sequence.q_begin, ", ", sequence.q_end, ")");
  }
  if (sequence.k_begin < 0 || sequence.k_end < sequence.k_begin || sequence.key_first < 0) {
    return Bad("key rows [", sequence.k_begin, ", ", sequence.k_end, ") from position ", sequence.key_first);
  }
  if (sequence.q_begin == sequence.q_end) return absl::OkStatus();
  LF_RETURN_IF_ERROR(CheckQueries(sequence));
  LF_RETURN_IF_ERROR(CheckKeys(sequence));
  return CheckIndices(params, sequence);
}

}  // namespace

absl::Status CheckAttention(const AttentionParams& params) {
  LF_RETURN_IF_ERROR(CheckHeads(params));
  LF_RETURN_IF_ERROR(CheckView("q", params.q, params.head_dim));
  LF_RETURN_IF_ERROR(CheckView("k", params.k, params.head_dim));
  LF_RETURN_IF_ERROR(CheckView("v", params.v, params.head_dim));
  LF_RETURN_IF_ERROR(CheckView("out", params.out, params.head_dim));
  if (!(params.scale > 0) || std::isinf(params.scale)) return Bad("scale ", params.scale, " is not above 0");
  if (params.merge && params.lse == nullptr) return Bad("merge needs the lse of the earlier result");
  LF_RETURN_IF_ERROR(CheckAtLeast("attention", "cta_limit", params.cta_limit, 0));
  for (const AttentionSequence& sequence : params.sequences) {
    LF_RETURN_IF_ERROR(CheckSequence(params, sequence));
  }
  return absl::OkStatus();
}

}  // namespace longfill::cuda::attention
