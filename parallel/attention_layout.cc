#include "parallel/attention_layout.h"

#include <algorithm>

#include "parallel/piece_layout.h"

namespace longfill {
namespace {

// Of the KV heads that are computed together where they are exchanged.
constexpr int64_t kCpuRoundBytes = int64_t{256} << 20;
constexpr int64_t kDeviceRoundBytes = int64_t{1} << 30;
constexpr int64_t kStagingBytes = int64_t{32} << 20;  // of one exchange, in each direction

int64_t BlocksOf(int64_t tokens) { return (tokens + kTokenBlock - 1) / kTokenBlock; }

}  // namespace

AttentionLayout::AttentionLayout(const KernelSet& kernels, const AttentionGeometry& geometry,
                                 const ShardPlan& plan) {
  const Mesh mesh = plan.mesh();
  head_exchange = mesh.head > 1;
  sequence_exchange = mesh.sequence > 1;
  padded_tokens = BlocksOf(plan.num_tokens()) * kTokenBlock;
  const int64_t group_rows = plan.GroupNumTokens(0);  // the largest
  const int64_t row_bytes = geometry.head_dim * DTypeBytes(kernels.compute_dtype());
  const int64_t rows_per_kv = (head_exchange || sequence_exchange ? 2 * padded_tokens : 0) +
                              (head_exchange && sequence_exchange ? 2 * group_rows : 0) +
                              (head_exchange ? 2 * geometry.q_per_kv() * group_rows : 0);
  const int64_t round_bytes = kernels.device() == DeviceKind::kCpu ? kCpuRoundBytes : kDeviceRoundBytes;
  kv_heads = std::clamp<int64_t>(round_bytes / std::max<int64_t>(1, rows_per_kv * row_bytes), 1,
                                 geometry.num_kv_heads);
  const int64_t q_heads = kv_heads * geometry.q_per_kv();

  // Sent, or received, for one block of each member.
  const int64_t head_bytes = q_heads * mesh.head * kTokenBlock * row_bytes;
  const int64_t key_bytes = kv_heads * mesh.sequence * kTokenBlock * row_bytes;
  const int64_t member_blocks = BlocksOf(plan.NumTokens(0));
  const int64_t group_blocks = BlocksOf(group_rows);
  head_slice = std::clamp<int64_t>(kStagingBytes / head_bytes, 1, std::max<int64_t>(1, member_blocks));
  key_slice = std::clamp<int64_t>(kStagingBytes / key_bytes, 1, std::max<int64_t>(1, group_blocks));

  PieceLayout pieces;
  counts = pieces.Add(2 * static_cast<int64_t>(sizeof(int64_t)));
  if (head_exchange) {
    q = pieces.Add(q_heads * group_rows * row_bytes);
    out = pieces.Add(q_heads * group_rows * row_bytes);
  }
  if (head_exchange && sequence_exchange) {
    group_k = pieces.Add(kv_heads * group_rows * row_bytes);
    group_v = pieces.Add(kv_heads * group_rows * row_bytes);
  }
  if (head_exchange || sequence_exchange) {
    const int64_t staging_bytes =
        std::max(head_exchange ? head_slice * head_bytes : 0, sequence_exchange ? key_slice * key_bytes : 0);
    all_k = pieces.Add(kv_heads * padded_tokens * row_bytes);
    all_v = pieces.Add(kv_heads * padded_tokens * row_bytes);
    send = pieces.Add(staging_bytes);
    recv = pieces.Add(staging_bytes);
  }
  workspace_bytes = kernels.AttentionWorkspaceBytes(
      {.num_q_heads = q_heads, .num_q_rows = group_rows, .head_dim = geometry.head_dim});
  workspace = pieces.Add(workspace_bytes);
  total_bytes = pieces.total_bytes();
}

}  // namespace longfill
