#include "kernels/cuda/attention/attention.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention/attention_check.h"
#include "kernels/cuda/attention/launch_attention.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/upload.h"

namespace longfill::cuda::attention {
namespace {

constexpr int64_t kAlignment = 16;
// Items are counted in 32 bits; each thread block takes one more than there are.
constexpr int64_t kMaxItems = std::numeric_limits<int32_t>::max() - (1 << 20);

// Tiles of these rows, in a launch each.
constexpr int kTileRows[] = {64, 128};
constexpr size_t kNumTileRows = std::size(kTileRows);

// The tables of a call as they lie in the workspace, each aligned.
struct TableLayout {
  TableLayout(int64_t num_sequences, int64_t num_q_heads) {
    const auto place = [&](int64_t bytes) {
      const int64_t at = size_bytes;
      size_bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return at;
    };
    for (size_t i = 0; i < kNumTileRows; ++i) {
      items_taken[i] = place(sizeof(int32_t));
      sequences[i] = place(num_sequences * static_cast<int64_t>(sizeof(SequenceEntry)));
    }
    heads = place(num_q_heads * static_cast<int64_t>(sizeof(HeadEntry)));
    indices = place(num_sequences * num_q_heads * static_cast<int64_t>(sizeof(IndexView)));
  }
  // Byte offsets.
  int64_t items_taken[kNumTileRows] = {};
  int64_t sequences[kNumTileRows] = {};
  int64_t heads = 0, indices = 0;
  int64_t size_bytes = 0;
};

std::vector<HeadEntry> HeadsByKvHead(const AttentionParams& params) {
  const auto kv_head = [&](int64_t head) {
    return params.kv_head.empty() ? static_cast<int32_t>(head / (params.num_q_heads / params.num_kv_heads))
                                  : params.kv_head[static_cast<size_t>(head)];
  };
  std::vector<HeadEntry> entries(static_cast<size_t>(params.num_q_heads));
  for (size_t head = 0; head < entries.size(); ++head) {
    entries[head].head = static_cast<int32_t>(head);
    entries[head].kv_head = kv_head(static_cast<int64_t>(head));
  }
  std::stable_sort(entries.begin(), entries.end(),
                   [](const HeadEntry& a, const HeadEntry& b) { return a.kv_head < b.kv_head; });
  for (size_t begin = 0; begin < entries.size();) {
    size_t end = begin;
    while (end < entries.size() && entries[end].kv_head == entries[begin].kv_head) ++end;
    for (size_t i = begin; i < end; ++i) {
      entries[i].group_begin = static_cast<int32_t>(begin);
      entries[i].group_size = static_cast<int32_t>(end - begin);
    }
    begin = end;
  }
  return entries;
}

// Tiles that may hold rows: where the map deals whole ones, exactly those that do.
struct Tiles {
  PositionMap map;
  int64_t count = 0;
};
Tiles TilesOf(const PositionMap& map, int64_t num_rows, int64_t tile_rows) {
  if (map.first % tile_rows == 0 && map.block % tile_rows == 0 && map.stride % tile_rows == 0) {
    return {{map.first / tile_rows, map.block / tile_rows, map.stride / tile_rows},
            (num_rows + tile_rows - 1) / tile_rows};
  }
  const int64_t first = map.first / tile_rows;
  return {PositionMap::Contiguous(first), map.Position(num_rows - 1) / tile_rows - first + 1};
}

struct SequenceTable {
  std::vector<SequenceEntry> entries;
  int64_t num_items = 0;
};

SequenceTable SequencesOf(const AttentionParams& params, int64_t tile_rows) {
  SequenceTable table;
  int64_t num_with_rows = 0;
  for (const AttentionSequence& sequence : params.sequences) {
    if (sequence.q_begin == sequence.q_end) continue;
    SequenceEntry entry;
    entry.q_begin = sequence.q_begin;
    entry.num_rows = sequence.q_end - sequence.q_begin;
    entry.q_positions = sequence.q_positions;
    const Tiles tiles = TilesOf(sequence.q_positions, entry.num_rows, tile_rows);
    entry.tiles = tiles.map;
    entry.num_tiles = static_cast<int32_t>(tiles.count);
    entry.first_item = static_cast<int32_t>(std::min(table.num_items, kMaxItems));
    entry.k_row_of_0 = sequence.k_begin - sequence.key_first;
    if (sequence.key_range_begin < sequence.key_range_end) {
      // Keys beyond the prompt take no part; this keeps positions within 32 bits.
      entry.key_range_begin = static_cast<int32_t>(std::min(sequence.key_range_begin, sequence.num_tokens));
      entry.key_range_end = static_cast<int32_t>(std::min(sequence.key_range_end, sequence.num_tokens));
    }
    entry.first_index = num_with_rows++ * params.num_q_heads;
    table.entries.push_back(entry);
    table.num_items += tiles.count * params.num_q_heads;
  }
  return table;
}

std::vector<IndexView> IndicesOf(const AttentionParams& params) {
  std::vector<IndexView> indices;
  for (const AttentionSequence& sequence : params.sequences) {
    if (sequence.q_begin == sequence.q_end) continue;
    indices.insert(indices.end(), sequence.indices.begin(), sequence.indices.end());
  }
  return indices;
}

using LaunchFunction = absl::Status (*)(const Args&, int, const DeviceLimits&, cudaStream_t);

using LaunchFunctions = std::array<LaunchFunction, kNumTileRows>;

template <DType kDType, int kHeadDim>
constexpr LaunchFunctions kLaunches = {LaunchAttention<kDType, kHeadDim, kTileRows[0]>,
                                       LaunchAttention<kDType, kHeadDim, kTileRows[1]>};

template <DType kDType>
LaunchFunctions PickHeadDim(int64_t head_dim) {
  switch (head_dim) {
    case 64:
      return kLaunches<kDType, 64>;
    case 96:
      return kLaunches<kDType, 96>;
    case 128:
      return kLaunches<kDType, 128>;
    case 256:
      return kLaunches<kDType, 256>;
    default:
      return {};
  }
}

absl::StatusOr<LaunchFunctions> Pick(DType dtype, int64_t head_dim) {
  LaunchFunctions launches = {};
  if (dtype == DType::kBFloat16) launches = PickHeadDim<DType::kBFloat16>(head_dim);
  if (dtype == DType::kFloat16) launches = PickHeadDim<DType::kFloat16>(head_dim);
  if (launches[0] != nullptr) return launches;
  return absl::UnimplementedError(
      absl::StrCat("attention: no variant for head_dim ", head_dim, " in ",
                   absl::string_view(DTypeName(dtype).data(), DTypeName(dtype).size()),
                   "; there are 64, 96, 128 and 256 in bfloat16 and float16"));
}

Args ArgsOf(const AttentionParams& params) {
  Args args;
  args.q = params.q.data;
  args.k = params.k.data;
  args.v = params.v.data;
  args.out = params.out.data;
  args.lse = params.lse;
  args.q_head_stride = params.q.head_stride;
  args.q_row_stride = params.q.row_stride;
  args.k_head_stride = params.k.head_stride;
  args.k_row_stride = params.k.row_stride;
  args.v_head_stride = params.v.head_stride;
  args.v_row_stride = params.v.row_stride;
  args.out_head_stride = params.out.head_stride;
  args.out_row_stride = params.out.row_stride;
  args.lse_head_stride = params.lse_head_stride;
  args.scale = params.scale;
  args.merge = params.merge;
  args.covered_pairs = reinterpret_cast<unsigned long long*>(params.covered_pairs);
  args.computed_pairs = reinterpret_cast<unsigned long long*>(params.computed_pairs);
  return args;
}

}  // namespace
}  // namespace longfill::cuda::attention

namespace longfill {

int64_t CudaAttentionWorkspaceBytes(const AttentionBounds& bounds) {
  return cuda::attention::TableLayout(bounds.num_sequences, bounds.num_q_heads).size_bytes;
}

absl::Status CudaAttention(const AttentionParams& params, Workspace workspace, DType compute_dtype,
                           const DeviceLimits& limits, cudaStream_t stream) {
  using namespace cuda;             // NOLINT(google-build-using-namespace)
  using namespace cuda::attention;  // NOLINT(google-build-using-namespace)
  LF_RETURN_IF_ERROR(CheckAtLeast("attention", "num_q_heads", params.num_q_heads, 0));
  if (params.num_q_heads == 0 || params.sequences.empty()) return absl::OkStatus();
  LF_ASSIGN_OR_RETURN(const LaunchFunctions launches, Pick(compute_dtype, params.head_dim));
  LF_RETURN_IF_ERROR(CheckAttention(params));
  std::array<SequenceTable, kNumTileRows> sequences;
  for (size_t i = 0; i < kNumTileRows; ++i) sequences[i] = SequencesOf(params, kTileRows[i]);
  const int64_t num_sequences = static_cast<int64_t>(sequences[0].entries.size());
  if (num_sequences == 0) return absl::OkStatus();
  if (sequences[0].num_items > kMaxItems) {
    return absl::InvalidArgumentError(absl::StrCat("attention: ", sequences[0].num_items,
                                                   " tiles of 64 rows of a query head exceed ", kMaxItems));
  }
  const TableLayout layout(num_sequences, params.num_q_heads);
  LF_RETURN_IF_ERROR(CheckWorkspace("attention", workspace, layout.size_bytes));
  if (!AlignedTo16(workspace.data)) {
    return absl::InvalidArgumentError("attention: the workspace is not aligned to 16 bytes");
  }

  std::vector<char> tables(static_cast<size_t>(layout.size_bytes), 0);
  const auto put = [&](int64_t at, const auto& table) {
    std::memcpy(tables.data() + at, table.data(), table.size() * sizeof(table[0]));
  };
  for (size_t i = 0; i < kNumTileRows; ++i) put(layout.sequences[i], sequences[i].entries);
  put(layout.heads, HeadsByKvHead(params));
  put(layout.indices, IndicesOf(params));
  LF_RETURN_IF_ERROR(Upload(workspace.data, tables.data(), layout.size_bytes, stream));

  const char* base = static_cast<const char*>(workspace.data);
  Args args = ArgsOf(params);
  args.num_sequences = static_cast<int32_t>(num_sequences);
  args.heads = reinterpret_cast<const HeadEntry*>(base + layout.heads);
  args.indices = reinterpret_cast<const IndexView*>(base + layout.indices);
  for (size_t i = 0; i < kNumTileRows; ++i) {
    args.sequences = reinterpret_cast<const SequenceEntry*>(base + layout.sequences[i]);
    args.items_taken = reinterpret_cast<int32_t*>(static_cast<char*>(workspace.data) + layout.items_taken[i]);
    args.num_items = static_cast<int32_t>(sequences[i].num_items);
    LF_RETURN_IF_ERROR(launches[i](args, params.cta_limit, limits, stream));
  }
  return absl::OkStatus();
}

}  // namespace longfill
