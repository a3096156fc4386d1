#include "kernels/cuda/hopper/attention.h"

#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention/attention_check.h"
#include "kernels/cuda/attention/attention_tables.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/hopper/head_dims.h"
#include "kernels/cuda/hopper/launch_attention.h"
#include "kernels/cuda/hopper/order_heads.h"
#include "kernels/cuda/hopper/tensor_map.h"
#include "kernels/cuda/upload.h"

namespace longfill::cuda::hopper {
namespace {

using attention::Args;
using attention::HeadEntry;
using attention::SequenceEntry;
using attention::SequenceTable;

constexpr int64_t kTileRows = 128;
constexpr int64_t kSlotKeys = 64;
constexpr int64_t kAlignment = 64;  // of tensor maps
// A call of fewer tiles for each SM begins with the heads that take longest. In longer ones the end matters
// little, and neighbouring heads of one KV head find its keys in L2.
constexpr int64_t kFewTiles = 16;

// The tables of a call as they lie in the workspace, behind an address aligned to kAlignment.
struct TableLayout {
  TableLayout(int64_t num_sequences, int64_t num_q_heads) {
    const auto place = [&](int64_t bytes) {
      const int64_t at = size_bytes;
      size_bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return at;
    };
    tensor_maps = place(2 * num_sequences * static_cast<int64_t>(sizeof(CUtensorMap)));
    items_taken = place(sizeof(int32_t));
    sequences = place(num_sequences * static_cast<int64_t>(sizeof(SequenceEntry)));
    heads = place(num_q_heads * static_cast<int64_t>(sizeof(HeadEntry)));
    indices = place(num_sequences * num_q_heads * static_cast<int64_t>(sizeof(IndexView)));
  }
  int64_t workspace_bytes() const { return size_bytes + kAlignment - 16; }
  // Byte offsets.
  int64_t tensor_maps = 0, items_taken = 0, sequences = 0, heads = 0, indices = 0;
  int64_t size_bytes = 0;
};

// Rows of K or V that hold the keys of the key range: all that is read.
absl::Status EncodeKeys(const char* name, const HeadsView<const void>& view, const SequenceEntry& sequence,
                        const AttentionParams& params, DType dtype, CUtensorMap* map) {
  const int64_t first_row = sequence.k_row_of_0 + sequence.key_range_begin;
  const int block_dims = params.head_dim % 64 == 0 ? 64 : 32;
  return EncodeWholeRowsMap(name, static_cast<const char*>(view.data) + 2 * first_row * view.row_stride,
                            dtype,
                            {.head_dim = params.head_dim,
                             .num_rows = sequence.key_range_end - sequence.key_range_begin,
                             .num_heads = params.num_kv_heads,
                             .row_stride = view.row_stride,
                             .head_stride = view.head_stride,
                             .box_dims = block_dims,
                             .box_rows = kSlotKeys,
                             .swizzle_bytes = 2 * block_dims},
                            map);
}

// K's map and V's for each sequence; those of a sequence without keys are not used.
absl::StatusOr<std::vector<CUtensorMap>> TensorMapsOf(const AttentionParams& params, DType dtype,
                                                      const std::vector<SequenceEntry>& sequences) {
  std::vector<CUtensorMap> maps(2 * sequences.size());
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (sequences[i].key_range_begin >= sequences[i].key_range_end) continue;
    LF_RETURN_IF_ERROR(EncodeKeys("attention: k", params.k, sequences[i], params, dtype, &maps[2 * i]));
    LF_RETURN_IF_ERROR(EncodeKeys("attention: v", params.v, sequences[i], params, dtype, &maps[2 * i + 1]));
  }
  return maps;
}

using LaunchFunction = absl::Status (*)(const Args&, int, const DeviceLimits&, cudaStream_t);

template <DType kDType>
LaunchFunction PickHeadDim(int64_t head_dim) {
  switch (head_dim) {
    case 64:
      return LaunchAttention<kDType, 64>;
    case 96:
      return LaunchAttention<kDType, 96>;
    case 128:
      return LaunchAttention<kDType, 128>;
    default:
      return nullptr;
  }
}

absl::StatusOr<LaunchFunction> Pick(DType dtype, int64_t head_dim) {
  LaunchFunction launch = nullptr;
  if (dtype == DType::kBFloat16) launch = PickHeadDim<DType::kBFloat16>(head_dim);
  if (dtype == DType::kFloat16) launch = PickHeadDim<DType::kFloat16>(head_dim);
  if (launch != nullptr) return launch;
  return absl::UnimplementedError(
      absl::StrCat("attention: no Hopper variant for head_dim ", head_dim, " in ",
                   absl::string_view(DTypeName(dtype).data(), DTypeName(dtype).size()),
                   "; there are 64, 96 and 128 in bfloat16 and float16"));
}

bool IsParity(const IndexView& index) {
  return index.form == IndexView::Form::kDiagonalColumn && index.coverage == Coverage::kParity;
}

}  // namespace
}  // namespace longfill::cuda::hopper

namespace longfill {

HopperHeads SplitHopperHeads(const AttentionParams& params, const DeviceLimits& limits) {
  const bool any = cuda::hopper::ServesHeadDim(params.head_dim, limits);
  const auto serves = [&](int64_t head) {
    return any && std::none_of(params.sequences.begin(), params.sequences.end(), [&](const auto& sequence) {
             const auto place = static_cast<size_t>(head);
             return place < sequence.indices.size() && cuda::hopper::IsParity(sequence.indices[place]);
           });
  };
  HopperHeads heads;
  for (int64_t head = 0; head < params.num_q_heads; ++head) {
    (serves(head) ? heads.served : heads.others).push_back(static_cast<int32_t>(head));
  }
  return heads;
}

int64_t HopperAttentionWorkspaceBytes(const AttentionBounds& bounds) {
  return cuda::hopper::TableLayout(bounds.num_sequences, bounds.num_q_heads).workspace_bytes();
}

absl::Status HopperAttention(const AttentionParams& params, std::span<const int32_t> heads,
                             Workspace workspace, DType compute_dtype, const DeviceLimits& limits,
                             cudaStream_t stream) {
  using namespace cuda;          // NOLINT(google-build-using-namespace)
  using namespace cuda::hopper;  // NOLINT(google-build-using-namespace)
  if (heads.empty() || params.sequences.empty()) return absl::OkStatus();
  LF_ASSIGN_OR_RETURN(const LaunchFunction launch, Pick(compute_dtype, params.head_dim));
  LF_RETURN_IF_ERROR(attention::CheckAttention(params));
  const SequenceTable sequences =
      attention::SequencesOf(params, static_cast<int64_t>(heads.size()), hopper::kTileRows);
  const int64_t num_sequences = static_cast<int64_t>(sequences.entries.size());
  if (num_sequences == 0) return absl::OkStatus();
  if (sequences.num_items > attention::kMaxItems) {
    return absl::InvalidArgumentError(absl::StrCat("attention: ", sequences.num_items,
                                                   " tiles of 128 rows of a query head exceed ",
                                                   attention::kMaxItems));
  }
  const TableLayout layout(num_sequences, params.num_q_heads);
  LF_RETURN_IF_ERROR(CheckWorkspace("attention", workspace, layout.workspace_bytes()));
  if (!AlignedTo16(workspace.data)) {
    return absl::InvalidArgumentError("attention: the workspace is not aligned to 16 bytes");
  }
  LF_ASSIGN_OR_RETURN(const std::vector<CUtensorMap> tensor_maps,
                      TensorMapsOf(params, compute_dtype, sequences.entries));

  std::vector<char> tables(static_cast<size_t>(layout.size_bytes), 0);
  const auto put = [&](int64_t at, const auto& table) {
    std::memcpy(tables.data() + at, table.data(), table.size() * sizeof(table[0]));
  };
  put(layout.tensor_maps, tensor_maps);
  put(layout.sequences, sequences.entries);
  put(layout.heads, attention::HeadsByKvHead(params, heads));
  put(layout.indices, attention::IndicesOf(params));
  const auto address = reinterpret_cast<uintptr_t>(workspace.data);
  char* base = static_cast<char*>(workspace.data) + (kAlignment - address % kAlignment) % kAlignment;
  LF_RETURN_IF_ERROR(Upload(base, tables.data(), layout.size_bytes, stream));

  Args args = attention::ArgsOf(params);
  args.tensor_maps = base + layout.tensor_maps;
  args.items_taken = reinterpret_cast<int32_t*>(base + layout.items_taken);
  args.head_by_head = true;
  args.sequences = reinterpret_cast<const SequenceEntry*>(base + layout.sequences);
  args.num_sequences = static_cast<int32_t>(num_sequences);
  args.heads = reinterpret_cast<const HeadEntry*>(base + layout.heads);
  args.indices = reinterpret_cast<const IndexView*>(base + layout.indices);
  args.num_items = static_cast<int32_t>(sequences.num_items);
  if (sequences.num_items < kFewTiles * limits.num_sms) {
    LF_RETURN_IF_ERROR(OrderHeads(args, reinterpret_cast<HeadEntry*>(base + layout.heads),
                                  static_cast<int>(heads.size()), stream));
  }
  return launch(args, params.cta_limit, limits, stream);
}

}  // namespace longfill
