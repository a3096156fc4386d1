#ifndef LONGFILL_KERNELS_CUDA_HOPPER_SLOT_READER_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_SLOT_READER_CUH_

// A consumer's place in the sequence of slots: finds the next pair that its half multiplies and gives back
// what it has done with. Which slots form a pair depends on the tile's slots alone, so that rounding does.

#include <cstdint>

#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/cuda/hopper/shared_memory.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"

namespace longfill::cuda::hopper {

// What a consumer keeps of a slot that it multiplies, in one register: its place in the rings, what it is,
// and its number modulo 2^20.
struct SlotRef {
  uint32_t bits = kNone;

  static constexpr uint32_t kNone = 1U << 11;
  static constexpr uint32_t kGathered = 1U << 9;
  static constexpr uint32_t kMasked = 1U << 10;  // not all rows of the half see all its keys
  static constexpr int kNumberShift = 12;

  __device__ __forceinline__ bool exists() const { return bits != kNone; }
  __device__ __forceinline__ uint32_t place() const { return bits & 15; }
  __device__ __forceinline__ uint32_t parity() const { return bits >> 8 & 1; }
  __device__ __forceinline__ bool gathered() const { return (bits & kGathered) != 0; }
  __device__ __forceinline__ bool masked() const { return (bits & kMasked) != 0; }
  __device__ __forceinline__ uint32_t number() const { return bits >> kNumberShift; }
};

// A pair of one slot has it twice, the second time to be multiplied by zeros: a branch around products would
// make the compiler wait for them one by one.
struct SlotPair {
  SlotRef first;
  SlotRef second;

  __device__ __forceinline__ bool has_two() const { return first.bits != second.bits; }
};

// One for each warp of a consumer; all its lanes hold the same.
template <typename ShapeOf>
class SlotReader {
 public:
  __device__ __forceinline__ SlotReader(int half, SharedMemory<ShapeOf>* shared)
      : shared_(*shared), half_(half) {}

  // After the task of a tile has come.
  __device__ __forceinline__ void StartTile(int32_t tile) {
    tile_ = tile;
    ended_ = false;
  }
  __device__ __forceinline__ const Task& task() const { return shared_.tasks[PlaceOf<kTasks>(tile_)]; }
  __device__ __forceinline__ int half() const { return half_; }
  // Position of the tile's first row.
  __device__ __forceinline__ int32_t first_position() const { return task().tile_task.tile.first_row; }
  // This lane's first row in the tile; the other is 8 further on.
  __device__ __forceinline__ int32_t first_row() const {
    const int thread = attention::Thread() - kWarpgroupThreads;
    return thread / 32 * 16 + thread % 32 / 4;
  }

  // The first pair of the tile, or the first of those that are left; K is there. No pair if it has no more.
  __device__ __forceinline__ SlotPair Next() {
    const SlotRef first = Seek(INT32_MAX);
    return Complete(first, kReach - 1);
  }
  // The same, but both slots lie within kReach of `held`; no pair if the next slot of the half does not.
  __device__ __forceinline__ SlotPair NextNear(SlotRef held) {
    const SlotRef first = Seek(Left(held));
    return Complete(first, Left(held));
  }

  __device__ __forceinline__ uint32_t k_address(SlotRef slot) const {
    return SharedAddress(shared_.k) + slot.place() * ShapeOf::kSlotBytes;
  }
  __device__ __forceinline__ uint32_t v_address(SlotRef slot) const {
    return SharedAddress(shared_.v) + slot.place() * ShapeOf::kSlotBytes;
  }
  __device__ __forceinline__ const Slot& EntryOf(SlotRef slot) const {
    return shared_.slots[slot.number() % kSlotRing];
  }

  __device__ __forceinline__ void WaitForValues(const SlotPair& pair) {
    Wait(&shared_.v_full[pair.first.place()], pair.first.parity());
    Wait(&shared_.v_full[pair.second.place()], pair.second.parity());
    if (((pair.first.bits | pair.second.bits) & SlotRef::kGathered) != 0) FenceSharedForAsync();
  }
  __device__ __forceinline__ void ReleaseKeys(const SlotPair& pair) {
    if (!Arrives()) return;
    Arrive(&shared_.k_empty[pair.first.place()]);
    if (pair.has_two()) Arrive(&shared_.k_empty[pair.second.place()]);
  }
  // And with them all that is known of the slots.
  __device__ __forceinline__ void ReleaseValues(const SlotPair& pair) {
    __syncwarp();
    if (!Arrives()) return;
    if (((pair.first.bits | pair.second.bits) & SlotRef::kGathered) != 0) {
      if (pair.first.gathered()) ReleaseChunk(pair.first);
      if (pair.has_two() && pair.second.gathered()) ReleaseChunk(pair.second);
    }
    Arrive(&shared_.v_empty[pair.first.place()]);
    if (pair.has_two()) Arrive(&shared_.v_empty[pair.second.place()]);
  }

 private:
  // Whether this lane gives back what its warp has read.
  __device__ __forceinline__ bool Arrives() const { return kEachLaneArrives || attention::Lane() == 0; }
  // How many slots, from the next one on, lie within kReach of `held`.
  __device__ __forceinline__ int32_t Left(SlotRef held) const {
    const uint32_t ahead = (number_ - held.number()) << SlotRef::kNumberShift >> SlotRef::kNumberShift;
    return kReach - static_cast<int32_t>(ahead);
  }

  __device__ __forceinline__ SlotPair Complete(SlotRef first, int32_t most) {
    SlotPair pair = {first, first};
    if (InAllLanes(!first.exists())) return pair;
    const SlotRef second = Seek(min(most, kReach - 1));
    if (second.exists()) pair.second = second;
    return pair;
  }

  // The next slot of the half among the next `most`; others up to there are given back.
  __device__ __forceinline__ SlotRef Seek(int32_t most) {
    while (InAllLanes(!ended_ && most > 0)) {
      Wait(&shared_.k_full[stage_.place], stage_.parity);
      const uint32_t facts = shared_.slots[number_ % kSlotRing].Facts();
      const bool gathered = Slot::KindOf(facts) == SlotKind::kGathered;
      SlotRef slot;
      slot.bits = stage_.place | stage_.parity << 8 | (gathered ? SlotRef::kGathered : 0) |
                  number_ << SlotRef::kNumberShift;
      if (InAllLanes((facts >> Slot::kUsedShift >> half_ & 1) != 0)) {
        if ((facts >> Slot::kMaskedShift >> half_ & 1) != 0) slot.bits |= SlotRef::kMasked;
        if (gathered) FenceSharedForAsync();
        Pass();
        return slot;
      }
      Wait(&shared_.v_full[stage_.place], stage_.parity);
      ended_ = Slot::KindOf(facts) == SlotKind::kEnd;
      __syncwarp();
      if (Arrives()) {
        if (gathered) ReleaseChunk(slot);
        Arrive(&shared_.k_empty[stage_.place]);
        Arrive(&shared_.v_empty[stage_.place]);
      }
      Pass();
      --most;
    }
    return SlotRef();
  }
  __device__ __forceinline__ void Pass() {
    ++number_;
    stage_.Next();
  }
  __device__ __forceinline__ void ReleaseChunk(SlotRef slot) {
    Arrive(&shared_.gather_empty[EntryOf(slot).first / kSlotKeys]);
  }

  SharedMemory<ShapeOf>& shared_;
  const int half_;
  int32_t tile_ = 0;
  bool ended_ = false;
  uint32_t number_ = 0;  // of the next slot
  RingPlace<ShapeOf::kStages> stage_;
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_SLOT_READER_CUH_
