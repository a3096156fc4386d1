#ifndef LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_TILE_CUH_
#define LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_TILE_CUH_

// What both passes of the last queries over K share. A thread block of four warps walks the key blocks of a
// stretch for up to four query heads of one KV head. A warp has one head's queries in registers for good
// (head dim 256: half of them) and multiplies them with 16 keys at a time, which lie in a ring of stages in
// shared memory. With fewer heads than four, several key blocks are loaded side by side, so that each warp
// has work.

#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/index/last_query_args.h"
#include "kernels/cuda/index/last_query_rows.cuh"

namespace longfill::cuda::last_query {

using attention::CopyAsync16;
using attention::FastExp2;
using attention::LoadMatrices;
using attention::MultiplyAdd;
using attention::SharedAddress;

inline constexpr unsigned kAllLanes = 0xFFFFFFFFU;
inline constexpr int kStageKeys = 32;  // keys of each block that a stage holds
inline constexpr int kStepKeys = 16;   // keys that are multiplied at a time
inline constexpr int kStagesPerBlock = static_cast<int>(kSelectionBlock) / kStageKeys;
inline constexpr int kStepsPerStage = kStageKeys / kStepKeys;

__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until at most kPending of the thread's last groups have not arrived.
template <int kPending>
__device__ __forceinline__ void WaitForCopyGroups() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// What a warp works on.
template <int kHeadDim>
struct LastQueryWarp {
  using Shape = LastQueryShape<kHeadDim>;
  static constexpr int kTiles = Shape::kWarpQueries / 16;  // of 16 queries

  __device__ explicit LastQueryWarp(const LastQueryArgs& args) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const LastQueryGroup& group = args.groups[blockIdx.x % args.num_groups];
    const int unit = warp / Shape::kParts;
    const int head_slot = unit / args.blocks_at_once;
    lane = static_cast<int>(threadIdx.x) % 32;
    first_row = warp % Shape::kParts * Shape::kWarpQueries;
    block_slot = unit % args.blocks_at_once;
    active = head_slot < group.num_heads;
    head = active ? group.head[head_slot] : 0;
    list = active ? group.list[head_slot] : 0;
  }

  __device__ int Row(int tile, int half) const { return first_row + 16 * tile + 8 * half + lane / 4; }

  int lane = 0;
  int first_row = 0;   // of its queries
  int block_slot = 0;  // which of the blocks that are loaded side by side
  bool active = false;
  int head = 0;
  int list = 0;
};

// The stretch of key blocks of a thread block.
struct LastQueryStretch {
  __device__ explicit LastQueryStretch(const LastQueryArgs& args) {
    first = static_cast<int>(blockIdx.x) / args.num_groups * args.blocks_per_stretch;
    end = min(first + args.blocks_per_stretch, args.num_blocks);
    num_turns = (end - first + args.blocks_at_once - 1) / args.blocks_at_once;
  }
  int first = 0, end = 0;
  int num_turns = 0;  // of blocks_at_once blocks each
};

// Keys on their way through shared memory: stage s holds quarter s % 4 of `blocks_at_once` blocks.
template <int kHeadDim>
class KeyStages {
 public:
  using Shape = LastQueryShape<kHeadDim>;

  __device__ KeyStages(const LastQueryArgs& args, const LastQueryStretch& stretch, const void* shared)
      : args_(args),
        stretch_(stretch),
        ring_(SharedAddress(shared)),
        stage_bytes_(args.blocks_at_once * Shape::kSlotBytes) {
    const int64_t kv_head = args.groups[blockIdx.x % args.num_groups].kv_head;
    keys_ = static_cast<const char*>(args.k) + 2 * kv_head * args.k_head_stride;
    slot_ = args.ring_stages - 1;
    for (int stage = 0; stage < slot_; ++stage) Load(stage, stage);
  }

  // Waits for the keys of the stage that follows and starts to load the one that takes the place of the stage
  // before it.
  __device__ void Enter(int stage) {
    switch (args_.ring_stages) {
      case 4:
        WaitForCopyGroups<2>();
        break;
      case 3:
        WaitForCopyGroups<1>();
        break;
      default:
        WaitForCopyGroups<0>();
    }
    __syncthreads();
    Load(stage + args_.ring_stages - 1, slot_);
    slot_ = slot_ + 1 == args_.ring_stages ? 0 : slot_ + 1;
  }

  // Where the lane's row of the first matrices of 16 keys of the stage lies (mma.cuh, LoadMatrices): the two
  // registers of keys 0 to 7, then of keys 8 to 15.
  __device__ uint32_t StepAddress(int step, const LastQueryWarp<kHeadDim>& warp) const {
    const int row = kStepKeys * step + warp.lane / 16 * 8 + warp.lane % 8;
    return ring_ + slot_ * stage_bytes_ + warp.block_slot * Shape::kSlotBytes + row * Shape::kRowBytes +
           warp.lane / 8 % 2 * 16;
  }

 private:
  static constexpr int kChunks = kHeadDim / 8;  // of 16 bytes in a row

  __device__ void Load(int stage, int to_slot) const {
    if (stage < stretch_.num_turns * kStagesPerBlock) {
      const uint32_t to = ring_ + to_slot * stage_bytes_;
      for (int i = 0; i < args_.blocks_at_once; ++i) {
        const int block = stretch_.first + stage / kStagesPerBlock * args_.blocks_at_once + i;
        const int64_t row = block * kSelectionBlock + stage % kStagesPerBlock * kStageKeys;
        const int64_t rows = block < stretch_.end ? args_.num_keys - row : 0;
        const char* from = keys_ + 2 * row * args_.k_row_stride;
#pragma unroll
        for (int j = 0; j < kStageKeys * kChunks / kLastQueryThreads; ++j) {
          const int chunk = j * kLastQueryThreads + static_cast<int>(threadIdx.x);
          const int key = chunk / kChunks;
          const bool valid = key < rows;
          const char* source = valid ? from + 2 * key * args_.k_row_stride + chunk % kChunks * 16 : keys_;
          CopyAsync16(to + i * Shape::kSlotBytes + key * Shape::kRowBytes + chunk % kChunks * 16, source,
                      valid);
        }
      }
    }
    CommitCopies();  // also where nothing is left to load: Enter counts groups
  }

  const LastQueryArgs& args_;
  const LastQueryStretch& stretch_;
  const uint32_t ring_;
  const int stage_bytes_;
  const char* keys_ = nullptr;
  int slot_ = 0;  // of the stage that was entered last
};

// A warp's queries as A fragments, zeros where there is no query.
template <int kHeadDim>
using QueryFragments = uint32_t[LastQueryWarp<kHeadDim>::kTiles][kHeadDim / 16][4];
template <int kHeadDim>
__device__ void LoadQueries(const LastQueryArgs& args, const LastQueryWarp<kHeadDim>& warp,
                            QueryFragments<kHeadDim>& fragments) {
  const char* q = static_cast<const char*>(args.q) + 2 * int64_t{warp.head} * args.q_head_stride;
#pragma unroll
  for (int tile = 0; tile < LastQueryWarp<kHeadDim>::kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = args.num_queries - 1 - warp.Row(tile, half);
      const char* row = q + 2 * query * args.q_row_stride + warp.lane % 4 * 4;
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          fragments[tile][k][2 * side + half] =
              warp.active && query >= 0 ? *reinterpret_cast<const uint32_t*>(row + 32 * k + 16 * side) : 0;
        }
      }
    }
  }
}

// Products of a warp's queries with 16 keys as C fragments: [tile][keys 0 to 7, 8 to 15][register].
template <int kHeadDim>
using StepScores = float[LastQueryWarp<kHeadDim>::kTiles][2][4];
template <typename Element, int kHeadDim>
__device__ __forceinline__ void ScoreStep(const QueryFragments<kHeadDim>& queries, uint32_t keys,
                                          StepScores<kHeadDim>& scores) {
  constexpr int kTiles = LastQueryWarp<kHeadDim>::kTiles;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[tile][i / 4][i % 4] = 0.0F;
  }
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t b[4];
    LoadMatrices(b, keys + 32 * k);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      MultiplyAdd<Element>(scores[tile][0], queries[tile][k], b[0], b[1]);
      MultiplyAdd<Element>(scores[tile][1], queries[tile][k], b[2], b[3]);
    }
  }
}

// Scores of pairs that are not visible become -infinity. `first_key` is the step's in the block.
template <int kHeadDim>
__device__ __forceinline__ void HideKeys(const BlockVisibility& visible, int first_key,
                                         const LastQueryWarp<kHeadDim>& warp, StepScores<kHeadDim>& scores) {
#pragma unroll
  for (int tile = 0; tile < LastQueryWarp<kHeadDim>::kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int key = first_key + i / 4 * 8 + warp.lane % 4 * 2 + i % 2;
      if (!visible.Sees(warp.Row(tile, i % 4 / 2), key)) scores[tile][i / 4][i % 4] = -INFINITY;
    }
  }
}

}  // namespace longfill::cuda::last_query

#endif  // LONGFILL_KERNELS_CUDA_INDEX_LAST_QUERY_TILE_CUH_
