#ifndef LONGFILL_KERNELS_CUDA_HOPPER_SHARED_MEMORY_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_SHARED_MEMORY_CUH_

// Shapes of the kernel for each head dim, what its warps share, and who waits for whom.
//
// Slots are numbered from the start of the thread block, a tile's kEnd included. Slot n has place n % kStages
// in the rings of K and V, and K and V of a place each a barrier `full` (it was brought) and one `empty` (all
// consumers are done with it). Everybody takes the slots in the order of their numbers, waits for each and
// arrives at its barriers, also for one that is nothing to bring or to multiply: a barrier tells only two
// phases apart, so nobody may be more than one ahead or behind. K runs ahead of V by as much as its ring is
// emptied sooner.

#include <cstdint>

#include "kernels/cuda/attention/tile_task.cuh"
#include "kernels/cuda/hopper/barrier.cuh"
#include "kernels/cuda/hopper/slot.cuh"
#include "kernels/cuda/hopper/slot_plan.cuh"

namespace longfill::cuda::hopper {

template <int kHeadDimOf, int kElementBytesOf = 2>
struct Shape {
  static constexpr int kHeadDim = kHeadDimOf;
  static constexpr int kElementBytes = kElementBytesOf;
  static constexpr int kHeadBytes = kHeadDim * kElementBytes;
  // Rows of K and V lie in shared memory as blocks of so many dims, each 64 rows of the swizzle's width.
  static constexpr int kRowBytes = kHeadBytes % 128 == 0 ? 128 : kHeadBytes % 64 == 0 ? 64 : 32;
  static constexpr int kBlockDims = kRowBytes / kElementBytes;
  static constexpr int kBlocks = kHeadDim / kBlockDims;
  static constexpr int kBlockBytes = kSlotKeys * kRowBytes;
  static constexpr int kSlotBytes = kBlocks * kBlockBytes;  // K or V of a slot
  static constexpr int kSteps = kHeadBytes / 32;            // of a product of queries and keys
  static constexpr int kStages = (96 << 10) / kSlotBytes;
};

// Warps of the producer warpgroup, whose fourth has nothing to do, then two consumer warpgroups, one for each
// half of the tile.
inline constexpr int kPlannerWarp = 0;
inline constexpr int kKeyWarp = 1;
inline constexpr int kValueWarp = 2;
// Of a loader, at the barrier of a place: one for each lane's copies, and the first lane's own.
inline constexpr int kFullArrivals = 33;
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kConsumerWarps = 8;
// A warp gives back what it has read by one arrival, after a warp barrier. racecheck does not
// follow that: in a build for it each lane arrives.
#ifdef LONGFILL_HOPPER_EACH_LANE_ARRIVES
inline constexpr bool kEachLaneArrives = true;
#else
inline constexpr bool kEachLaneArrives = false;
#endif
inline constexpr int kConsumerArrivals = kConsumerWarps * (kEachLaneArrives ? 32 : 1);
inline constexpr int kLoaderArrivals = 2 * (kEachLaneArrives ? 32 : 1);
inline constexpr int kThreads = 3 * kWarpgroupThreads;
// The launch gives 168 to each of the 3 * 128 threads; these are dealt anew.
inline constexpr int kConsumerRegisters = 224;
inline constexpr int kProducerRegisters = 56;
static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * 168);

inline constexpr int kBatches = 4;
inline constexpr int kTasks = 2;
// A consumer does not wait for a slot so far beyond one that it still holds.
inline constexpr int kReach = 6;
// Slots that consumers may look at: when slot n is written down, its place of K was given back for slot
// n - kStages, and who has done so holds slots less than kReach before that one.
inline constexpr int kSlotRing = 32;
// The planner waits for chunks of the gather ring only beyond those that a consumer may hold.
static_assert(kGatherChunks - kGatherRoomChunks > kReach);

struct Task {
  attention::TileTask<kTileRows> tile_task;
  int32_t row[kTileRows];  // row of the sequence at each position of the tile, or -1
  int32_t stop;            // there is no more, nothing else is set
};

template <typename ShapeOf>
struct alignas(1024) SharedMemory {
  static constexpr int kStages = ShapeOf::kStages;
  static_assert(kStages >= kReach && kStages + kReach <= kSlotRing);

  char k[kStages][ShapeOf::kSlotBytes];
  char v[kStages][ShapeOf::kSlotBytes];
  Slot slots[kSlotRing];  // slot n at n % kSlotRing, there once K of n is
  SlotBatch batches[kBatches];
  GatherRing ring;
  PlanState plan;
  Task tasks[kTasks];  // tile t of the thread block at t % kTasks

  Barrier k_full[kStages], k_empty[kStages];
  Barrier v_full[kStages], v_empty[kStages];
  Barrier batch_full[kBatches], batch_empty[kBatches];
  Barrier task_full[kTasks], task_empty[kTasks];
  Barrier gather_empty[kGatherChunks];
  Barrier turn_given;  // see ProductTurns
  int32_t turns_taken;
};

// One thread, before anybody uses them.
template <typename ShapeOf>
__device__ __forceinline__ void InitBarriers(SharedMemory<ShapeOf>* shared) {
  for (int i = 0; i < ShapeOf::kStages; ++i) {
    InitBarrier(&shared->k_full[i], kFullArrivals);
    InitBarrier(&shared->v_full[i], kFullArrivals);
    InitBarrier(&shared->k_empty[i], kConsumerArrivals);
    InitBarrier(&shared->v_empty[i], kConsumerArrivals);
  }
  for (int i = 0; i < kBatches; ++i) {
    InitBarrier(&shared->batch_full[i], 32);
    InitBarrier(&shared->batch_empty[i], kLoaderArrivals);
  }
  for (int i = 0; i < kTasks; ++i) {
    InitBarrier(&shared->task_full[i], 32);
    InitBarrier(&shared->task_empty[i], kConsumerWarps * 32);
  }
  for (int i = 0; i < kGatherChunks; ++i) InitBarrier(&shared->gather_empty[i], kConsumerArrivals);
  InitBarrier(&shared->turn_given, 1);
  shared->turns_taken = 0;
  PublishBarriers();
}

// Waits for all threads of a warpgroup, by the named barrier behind its number.
__device__ __forceinline__ void SyncWarpgroup(int number) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number + 1), "n"(kWarpgroupThreads) : "memory");
}

// Parity of the phase that the use of a ring's place for number n ends, and of the one that must have ended
// before it (as if all had been used once before).
template <int kPlaces>
__device__ __forceinline__ uint32_t FullParity(int32_t n) {
  return static_cast<uint32_t>(n) / kPlaces & 1;
}
template <int kPlaces>
__device__ __forceinline__ uint32_t EmptyParity(int32_t n) {
  return (static_cast<uint32_t>(n) / kPlaces + 1) & 1;
}
template <int kPlaces>
__device__ __forceinline__ int32_t PlaceOf(int32_t n) {
  return static_cast<int32_t>(static_cast<uint32_t>(n) % kPlaces);
}

// The place of a number that only grows, and the parity of the phase that its use of the place ends: what
// PlaceOf and FullParity say, without division.
template <int kPlaces>
struct RingPlace {
  uint32_t place = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Next() {
    const bool wraps = place == kPlaces - 1;
    place = wraps ? 0 : place + 1;
    parity ^= wraps ? 1 : 0;
  }
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_SHARED_MEMORY_CUH_
