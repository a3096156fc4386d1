#ifndef LONGFILL_KERNELS_CUDA_HOPPER_SLOT_READER_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_SLOT_READER_CUH_

// A consumer's place among the pairs of its half: reads the next, waits for what it needs and gives back what
// it has done with.

#include <cstdint>

#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/cuda/hopper/shared_memory.cuh"
#include "kernels/cuda/hopper/wgmma.cuh"

namespace longfill::cuda::hopper {

// One for each warp of a consumer; all its lanes hold the same.
template <typename ShapeOf>
class SlotReader {
 public:
  __device__ __forceinline__ SlotReader(int half, SharedMemory<ShapeOf>* shared)
      : shared_(*shared), half_(half) {}

  // After the task of a tile has come.
  __device__ __forceinline__ void StartTile(int32_t tile) { tile_ = tile; }
  __device__ __forceinline__ const Task& task() const { return shared_.tasks[PlaceOf<kTasks>(tile_)]; }
  __device__ __forceinline__ int half() const { return half_; }
  // Position of the tile's first row.
  __device__ __forceinline__ int32_t first_position() const { return task().tile_task.tile.first_row; }
  // This lane's first row in the tile; the other is 8 further on.
  __device__ __forceinline__ int32_t first_row() const {
    const int thread = attention::Thread() - kWarpgroupThreads;
    return thread / 32 * 16 + thread % 32 / 4;
  }

  // The first pair of the tile, or the first of those that are left, while none is held. No pair if the tile
  // has no more.
  __device__ __forceinline__ SlotPair Next() {
    SlotPair pair = Read();
    if (InAllLanes(pair.first.is_apart())) {
      Pass();
      pair = Read();
    }
    Pass();
    return pair;
  }
  // Reads what Ahead gives, if it is there by now.
  __device__ __forceinline__ void LookAhead() {
    has_looked_ =
        HasEndedNow(&shared_.pair_full[half_][PlaceOf<kPairRing>(number_)], FullParity<kPairRing>(number_));
    // The address depends on the answer, so that nothing is read before that: else of the pair before, which
    // stays as it is.
    ahead_ = shared_.pairs[half_][PlaceOf<kPairRing>(number_ - (has_looked_ ? 0 : 1))];
  }
  // The pair that may be held together with the one before, which Pass has to follow. No pair if the next is
  // apart or the tile has no more.
  __device__ __forceinline__ SlotPair Ahead() {
    if (InAllLanes(!has_looked_)) ahead_ = Read();
    return ahead_;
  }
  __device__ __forceinline__ void Pass() { ++number_; }

  __device__ __forceinline__ uint32_t k_address(SlotRef slot) const {
    return SharedAddress(shared_.k) + slot.place() * ShapeOf::kSlotBytes;
  }
  __device__ __forceinline__ uint32_t v_address(SlotRef slot) const {
    return SharedAddress(shared_.v) + slot.place() * ShapeOf::kSlotBytes;
  }
  __device__ __forceinline__ const Slot& EntryOf(SlotRef slot) const { return shared_.slots[slot.entry()]; }

  __device__ __forceinline__ void WaitForKeys(const SlotPair& pair) {
    WaitForKeysOf(pair.first);
    WaitForKeysOf(pair.second);
    if (pair.any_gathered()) FenceSharedForAsync();
  }
  __device__ __forceinline__ void WaitForValues(const SlotPair& pair) {
    WaitForValuesOf(pair.first);
    WaitForValuesOf(pair.second);
    if (pair.any_gathered()) FenceSharedForAsync();
  }
  // Both, asking for all before the first answer. That of the second slot's values counts only with the
  // first's.
  __device__ __forceinline__ void WaitFor(const SlotPair& keys, const SlotPair& values) {
    bool there = HasValuesOf(values.first);
    there &= HasValuesOf(values.second);
    there &= HasKeysOf(keys.first);
    there &= HasKeysOf(keys.second);
    if (!there) {
      WaitForKeysOf(keys.first);
      WaitForKeysOf(keys.second);
      WaitForValuesOf(values.first);
      WaitForValuesOf(values.second);
    }
    if (keys.any_gathered() || values.any_gathered()) FenceSharedForAsync();
  }
  __device__ __forceinline__ void ReleaseKeys(const SlotPair& pair) {
    if (!ArrivesForWarp()) return;
    Arrive(&shared_.k_empty[pair.first.place()]);
    if (pair.has_two()) Arrive(&shared_.k_empty[pair.second.place()]);
  }
  // And with them all that is known of the slots.
  __device__ __forceinline__ void ReleaseValues(const SlotPair& pair) {
    __syncwarp();
    if (!ArrivesForWarp()) return;
    if (pair.any_gathered()) {
      if (pair.first.gathered()) ReleaseChunk(pair.first);
      if (pair.has_two() && pair.second.gathered()) ReleaseChunk(pair.second);
    }
    Arrive(&shared_.v_empty[pair.first.place()]);
    if (pair.has_two()) Arrive(&shared_.v_empty[pair.second.place()]);
  }

 private:
  __device__ __forceinline__ SlotPair Read() {
    Wait(&shared_.pair_full[half_][PlaceOf<kPairRing>(number_)], FullParity<kPairRing>(number_));
    return shared_.pairs[half_][PlaceOf<kPairRing>(number_)];
  }
  __device__ __forceinline__ Barrier* ValuesOf(SlotRef slot) {
    return &shared_.v_full[slot.place() + slot.parity() * ShapeOf::kStages];
  }
  __device__ __forceinline__ bool HasKeysOf(SlotRef slot) {
    return HasEnded(&shared_.k_full[slot.place()], slot.parity());
  }
  __device__ __forceinline__ bool HasValuesOf(SlotRef slot) {
    return HasEnded(ValuesOf(slot), slot.value_parity());
  }
  __device__ __forceinline__ void WaitForKeysOf(SlotRef slot) {
    Wait(&shared_.k_full[slot.place()], slot.parity());
  }
  __device__ __forceinline__ void WaitForValuesOf(SlotRef slot) { Wait(ValuesOf(slot), slot.value_parity()); }
  __device__ __forceinline__ void ReleaseChunk(SlotRef slot) {
    Arrive(&shared_.gather_empty[EntryOf(slot).first / kSlotKeys]);
  }

  SharedMemory<ShapeOf>& shared_;
  const int half_;
  int32_t tile_ = 0;
  int32_t number_ = 0;  // of the next pair
  SlotPair ahead_;
  bool has_looked_ = false;
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_SLOT_READER_CUH_
