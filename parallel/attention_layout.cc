#include "parallel/attention_layout.h"

#include <algorithm>

#include "kernels/base/piece_layout.h"

namespace longfill {
namespace {

// Of what one round receives. On a device a prompt that is worth it takes several, so that exchanges run
// beside compute.
constexpr int64_t kCpuRoundBytes = int64_t{256} << 20;
constexpr int64_t kDeviceRoundBytes = int64_t{2} << 30;
constexpr int64_t kOneRoundBytes = int64_t{128} << 20;
// Each has an end at which some multiprocessors wait for others. What peers are read for takes less than the
// query projection, which runs beside the first round.
constexpr int64_t kRounds = 4;
constexpr int64_t kRoundsFromPeers = 2;
// Of the KV heads in the first round where those of other hosts come before it.
constexpr int64_t kFirstRelayedShare = 8;
// Of one exchange, in each direction. A device is given some copies for each, whatever their size.
constexpr int64_t kCpuStagingBytes = int64_t{32} << 20;
constexpr int64_t kDeviceStagingBytes = int64_t{128} << 20;

// `all_bytes`: of all KV heads.
int64_t RoundBytes(DeviceKind device, int64_t all_bytes, bool from_peers) {
  if (device == DeviceKind::kCpu) return kCpuRoundBytes;
  const int64_t rounds = from_peers ? kRoundsFromPeers : kRounds;
  return all_bytes <= kOneRoundBytes ? kOneRoundBytes : std::min(kDeviceRoundBytes, all_bytes / rounds);
}

}  // namespace

AttentionLayout::AttentionLayout(const KernelSet& kernels, const AttentionGeometry& geometry,
                                 const ShardPlan& plan, const Options& options) {
  const Mesh mesh = plan.mesh();
  head_exchange = mesh.head > 1;
  sequence_exchange = mesh.sequence > 1;
  const bool exchanges = head_exchange || sequence_exchange;
  padded_tokens = TokenBlocksOf(plan.num_tokens()) * kTokenBlock;
  const int64_t group_rows = plan.MostGroupTokens();
  const int64_t row_bytes = geometry.head_dim * DTypeBytes(kernels.compute_dtype());
  const int64_t rows_per_kv =
      (exchanges ? 2 * padded_tokens : 0) + (head_exchange ? 2 * geometry.q_per_kv() * group_rows : 0);
  const int64_t head_bytes_received = std::max<int64_t>(1, rows_per_kv * row_bytes);
  const int64_t round_bytes =
      options.round_bytes > 0
          ? options.round_bytes
          : RoundBytes(kernels.device(), head_bytes_received * geometry.num_kv_heads, options.from_peers);
  kv_heads = std::clamp<int64_t>(round_bytes / head_bytes_received, 1, geometry.num_kv_heads);
  one_place = kv_heads == geometry.num_kv_heads;  // one round on every rank that computes all heads
  first_kv_heads = exchanges && !one_place && !options.from_peers ? (kv_heads + 1) / 2 : kv_heads;
  for (Received& place : received) place.kv_heads = kv_heads;
  if (options.relayed && !one_place) {
    first_kv_heads =
        std::min(kv_heads, (geometry.num_kv_heads + kFirstRelayedShare - 1) / kFirstRelayedShare);
    if (geometry.num_kv_heads <= 2 * kv_heads) {  // two rounds, in the memory of two equal ones
      kv_heads = geometry.num_kv_heads - first_kv_heads;
      received[0].kv_heads = first_kv_heads;
      received[1].kv_heads = kv_heads;
    }
  }
  const int64_t slice_bytes = kernels.device() == DeviceKind::kCpu ? kCpuStagingBytes : kDeviceStagingBytes;
  const int64_t q_heads = kv_heads * geometry.q_per_kv();

  // Sent, or received, for one block of each member.
  const int64_t head_bytes = q_heads * mesh.head * plan.deal_block() * row_bytes;
  const int64_t key_bytes = kv_heads * mesh.sequence * plan.deal_block() * row_bytes;
  const int64_t member_blocks = plan.DealtBlocks(plan.MostTokens());
  const int64_t group_blocks = plan.DealtBlocks(group_rows);
  head_slice = std::clamp<int64_t>(slice_bytes / head_bytes, 1, std::max<int64_t>(1, member_blocks));
  key_slice = std::clamp<int64_t>(slice_bytes / key_bytes, 1, std::max<int64_t>(1, group_blocks));

  PieceLayout pieces;
  counts = pieces.Add(2 * static_cast<int64_t>(sizeof(int64_t)));
  if (options.from_peers) word = pieces.Add(static_cast<int64_t>(sizeof(int64_t)));
  for (Received& place : received) {
    if (&place != &received[0] && one_place) {
      place = received[0];
      continue;
    }
    if (head_exchange) {
      place.q = pieces.Add(q_heads * group_rows * row_bytes);
      place.out = pieces.Add(q_heads * group_rows * row_bytes);
    }
    if (exchanges) {
      place.all_k = pieces.Add(place.kv_heads * padded_tokens * row_bytes);
      place.all_v = pieces.Add(place.kv_heads * padded_tokens * row_bytes);
    }
  }
  if (head_exchange && sequence_exchange) {
    group_k = pieces.Add(kv_heads * group_rows * row_bytes);
    group_v = pieces.Add(kv_heads * group_rows * row_bytes);
  }
  if (exchanges && !options.from_peers) {
    const int64_t staging_bytes =
        std::max(head_exchange ? head_slice * head_bytes : 0, sequence_exchange ? key_slice * key_bytes : 0);
    send = pieces.Add(staging_bytes);
    recv = pieces.Add(staging_bytes);
  }
  if (geometry.dual_chunk.Splits(plan.num_tokens())) {
    const int64_t blocks = slice_bytes / (q_heads * kTokenBlock * row_bytes);
    rotated_rows =
        std::clamp<int64_t>(blocks, 1, std::max<int64_t>(1, TokenBlocksOf(group_rows))) * kTokenBlock;
    rotated_q = pieces.Add(q_heads * rotated_rows * row_bytes);
    rotated_lse = pieces.Add(q_heads * rotated_rows * static_cast<int64_t>(sizeof(float)));
  }
  if (options.num_sampled > 0) {
    constexpr auto kFloat = static_cast<int64_t>(sizeof(float));
    lse = pieces.Add(q_heads * group_rows * kFloat);
    sampled_lse = pieces.Add(geometry.num_q_heads * options.num_sampled * kFloat);
  }
  workspace_bytes = kernels.AttentionWorkspaceBytes(
      {.num_q_heads = q_heads, .num_q_rows = group_rows, .head_dim = geometry.head_dim});
  workspace = pieces.Add(workspace_bytes);
  total_bytes = pieces.total_bytes();
}

}  // namespace longfill
