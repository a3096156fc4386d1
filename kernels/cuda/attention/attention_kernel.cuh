#ifndef LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_KERNEL_CUH_
#define LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_KERNEL_CUH_

// Online-softmax attention of one tile after the other: the scheme of FlashAttention-2 (arXiv 2307.08691) on
// a stream of key chunks (key_queue.cuh). A thread block does a tile at a time; each of its warps has some
// rows of it and all keys of a chunk, so that scores and probabilities stay in registers. One buffer holds K,
// one V: a chunk's V arrives while Q K runs, the next one's K while softmax and P V do.

#include <cstdint>

#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/attention/key_queue.cuh"
#include "kernels/cuda/attention/key_source.cuh"
#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/tile_memory.cuh"
#include "kernels/cuda/attention/tile_task.cuh"
#include "kernels/cuda/attention/warp_rows.cuh"

namespace longfill::cuda::attention {

// Places the task of an item, its rows and an empty queue in shared memory. One warp.
template <typename Shape>
__device__ __forceinline__ void StartTile(const Args& args, int32_t item, SharedMemory<Shape>* shared) {
  constexpr int kRows = Shape::kRows;
  TileTask<kRows> task = TaskOf<kRows>(args, item);
  const bool wide = args.wide_tiles && IsWide(*task.index);
  const bool has_rows = wide == (kRows > kRowBlockRows) && FindRows(&task, shared->row);
  if (Lane() == 0) {
    shared->task = task;
    shared->has_rows = has_rows ? 1 : 0;
  }
  if (has_rows) StartQueue(*task.index, task.tile, &shared->queue);
}

// The rows of K or V that belong to a chunk. key_0 is where the key at position 0 would be, any_key one that
// is given.
template <typename Shape>
__device__ __forceinline__ void CopyChunk(const char* to, KeyChunk chunk, const KeyQueue& queue,
                                          const char* key_0, int64_t key_stride, int32_t any_key) {
  constexpr int kChunkKeys = Shape::kChunkKeys;
  if (IsGathered(chunk)) {
    const int32_t* keys = queue.gathered_keys + RingSlot<kChunkKeys>(chunk);
    CopyRows<Shape, kChunkKeys>(to, [&](int i) {
      const int32_t key = keys[i];
      return RowSource{key_0 + (key == kNoKey ? any_key : key) * key_stride, key != kNoKey};
    });
  } else {
    const char* begin = key_0 + chunk * key_stride;
    CopyRows<Shape, kChunkKeys>(to, [&](int i) { return RowSource{begin + i * key_stride, true}; });
  }
}

template <typename Shape>
__device__ __forceinline__ void CopyQueries(const Args& args, const SharedMemory<Shape>& shared) {
  const int64_t row_bytes = 2 * args.q_row_stride;
  const char* q = QueryRow0(args, shared.task);
  CopyRows<Shape, Shape::kRows>(shared.q, [&](int i) {
    const int32_t row = shared.row[i];
    return RowSource{q + (row < 0 ? 0 : row) * row_bytes, row >= 0};
  });
}

// One thread, when the tile is done.
template <typename Shape>
__device__ __forceinline__ void AddPairs(const Args& args, const KeyQueue& queue) {
  if (args.covered_pairs != nullptr) {
    atomicAdd(args.covered_pairs, static_cast<unsigned long long>(queue.cursor.covered_pairs));
  }
  if (args.computed_pairs != nullptr) {
    const int64_t chunks = int64_t{queue.cursor.num_chunks} + queue.gathered_chunks;
    atomicAdd(args.computed_pairs,
              static_cast<unsigned long long>(chunks * Shape::kChunkKeys * Shape::kRows));
  }
}

// All threads, after a barrier behind StartTile.
template <typename Element, typename Shape>
__device__ __forceinline__ void RunTile(const Args& args, SharedMemory<Shape>* shared_memory) {
  constexpr int kChunkKeys = Shape::kChunkKeys;
  SharedMemory<Shape>& shared = *shared_memory;
  KeyQueue& queue = shared.queue;
  const TileTask<Shape::kRows>& task = shared.task;
  CopyQueries(args, shared);
  WarpRows<Element, Shape> rows(shared);
  rows.Start();
  KeyReader reader;
  KeyChunk chunk = kNoChunk;
  bool refill = true;
  while (true) {
    if (refill) {
      if (threadIdx.x < 32) FillQueue<kChunkKeys>(*task.index, task.tile, &queue);
      reader.Restart();
    }
    WaitForCopies();
    __syncthreads();  // K of the chunk is here, V's memory is free, the queue is filled
    if (chunk != kNoChunk) {
      CopyChunk<Shape>(shared.v, chunk, queue, task.v, 2 * args.v_row_stride, task.tile.key_begin);
    }
    const KeyChunk next = reader.Next<kChunkKeys>(queue);
    refill = reader.Drained(queue) && queue.finished == 0;
    if (chunk != kNoChunk) {
      rows.Score();
      if (IsGathered(chunk)) {
        const int32_t slot = RingSlot<kChunkKeys>(chunk);
        if (queue.limited[slot / kChunkKeys] != 0) rows.Mask(slot);
      }
    }
    WaitForCopies();
    __syncthreads();  // V is here, K's memory is free, the queue has been read
    if (next != kNoChunk) {
      CopyChunk<Shape>(shared.k, next, queue, task.k, 2 * args.k_row_stride, task.tile.key_begin);
    }
    if (chunk != kNoChunk) {
      rows.Softmax(args.scale_log2);
      rows.AddValues();
    }
    if (next == kNoChunk) break;
    chunk = next;
  }
  rows.Finish(args);
  if (threadIdx.x == 0) AddPairs<Shape>(args, queue);
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    AttentionKernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<SharedMemory<Shape>*>(memory);
  int32_t item = static_cast<int32_t>(blockIdx.x);
  while (item < args.num_items) {
    if (threadIdx.x < 32) {
      StartTile(args, item, &shared);
      if (threadIdx.x == 0) {
        shared.next_item = static_cast<int32_t>(gridDim.x) + atomicAdd(args.items_taken, 1);
      }
    }
    __syncthreads();
    if (shared.has_rows != 0) RunTile<Element>(args, &shared);
    item = shared.next_item;
    __syncthreads();  // before the next tile writes over what this one reads
  }
}

}  // namespace longfill::cuda::attention

#endif  // LONGFILL_KERNELS_CUDA_ATTENTION_ATTENTION_KERNEL_CUH_
