#include "kernels/cpu/last_query.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/last_query_simd.h"
#include "kernels/cpu/workspace.h"

namespace longfill {
namespace {

static_assert(kMaxSelectingQueries == kTileLanes);
constexpr int64_t kBlocksPerTask =
    8;  // 1024 keys: their exponentials stay exact in fp64 until they are added up
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t PartBytes(int64_t head_dim) {
  return (head_dim + kSelectionBlock) * kTileLanes * static_cast<int64_t>(sizeof(float));
}

int64_t NumBlocks(const LastQueryParams& params) {
  return (params.num_keys + kSelectionBlock - 1) / kSelectionBlock;
}

absl::Status Check(const LastQueryParams& params, Workspace workspace, int num_threads) {
  LF_RETURN_IF_ERROR(CheckHeadDim("last-query scores", params.head_dim));
  LF_RETURN_IF_ERROR(CheckAtLeast("last-query scores", "num_keys", params.num_keys, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("last-query scores", "num_kv_heads", params.num_kv_heads, 1));
  if (params.num_queries < 1 || params.num_queries > kMaxSelectingQueries) {
    return absl::InvalidArgumentError(absl::StrCat("last-query scores: num_queries ", params.num_queries,
                                                   " outside of [1, ", kMaxSelectingQueries, "]"));
  }
  if (params.num_q_heads < 1 || params.num_q_heads % params.num_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("last-query scores: ", params.num_q_heads,
                                                   " query heads do not divide among ", params.num_kv_heads,
                                                   " KV heads"));
  }
  for (int32_t head : params.heads) {
    if (head < 0 || head >= params.num_q_heads) {
      return absl::InvalidArgumentError(
          absl::StrCat("last-query scores: query head ", head, " of ", params.num_q_heads));
    }
  }
  const PositionMap& map = params.key_positions;
  const auto is_whole_prompt = [&] { return map.Position(0) == 0 && map.IsOnePiece(params.num_keys); };
  if (!map.Ascends() || (!map.HasWholeBlocks(kSelectionBlock) && !is_whole_prompt())) {
    return absl::InvalidArgumentError(absl::StrCat("last-query scores: keys at ", ToString(map),
                                                   ", which must ascend in multiples of ", kSelectionBlock));
  }
  return CheckWorkspace("last-query scores", workspace,
                        CpuLastQueryWorkspaceBytes(params.head_dim, num_threads));
}

// Calls body(list, tile, first_block, end_block) for all heads and stretches of key blocks, queries packed.
template <typename Body>
void ForKeyStretches(const LastQueryParams& params, Workspace workspace, ThreadPool& pool, const Body& body) {
  const int64_t num_blocks = NumBlocks(params);
  const int64_t stretches = (num_blocks + kBlocksPerTask - 1) / kBlocksPerTask;
  const int64_t num_heads = static_cast<int64_t>(params.heads.size());
  pool.ParallelFor(num_heads * stretches, [&](int64_t task, int worker) {
    const int64_t list = task / stretches;
    const int64_t first_block = task % stretches * kBlocksPerTask;
    float* queries = reinterpret_cast<float*>(PartOf(workspace, worker, PartBytes(params.head_dim)));
    const float* q = static_cast<const float*>(params.q.data) +
                     params.heads[static_cast<size_t>(list)] * params.q.head_stride;
    for (int64_t i = 0; i < params.head_dim; ++i) {
      for (int64_t lane = 0; lane < kTileLanes; ++lane) {
        queries[i * kTileLanes + lane] =
            lane < params.num_queries ? q[(params.num_queries - 1 - lane) * params.q.row_stride + i] : 0.0F;
      }
    }
    LastQueryTile tile;
    tile.queries = queries;
    tile.scores = queries + params.head_dim * kTileLanes;
    tile.head_dim = params.head_dim;
    tile.num_queries = params.num_queries;
    tile.scale = params.scale;
    body(list, tile, first_block, std::min(num_blocks, first_block + kBlocksPerTask));
  });
}

LastQueryKeys KeysOfBlock(const LastQueryParams& params, int64_t list, int64_t block) {
  const int64_t group = params.num_q_heads / params.num_kv_heads;
  const float* k = static_cast<const float*>(params.k.data) +
                   params.heads[static_cast<size_t>(list)] / group * params.k.head_stride;
  const int64_t begin = block * kSelectionBlock;
  LastQueryKeys keys;
  keys.num_keys = std::min(params.num_keys, begin + kSelectionBlock) - begin;
  for (int64_t i = 0; i < keys.num_keys; ++i) keys.rows[i] = k + (begin + i) * params.k.row_stride;
  keys.last_distance =
      params.first_query_position + params.num_queries - 1 - params.key_positions.Position(begin);
  return keys;
}

// Arrays of [list][64] are by query; lanes are queries in reverse.
template <typename T>
void Reverse(const T* by_query, int64_t num_queries, T fill, T* by_lane) {
  for (int64_t lane = 0; lane < kTileLanes; ++lane) {
    by_lane[lane] = lane < num_queries ? by_query[num_queries - 1 - lane] : fill;
  }
}

void AtomicMax(float& target, float value) {
  std::atomic_ref<float> shared(target);
  float seen = shared.load(std::memory_order_relaxed);
  while (value > seen && !shared.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

}  // namespace

int64_t CpuLastQueryWorkspaceBytes(int64_t head_dim, int num_threads) {
  return PartsBytes(num_threads, PartBytes(head_dim));
}

absl::Status CpuLastQueryRowMax(const LastQueryParams& params, float* row_max, Workspace workspace,
                                ThreadPool& pool) {
  if (params.heads.empty()) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params, workspace, pool.num_threads()));
  std::fill_n(row_max, static_cast<int64_t>(params.heads.size()) * kTileLanes, -kInfinity);
  ForKeyStretches(params, workspace, pool,
                  [&](int64_t list, const LastQueryTile& tile, int64_t block, int64_t end_block) {
                    float max[kTileLanes];
                    std::fill_n(max, kTileLanes, -kInfinity);
                    for (; block < end_block; ++block)
                      LastQueryMax(tile, KeysOfBlock(params, list, block), max);
                    float* out = row_max + list * kTileLanes;
                    for (int64_t i = 0; i < params.num_queries; ++i) {
                      // Adding 0 turns -0 into 0, which of the two is the maximum depends on the order.
                      AtomicMax(out[i], max[params.num_queries - 1 - i] + 0.0F);
                    }
                  });
  return absl::OkStatus();
}

absl::Status CpuLastQueryRowSum(const LastQueryParams& params, const float* row_max, uint64_t* row_sum,
                                Workspace workspace, ThreadPool& pool) {
  if (params.heads.empty()) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params, workspace, pool.num_threads()));
  std::fill_n(row_sum, static_cast<int64_t>(params.heads.size()) * kTileLanes, uint64_t{0});
  ForKeyStretches(params, workspace, pool,
                  [&](int64_t list, const LastQueryTile& tile, int64_t block, int64_t end_block) {
                    float max[kTileLanes];
                    double sum[kTileLanes] = {};
                    Reverse(row_max + list * kTileLanes, params.num_queries, 0.0F, max);
                    for (; block < end_block; ++block) {
                      LastQuerySum(tile, KeysOfBlock(params, list, block), max, sum);
                    }
                    uint64_t* out = row_sum + list * kTileLanes;
                    for (int64_t i = 0; i < params.num_queries; ++i) {
                      std::atomic_ref<uint64_t>(out[i]).fetch_add(
                          static_cast<uint64_t>(sum[params.num_queries - 1 - i]), std::memory_order_relaxed);
                    }
                  });
  return absl::OkStatus();
}

absl::Status CpuLastQueryScore(const LastQueryParams& params, const float* row_max, const uint64_t* row_sum,
                               const LastQueryScores& scores, Workspace workspace, ThreadPool& pool) {
  if (params.heads.empty()) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params, workspace, pool.num_threads()));
  LF_RETURN_IF_ERROR(
      CheckAtLeast("last-query scores", "vertical_stride", scores.vertical_stride, params.num_keys));
  const int64_t num_blocks = NumBlocks(params);
  ForKeyStretches(
      params, workspace, pool,
      [&](int64_t list, const LastQueryTile& tile, int64_t block, int64_t end_block) {
        float max[kTileLanes];
        float inverse_sum[kTileLanes];
        Reverse(row_max + list * kTileLanes, params.num_queries, 0.0F, max);
        for (int64_t lane = 0; lane < kTileLanes; ++lane) {
          const int64_t query = params.num_queries - 1 - lane;
          const uint64_t sum = query >= 0 ? row_sum[list * kTileLanes + query] : 0;
          inverse_sum[lane] = sum == 0 ? 0.0F : static_cast<float>(0x1p40 / static_cast<double>(sum));
        }
        for (; block < end_block; ++block) {
          LastQueryProbabilities(tile, KeysOfBlock(params, list, block), max, inverse_sum,
                                 scores.vertical + list * scores.vertical_stride + block * kSelectionBlock,
                                 scores.slash + (list * num_blocks + block) * kDiagonalWindow);
        }
      });
  return absl::OkStatus();
}

}  // namespace longfill
