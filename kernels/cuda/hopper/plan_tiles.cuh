#ifndef LONGFILL_KERNELS_CUDA_HOPPER_PLAN_TILES_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_PLAN_TILES_CUH_

// The planner warp: takes tiles from the counter and hands their slots to the others of its warpgroup, ahead
// of everybody.

#include <cstdint>

#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/attention/tile_task.cuh"
#include "kernels/cuda/hopper/shared_memory.cuh"

namespace longfill::cuda::hopper {

// Brings the tile's query rows to L2 before consumers ask for them.
__device__ __forceinline__ void PrefetchQueries(const attention::Args& args, const Task& task,
                                                int row_bytes) {
  const char* q = attention::QueryRow0(args, task.tile_task);
  for (int i = attention::Lane(); i < kTileRows; i += 32) {
    const int32_t row = task.row[i];
    if (row < 0) continue;
    const char* data = q + 2 * row * args.q_row_stride;
    for (int byte = 0; byte < row_bytes; byte += 128) {
      asm volatile("prefetch.global.L2 [%0];\n" ::"l"(data + byte));
    }
  }
}

template <typename ShapeOf>
class TilePlanner {
 public:
  __device__ __forceinline__ TilePlanner(const attention::Args& args, SharedMemory<ShapeOf>* shared)
      : args_(args), shared_(*shared), planner_(&shared->plan, &shared->ring) {}

  __device__ __forceinline__ void Run() {
    int32_t item = static_cast<int32_t>(blockIdx.x);
    while (item < args_.num_items) {
      int32_t next_item = 0;
      if (attention::Lane() == 0) {
        next_item = static_cast<int32_t>(gridDim.x) + atomicAdd(args_.items_taken, 1);
      }
      if (StartTile(item)) PlanTile();
      item = __shfl_sync(attention::kAllLanes, next_item, 0);
    }
    Stop();
  }

 private:
  __device__ __forceinline__ Task& NextTask() {
    const int32_t place = PlaceOf<kTasks>(num_tiles_);
    Wait(&shared_.task_empty[place], EmptyParity<kTasks>(num_tiles_));
    return shared_.tasks[place];
  }
  __device__ __forceinline__ void PublishTask() {
    Arrive(&shared_.task_full[PlaceOf<kTasks>(num_tiles_)]);
    ++num_tiles_;
  }

  // False for a tile without rows, which nobody hears of.
  __device__ __forceinline__ bool StartTile(int32_t item) {
    Task& task = NextTask();
    attention::TileTask<kTileRows> tile_task = attention::TaskOf<kTileRows>(args_, item);
    if (!attention::FindRows(&tile_task, task.row)) return false;
    if (attention::Lane() == 0) {
      task.tile_task = tile_task;
      task.stop = 0;
    }
    __syncwarp();
    PrefetchQueries(args_, task, 2 * ShapeOf::kHeadDim);
    PublishTask();
    return true;
  }

  __device__ __forceinline__ void PlanTile() {
    const auto& tile_task = shared_.tasks[PlaceOf<kTasks>(num_tiles_ - 1)].tile_task;
    planner_.Start(*tile_task.index, tile_task.tile);
    int32_t products = 0;  // of a slot and a half, in this lane's slots
    for (bool ended = false; !ended;) {
      for (; num_chunks_ < num_gathered_ + kGatherRoomChunks; ++num_chunks_) {
        Wait(&shared_.gather_empty[PlaceOf<kGatherChunks>(num_chunks_)],
             EmptyParity<kGatherChunks>(num_chunks_));
      }
      SlotBatch& batch = NextBatch();
      const int32_t count = planner_.Next(batch.slots);
      __syncwarp();
      SlotKind kind = SlotKind::kConsecutive;
      if (attention::Lane() < count) {
        const Slot& slot = batch.slots[attention::Lane()];
        kind = slot.kind;
        if (kind != SlotKind::kEnd) products += __popc(slot.used);
      }
      num_gathered_ += __popc(__ballot_sync(attention::kAllLanes, kind == SlotKind::kGathered));
      ended = __any_sync(attention::kAllLanes, kind == SlotKind::kEnd);
      PublishBatch(&batch, count);
    }
    AddPairs(products);
  }

  __device__ __forceinline__ SlotBatch& NextBatch() {
    const int32_t place = PlaceOf<kBatches>(num_batches_);
    Wait(&shared_.batch_empty[place], EmptyParity<kBatches>(num_batches_));
    return shared_.batches[place];
  }
  __device__ __forceinline__ void PublishBatch(SlotBatch* batch, int32_t count) {
    if (attention::Lane() == 0) batch->count = count;
    Arrive(&shared_.batch_full[PlaceOf<kBatches>(num_batches_)]);
    ++num_batches_;
  }

  __device__ __forceinline__ void Stop() {
    Task& task = NextTask();
    if (attention::Lane() == 0) task.stop = 1;
    PublishTask();
    SlotBatch& batch = NextBatch();
    if (attention::Lane() == 0) batch.slots[0].kind = SlotKind::kStop;
    PublishBatch(&batch, 1);
  }

  __device__ __forceinline__ void AddPairs(int32_t products) const {
    if (args_.covered_pairs != nullptr) {
      const int64_t pairs = planner_.covered_pairs();
      if (attention::Lane() == 0) atomicAdd(args_.covered_pairs, static_cast<unsigned long long>(pairs));
    }
    if (args_.computed_pairs != nullptr) {
      const int64_t pairs =
          int64_t{__reduce_add_sync(attention::kAllLanes, products)} * kHalfRows * kSlotKeys;
      if (attention::Lane() == 0) atomicAdd(args_.computed_pairs, static_cast<unsigned long long>(pairs));
    }
  }

  const attention::Args& args_;
  SharedMemory<ShapeOf>& shared_;
  SlotPlanner planner_;
  int32_t num_tiles_ = 0;
  int32_t num_batches_ = 0;
  int32_t num_gathered_ = 0;  // slots
  int32_t num_chunks_ = 0;    // of the gather ring, that were found free
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_PLAN_TILES_CUH_
