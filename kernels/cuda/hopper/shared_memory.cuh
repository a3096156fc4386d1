#ifndef LONGFILL_KERNELS_CUDA_HOPPER_SHARED_MEMORY_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_SHARED_MEMORY_CUH_

// Shapes of the kernel for each head dim, what its warps share, and who waits for whom.
//
// Slots are numbered from the start of the thread block, a tile's kEnd included. Slot n has place n % kStages
// in the rings of K and V. K and V of a place have each a barrier `full` (it was brought) and one `empty`
// (both halves are done with it). A barrier tells only two phases apart, so nobody may wait for one whose
// phase before has not ended:
//   - Loaders and the pairing warp wait for `empty` of every slot. For a half that does not multiply a slot,
//     the pairing warp arrives at k_empty and the values' loader at v_empty; at k_empty of a kEnd, which
//     nobody multiplies, the pairing warp and the keys' loader, so that neither leaves the other behind.
//   - A half waits only for slots of its pairs, and learns of them when k_empty of slot n - kStages is there,
//     so keys of that slot have been. Its values may still be to come, if only the other half multiplies it.
//     So v_full has two barriers for each place, used by turns. Values of slot m = n - 2 kStages have been
//     there: If the values' loader had not come to m, keys of two slots at most could have been multiplied
//     since, by the other half, which begins a pair only when values of the pair before are there, and
//     kBatches - 1 slots could be ends of tiles: less than kStages. If values of m were under way, they were
//     for the other half alone, and no values from slot n - kStages on could have been brought; that slot
//     would be the end of the other half's tile, the last that it has not ended (kTasks is 2), and n in the
//     first pair after it: its second slot, since of a first one a half learns with slot n + 1 at the
//     earliest. A half waits for values of a pair's first slot before it looks for those of the second.

#include <cstdint>

#include "kernels/cuda/attention/tile_task.cuh"
#include "kernels/cuda/hopper/barrier.cuh"
#include "kernels/cuda/hopper/slot.cuh"
#include "kernels/cuda/hopper/slot_pair.cuh"
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

// Warps of the producer warpgroup, then two consumer warpgroups, one for each half of the tile.
inline constexpr int kPlannerWarp = 0;
inline constexpr int kKeyWarp = 1;
inline constexpr int kValueWarp = 2;
inline constexpr int kPairWarp = 3;
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kConsumerWarps = 8;
// A warp gives back what it has read by one arrival, after a warp barrier. racecheck does not
// follow that: in a build for it each lane arrives.
#ifdef LONGFILL_HOPPER_EACH_LANE_ARRIVES
inline constexpr bool kEachLaneArrives = true;
#else
inline constexpr bool kEachLaneArrives = false;
#endif
// Of a warp that gives back, or of the warp that has brought something.
inline constexpr int kArrivalsOfWarp = kEachLaneArrives ? 32 : 1;
inline constexpr int kConsumerArrivals = kConsumerWarps * kArrivalsOfWarp;
inline constexpr int kHalfArrivals = kConsumerArrivals / 2;
// Of those who read batches.
inline constexpr int kBatchArrivals = 3 * kArrivalsOfWarp;
inline constexpr int kThreads = 3 * kWarpgroupThreads;
// The launch gives 168 to each of the 3 * 128 threads; these are dealt anew.
inline constexpr int kConsumerRegisters = 224;
inline constexpr int kProducerRegisters = 56;
static_assert(2 * kConsumerRegisters + kProducerRegisters <= 3 * 168);

inline constexpr int kBatches = 4;
inline constexpr int kTasks = 2;
// A consumer does not wait for a slot so far beyond one that it still holds.
inline constexpr int kReach = 6;
// Slots that consumers may look at. One that holds slot n keeps values from being brought beyond slot
// n + kStages - 1; keys are given back up to there, of one pair of the other half more and of kTasks ends of
// tiles, and the pairing warp is kStages beyond.
inline constexpr int kSlotRing = 32;
// Pairs of a half that it has not read: at most one for each slot whose keys it has not given back, with what
// is said of some that are apart, and kTasks ends of tiles. It may also read the one before once more.
inline constexpr int kPairRing = 32;
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
  static_assert(kStages >= kReach && kStages <= 16);         // a SlotRef has four bits for a place
  static_assert(kStages > 2 + kBatches - 1 && kTasks == 2);  // see v_full above
  static_assert(2 * kStages + 2 + kTasks <= kSlotRing);
  static_assert(kStages + kStages / kReach + 2 + kTasks + 1 <= kPairRing);

  char k[kStages][ShapeOf::kSlotBytes];
  char v[kStages][ShapeOf::kSlotBytes];
  Slot slots[kSlotRing];         // slot n at n % kSlotRing
  SlotPair pairs[2][kPairRing];  // of each half
  SlotBatch batches[kBatches];
  GatherRing ring;
  PlanState plan;
  Task tasks[kTasks];  // tile t of the thread block at t % kTasks

  Barrier k_full[kStages], k_empty[kStages];
  Barrier v_full[2 * kStages], v_empty[kStages];
  Barrier pair_full[2][kPairRing];
  Barrier batch_full[kBatches], batch_empty[kBatches];
  Barrier task_full[kTasks], task_empty[kTasks];
  Barrier gather_empty[kGatherChunks];
  Barrier turn_given;  // see ProductTurns
  int32_t next_turn;   // its parity
};

// One thread, before anybody uses them.
template <typename ShapeOf>
__device__ __forceinline__ void InitBarriers(SharedMemory<ShapeOf>* shared) {
  for (int i = 0; i < ShapeOf::kStages; ++i) {
    InitBarrier(&shared->k_full[i], 1);
    InitBarrier(&shared->v_full[i], 1);
    InitBarrier(&shared->v_full[ShapeOf::kStages + i], 1);
    InitBarrier(&shared->k_empty[i], kConsumerArrivals);
    InitBarrier(&shared->v_empty[i], kConsumerArrivals);
  }
  for (int i = 0; i < kPairRing; ++i) {
    InitBarrier(&shared->pair_full[0][i], 1);
    InitBarrier(&shared->pair_full[1][i], 1);
  }
  for (int i = 0; i < kBatches; ++i) {
    InitBarrier(&shared->batch_full[i], 32);
    InitBarrier(&shared->batch_empty[i], kBatchArrivals);
  }
  for (int i = 0; i < kTasks; ++i) {
    InitBarrier(&shared->task_full[i], 32);
    InitBarrier(&shared->task_empty[i], kConsumerWarps * 32);
  }
  for (int i = 0; i < kGatherChunks; ++i) InitBarrier(&shared->gather_empty[i], kConsumerArrivals);
  InitBarrier(&shared->turn_given, 1);
  shared->next_turn = 0;
  PublishBarriers();
}

// Whether this lane arrives for its warp.
__device__ __forceinline__ bool ArrivesForWarp() { return kEachLaneArrives || attention::Lane() == 0; }
// What a whole warp did before is released by it.
__device__ __forceinline__ void ArriveAsWarp(Barrier* barrier) {
  __syncwarp();
  if (ArrivesForWarp()) Arrive(barrier);
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
