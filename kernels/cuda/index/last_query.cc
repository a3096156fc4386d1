#include "kernels/cuda/index/last_query.h"

#include <algorithm>
#include <numbers>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/hopper/index/last_query.h"
#include "kernels/cuda/index/last_query_args.h"

namespace longfill {
namespace {

constexpr char kOperation[] = "last-query scores";
constexpr int kResidentThreadBlocks = 2;  // of an SM: their registers fill it
constexpr int64_t kMaxPosition = (int64_t{1} << 31) - 1;

int64_t NumBlocks(int64_t num_keys) { return (num_keys + kSelectionBlock - 1) / kSelectionBlock; }

bool IsWholePrompt(const LastQueryParams& params) {
  return params.key_positions.Position(0) == 0 && params.key_positions.IsOnePiece(params.num_keys);
}

absl::Status CheckLayout(const LastQueryParams& params) {
  const HeadsView<const void>& q = params.q;
  const HeadsView<const void>& k = params.k;
  if (!cuda::AlignedTo16(q.data, 2 * q.head_stride, 2 * q.row_stride, k.data, 2 * k.head_stride,
                         2 * k.row_stride)) {
    return absl::InvalidArgumentError(absl::StrCat(
        kOperation, ": rows must be aligned to 16 bytes, row strides are ", q.row_stride, " of q and ",
        k.row_stride, " of k, head strides ", q.head_stride, " and ", k.head_stride));
  }
  const PositionMap& map = params.key_positions;
  if (!map.Ascends() || (!map.HasWholeBlocks(kSelectionBlock) && !IsWholePrompt(params))) {
    return absl::InvalidArgumentError(absl::StrCat(kOperation, ": keys at ", ToString(map),
                                                   ", which must ascend in multiples of ", kSelectionBlock));
  }
  const int64_t last_query = params.first_query_position + params.num_queries - 1;
  const int64_t last_key = params.num_keys == 0 ? 0 : map.Position(params.num_keys - 1);
  if (params.first_query_position < 0 || last_query > kMaxPosition || last_key > kMaxPosition) {
    return absl::InvalidArgumentError(absl::StrCat(kOperation, ": positions up to ", last_query,
                                                   " of queries and ", last_key, " of keys, the limit is ",
                                                   kMaxPosition));
  }
  return absl::OkStatus();
}

absl::Status Check(const LastQueryParams& params, Workspace workspace, DType dtype) {
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    return absl::UnimplementedError(
        absl::StrCat(kOperation, ": no variant for dtype ", std::string(DTypeName(dtype))));
  }
  constexpr int64_t kHeadDims[] = {64, 96, 128, 256};
  if (std::find(std::begin(kHeadDims), std::end(kHeadDims), params.head_dim) == std::end(kHeadDims)) {
    return absl::UnimplementedError(absl::StrCat(kOperation, ": no variant for head_dim ", params.head_dim,
                                                 ", only for 64, 96, 128 and 256"));
  }
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(kOperation, "num_keys", params.num_keys, 0));
  LF_RETURN_IF_ERROR(cuda::CheckAtLeast(kOperation, "num_kv_heads", params.num_kv_heads, 1));
  if (params.num_queries < 1 || params.num_queries > kMaxSelectingQueries) {
    return absl::InvalidArgumentError(absl::StrCat(kOperation, ": num_queries ", params.num_queries,
                                                   " outside of [1, ", kMaxSelectingQueries, "]"));
  }
  if (!(params.scale > 0)) {
    return absl::InvalidArgumentError(absl::StrCat(kOperation, ": scale ", params.scale, " is not positive"));
  }
  if (params.num_q_heads < 1 || params.num_q_heads % params.num_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(kOperation, ": ", params.num_q_heads,
                                                   " query heads do not divide among ", params.num_kv_heads,
                                                   " KV heads"));
  }
  for (const int32_t head : params.heads) {
    if (head < 0 || head >= params.num_q_heads) {
      return absl::InvalidArgumentError(
          absl::StrCat(kOperation, ": query head ", head, " of ", params.num_q_heads));
    }
  }
  LF_RETURN_IF_ERROR(CheckLayout(params));
  return cuda::CheckWorkspace(kOperation, workspace,
                              CudaLastQueryWorkspaceBytes(static_cast<int64_t>(params.heads.size()),
                                                          params.num_keys, params.head_dim));
}

// The heads of the call by KV head, cut into groups of at most `max_heads`.
std::vector<LastQueryGroup> MakeGroups(const LastQueryParams& params, int max_heads) {
  const int64_t queries_per_kv = params.num_q_heads / params.num_kv_heads;
  const auto kv_head = [&](int32_t list) {
    return static_cast<int32_t>(params.heads[static_cast<size_t>(list)] / queries_per_kv);
  };
  std::vector<int32_t> lists(params.heads.size());
  std::iota(lists.begin(), lists.end(), 0);
  std::stable_sort(lists.begin(), lists.end(), [&](int32_t a, int32_t b) { return kv_head(a) < kv_head(b); });
  std::vector<LastQueryGroup> groups;
  for (const int32_t list : lists) {
    if (groups.empty() || groups.back().kv_head != kv_head(list) || groups.back().num_heads == max_heads) {
      groups.push_back({.kv_head = kv_head(list)});
    }
    LastQueryGroup& group = groups.back();
    group.head[group.num_heads] = params.heads[static_cast<size_t>(list)];
    group.list[group.num_heads] = list;
    ++group.num_heads;
  }
  return groups;
}

struct RingShape {
  int64_t slot_bytes = 0;
  int units = 0;  // pairs of a head and a key block at a time
};
template <int kHeadDim>
constexpr RingShape kRingShape = {LastQueryShape<kHeadDim>::kSlotBytes, LastQueryShape<kHeadDim>::kUnits};

RingShape RingShapeOf(int64_t head_dim) {
  switch (head_dim) {
    case 64:
      return kRingShape<64>;
    case 96:
      return kRingShape<96>;
    case 128:
      return kRingShape<128>;
    default:
      return kRingShape<256>;
  }
}

// About equal bytes in flight for each number of blocks, as far as they fit beside what the kernels keep.
int RingStages(int blocks_at_once, int64_t slot_bytes, const DeviceLimits& limits) {
  int stages = blocks_at_once == 1 ? 4 : blocks_at_once == 2 ? 3 : 2;
  while (stages > 2 &&
         stages * blocks_at_once * slot_bytes + kMaxLastQueryTileBytes > limits.shared_bytes_per_block) {
    --stages;
  }
  return stages;
}

LastQueryArgs ArgsWithoutGroups(const LastQueryParams& params) {
  LastQueryArgs args;
  args.q = params.q.data;
  args.q_head_stride = params.q.head_stride;
  args.q_row_stride = params.q.row_stride;
  args.k = params.k.data;
  args.k_head_stride = params.k.head_stride;
  args.k_row_stride = params.k.row_stride;
  args.num_queries = static_cast<int32_t>(params.num_queries);
  args.last_query_position = static_cast<int32_t>(params.first_query_position + params.num_queries - 1);
  args.num_keys = params.num_keys;
  args.num_blocks = static_cast<int32_t>(NumBlocks(params.num_keys));
  const PositionMap blocks = params.key_positions.IsOnePiece(params.num_keys)
                                 ? PositionMap{.first = params.key_positions.Position(0) / kSelectionBlock,
                                               .block = args.num_blocks + 1,
                                               .stride = args.num_blocks + 1}
                                 : params.key_positions.OfBlocks(kSelectionBlock);
  args.blocks = {.first = static_cast<uint32_t>(blocks.first),
                 .of_piece = static_cast<uint32_t>(blocks.block),
                 .stride = static_cast<uint32_t>(blocks.stride),
                 .odd_shift = static_cast<uint32_t>(blocks.odd_shift),
                 .skipped = static_cast<uint32_t>(blocks.skipped)};
  args.scale = params.scale;
  args.scale_log2 = static_cast<float>(static_cast<double>(params.scale) * std::numbers::log2e);
  return args;
}

// Calls launch(args) with as many of the groups as a launch takes, until all had their turn.
template <typename Launch>
absl::Status ForGroups(const std::vector<LastQueryGroup>& groups, LastQueryArgs args, const Launch& launch) {
  for (size_t begin = 0; begin < groups.size(); begin += kMaxLastQueryGroups) {
    args.num_groups = static_cast<int32_t>(std::min<size_t>(kMaxLastQueryGroups, groups.size() - begin));
    std::copy_n(groups.begin() + static_cast<int64_t>(begin), args.num_groups, args.groups);
    LF_RETURN_IF_ERROR(launch(args));
  }
  return absl::OkStatus();
}

// Calls launch(args, grid, ring_bytes) for every launch of the general kernels that the heads of the call
// need.
template <typename LaunchPass>
absl::Status ForEachLaunch(const LastQueryParams& params, const DeviceLimits& limits,
                           const LaunchPass& launch) {
  LastQueryArgs all = ArgsWithoutGroups(params);
  const RingShape ring = RingShapeOf(params.head_dim);
  const std::vector<LastQueryGroup> groups = MakeGroups(params, ring.units);
  int most_heads = 1;
  for (const LastQueryGroup& group : groups) most_heads = std::max(most_heads, group.num_heads);
  const int heads_at_once = most_heads > 2 ? 4 : most_heads;
  all.blocks_at_once = ring.units / heads_at_once;
  all.ring_stages = RingStages(all.blocks_at_once, ring.slot_bytes, limits);
  return ForGroups(groups, all, [&](LastQueryArgs args) {
    // One wave of thread blocks, each with an equal stretch of keys.
    const int64_t most_stretches =
        std::max<int64_t>(1, int64_t{limits.num_sms} * kResidentThreadBlocks / args.num_groups);
    const int64_t turns = (args.num_blocks + args.blocks_at_once - 1) / args.blocks_at_once;
    const int64_t turns_each = (turns + most_stretches - 1) / most_stretches;
    args.blocks_per_stretch = static_cast<int32_t>(turns_each * args.blocks_at_once);
    const int64_t stretches = (args.num_blocks + args.blocks_per_stretch - 1) / args.blocks_per_stretch;
    return launch(args, stretches * args.num_groups,
                  args.ring_stages * args.blocks_at_once * ring.slot_bytes);
  });
}

// Calls launch(keys, args, grid) for every launch of the kernels of compute capability 9.0.
template <typename LaunchPass>
absl::Status ForEachHopperLaunch(const LastQueryParams& params, DType dtype, const DeviceLimits& limits,
                                 const LaunchPass& launch) {
  CUtensorMap keys;
  LF_RETURN_IF_ERROR(MapLastQueryKeys(params, dtype, &keys));
  return ForGroups(MakeGroups(params, kLastQueryWarps), ArgsWithoutGroups(params),
                   [&](const LastQueryArgs& args) {
                     const int64_t pairs = int64_t{args.num_groups} * args.num_blocks;
                     return launch(keys, args, std::min<int64_t>(limits.num_sms, pairs));
                   });
}

}  // namespace

int64_t CudaLastQueryWorkspaceBytes(int64_t num_heads, int64_t num_keys, int64_t) {
  return num_heads * NumBlocks(num_keys) * kMaxSelectingQueries *
         static_cast<int64_t>(sizeof(BlockStatistics));
}

absl::Status CudaLastQueryRowMax(const LastQueryParams& params, float* row_max, Workspace workspace,
                                 DType compute_dtype, const DeviceLimits& limits, cudaStream_t stream) {
  if (params.heads.empty()) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params, workspace, compute_dtype));
  const int64_t rows = static_cast<int64_t>(params.heads.size()) * kMaxSelectingQueries;
  LF_RETURN_IF_ERROR(LaunchLastQueryMaxStart(row_max, rows, stream));
  if (params.num_keys == 0) return absl::OkStatus();
  auto* statistics = static_cast<BlockStatistics*>(workspace.data);
  if (HasHopperLastQuery(params, limits)) {
    return ForEachHopperLaunch(params, compute_dtype, limits,
                               [&](const CUtensorMap& keys, const LastQueryArgs& args, int64_t grid) {
                                 return LaunchHopperLastQueryMax(keys, args, params.head_dim, compute_dtype,
                                                                 grid, statistics, row_max, stream);
                               });
  }
  return ForEachLaunch(params, limits, [&](const LastQueryArgs& args, int64_t grid, int64_t ring_bytes) {
    return LaunchLastQueryMax(args, params.head_dim, compute_dtype, grid, ring_bytes, statistics, row_max,
                              stream);
  });
}

absl::Status CudaLastQueryRowSum(const LastQueryParams& params, const float* row_max, uint64_t* row_sum,
                                 Workspace workspace, DType compute_dtype, const DeviceLimits&,
                                 cudaStream_t stream) {
  if (params.heads.empty()) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params, workspace, compute_dtype));
  const int64_t num_lists = static_cast<int64_t>(params.heads.size());
  LF_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(
      row_sum, 0, static_cast<size_t>(num_lists * kMaxSelectingQueries) * sizeof(uint64_t), stream));
  return LaunchLastQuerySum(static_cast<const BlockStatistics*>(workspace.data), num_lists,
                            NumBlocks(params.num_keys), static_cast<int>(params.num_queries), row_max,
                            row_sum, stream);
}

absl::Status CudaLastQueryScore(const LastQueryParams& params, const float* row_max, const uint64_t* row_sum,
                                const LastQueryScores& scores, Workspace workspace, DType compute_dtype,
                                const DeviceLimits& limits, cudaStream_t stream) {
  if (params.heads.empty() || params.num_keys == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params, workspace, compute_dtype));
  LF_RETURN_IF_ERROR(
      cuda::CheckAtLeast(kOperation, "vertical_stride", scores.vertical_stride, params.num_keys));
  if (HasHopperLastQuery(params, limits)) {
    return ForEachHopperLaunch(params, compute_dtype, limits,
                               [&](const CUtensorMap& keys, const LastQueryArgs& args, int64_t grid) {
                                 return LaunchHopperLastQueryScore(keys, args, params.head_dim, compute_dtype,
                                                                   grid, row_max, row_sum, scores, stream);
                               });
  }
  return ForEachLaunch(params, limits, [&](const LastQueryArgs& args, int64_t grid, int64_t ring_bytes) {
    return LaunchLastQueryScore(args, params.head_dim, compute_dtype, grid, ring_bytes, row_max, row_sum,
                                scores, stream);
  });
}

}  // namespace longfill
