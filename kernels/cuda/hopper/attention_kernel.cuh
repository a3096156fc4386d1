#ifndef LONGFILL_KERNELS_CUDA_HOPPER_ATTENTION_KERNEL_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_ATTENTION_KERNEL_CUH_

// Online-softmax attention with a warpgroup that brings keys and two that multiply (FlashAttention-3, arXiv
// 2407.08608), on the slots of 128-row tiles (slot.cuh).

#include <cstdint>

#include "kernels/api/kernel_set.h"
#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/hopper/half_rows.cuh"
#include "kernels/cuda/hopper/load_slots.cuh"
#include "kernels/cuda/hopper/pair_slots.cuh"
#include "kernels/cuda/hopper/plan_tiles.cuh"
#include "kernels/cuda/hopper/query_rows.cuh"
#include "kernels/cuda/hopper/shared_memory.cuh"
#include "kernels/cuda/hopper/slot_reader.cuh"

namespace longfill::cuda::hopper {

template <typename ShapeOf>
__device__ __forceinline__ void Produce(const attention::Args& args, SharedMemory<ShapeOf>* shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp == kPlannerWarp) {
    TilePlanner<ShapeOf>(args, shared).Run();
  } else if (warp == kKeyWarp) {
    SlotLoader<ShapeOf, /*kValues=*/false>(args, shared).Run();
  } else if (warp == kValueWarp) {
    SlotLoader<ShapeOf, /*kValues=*/true>(args, shared).Run();
  } else if (warp == kPairWarp) {
    SlotPairer<ShapeOf>(shared).Run();
  }
}

template <typename Element, typename ShapeOf>
__device__ __forceinline__ void Consume(const attention::Args& args, int half,
                                        SharedMemory<ShapeOf>* shared) {
  HalfRows<Element, ShapeOf> rows(args, shared);
  SlotReader<ShapeOf> reader(half, shared);
  ProductTurns<ShapeOf> turns(half, shared);
  for (int32_t tile = 0;; ++tile) {
    Wait(&shared->task_full[PlaceOf<kTasks>(tile)], FullParity<kTasks>(tile));
    reader.StartTile(tile);
    if (InAllLanes(reader.task().stop != 0)) return;
    LoadQueries(args, reader, &rows);
    rows.Start();
    rows.Run(&reader, &turns);
    StoreRows(args, reader, rows);
    Arrive(&shared->task_empty[PlaceOf<kTasks>(tile)]);
  }
}

// The last act of each warp.
__device__ __forceinline__ void NoteFinish(unsigned long long* block_finish_ns) {
  if (block_finish_ns == nullptr || blockIdx.x >= kMaxBlockFinishTimes || attention::Lane() != 0) return;
  unsigned long long time;
  asm volatile("mov.u64 %0, %%globaltimer;\n" : "=l"(time));
  atomicMax(&block_finish_ns[blockIdx.x], time);
}

template <typename Element, typename ShapeOf>
__global__ void __launch_bounds__(kThreads, 1) AttentionKernel(const __grid_constant__ attention::Args args) {
  extern __shared__ __align__(1024) char memory[];
  auto* shared = reinterpret_cast<SharedMemory<ShapeOf>*>(memory);
  if (threadIdx.x == 0) InitBarriers(shared);
  __syncthreads();
  // In a form that the compiler knows to be the same in all lanes of a warp.
  const int warpgroup =
      __shfl_sync(attention::kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    GiveRegisters<kProducerRegisters>();
    Produce(args, shared);
  } else {
    TakeRegisters<kConsumerRegisters>();
    Consume<Element>(args, warpgroup - 1, shared);
    NoteFinish(args.block_finish_ns);
  }
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_ATTENTION_KERNEL_CUH_
