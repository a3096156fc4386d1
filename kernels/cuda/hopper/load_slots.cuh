#ifndef LONGFILL_KERNELS_CUDA_HOPPER_LOAD_SLOTS_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_LOAD_SLOTS_CUH_

// The loaders: one thread brings consecutive keys with the copy engine, two warps bring gathered ones. Both
// walk through all slots.

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/hopper/shared_memory.cuh"
#include "kernels/cuda/hopper/tma.cuh"

namespace longfill::cuda::hopper {

// One thread.
template <typename ShapeOf>
class ConsecutiveLoader {
 public:
  __device__ __forceinline__ ConsecutiveLoader(const attention::Args& args, SharedMemory<ShapeOf>* shared)
      : args_(args), shared_(*shared) {}

  __device__ __forceinline__ void Run() {
    for (int32_t batch = 0;; ++batch) {
      const int32_t place = PlaceOf<kBatches>(batch);
      Wait(&shared_.batch_full[place], FullParity<kBatches>(batch));
      const int32_t count = shared_.batches[place].count;
      for (int32_t i = 0; i < count; ++i, ++number_) {
        const Slot& slot = shared_.batches[place].slots[i];
        if (slot.kind == SlotKind::kStop) return;
        Bring(slot);
        if (slot.kind == SlotKind::kEnd) ++num_tiles_;
      }
      Arrive(&shared_.batch_empty[place]);
    }
  }

 private:
  __device__ __forceinline__ void Bring(const Slot& slot) {
    Wait(&shared_.k_empty[stage_.place], stage_.parity ^ 1);
    const CUtensorMap* maps = nullptr;
    shared_.slots[PlaceOf<kSlotRing>(number_)] = slot;
    if (slot.kind == SlotKind::kConsecutive) maps = Maps();
    Fill(&shared_.k_full[stage_.place], shared_.k[stage_.place], maps, slot.first);
    Wait(&shared_.v_empty[stage_.place], stage_.parity ^ 1);
    Fill(&shared_.v_full[stage_.place], shared_.v[stage_.place], maps == nullptr ? nullptr : maps + 1,
         slot.first);
    stage_.Next();
  }

  // The maps of K and V of the tile's sequence.
  __device__ __forceinline__ const CUtensorMap* Maps() {
    const auto& task = shared_.tasks[PlaceOf<kTasks>(num_tiles_)].tile_task;
    kv_head_ = task.kv_head;
    key_begin_ = task.tile.key_begin;
    const auto* maps = static_cast<const CUtensorMap*>(args_.tensor_maps) + 2 * task.sequence_number;
    if (maps != maps_) {
      AcquireTensorMap(maps);
      AcquireTensorMap(maps + 1);
      maps_ = maps;
    }
    return maps;
  }

  // Nothing is to be brought without a map.
  __device__ __forceinline__ void Fill(Barrier* full, const char* to, const CUtensorMap* map, int32_t first) {
    if (map == nullptr) {
      Arrive(full);
      return;
    }
    ArriveExpecting(full, ShapeOf::kSlotBytes);
    const uint32_t address = SharedAddress(to);
#pragma unroll
    for (int i = 0; i < ShapeOf::kBlocks; ++i) {
      CopyBox(address + i * ShapeOf::kBlockBytes, map, i * ShapeOf::kBlockDims, first - key_begin_, kv_head_,
              full);
    }
  }

  const attention::Args& args_;
  SharedMemory<ShapeOf>& shared_;
  const CUtensorMap* maps_ = nullptr;
  int32_t number_ = 0;
  RingPlace<ShapeOf::kStages> stage_;
  int32_t num_tiles_ = 0;
  int32_t kv_head_ = 0;
  int32_t key_begin_ = 0;
};

// Two warps, each with half of the rows of a slot. Copies announce themselves when they are complete, so that
// a warp goes on to the next slot at once.
template <typename ShapeOf>
class GatherLoader {
 public:
  __device__ __forceinline__ GatherLoader(const attention::Args& args, int warp,
                                          SharedMemory<ShapeOf>* shared)
      : args_(args), shared_(*shared), warp_(warp) {}

  __device__ __forceinline__ void Run() {
    for (int32_t batch = 0;; ++batch) {
      const int32_t place = PlaceOf<kBatches>(batch);
      Wait(&shared_.batch_full[place], FullParity<kBatches>(batch));
      const int32_t count = shared_.batches[place].count;
      for (int32_t i = 0; i < count; ++i) {
        const Slot& slot = shared_.batches[place].slots[i];
        if (slot.kind == SlotKind::kStop) return;
        const auto& task = shared_.tasks[PlaceOf<kTasks>(num_tiles_)].tile_task;
        Wait(&shared_.k_empty[stage_.place], stage_.parity ^ 1);
        Fill(&shared_.k_full[stage_.place], shared_.k[stage_.place], slot, task.k, args_.k_row_stride);
        Wait(&shared_.v_empty[stage_.place], stage_.parity ^ 1);
        Fill(&shared_.v_full[stage_.place], shared_.v[stage_.place], slot, task.v, args_.v_row_stride);
        stage_.Next();
        if (slot.kind == SlotKind::kEnd) ++num_tiles_;
      }
      Arrive(&shared_.batch_empty[place]);
    }
  }

 private:
  static constexpr int kPieces = ShapeOf::kRowBytes / 16;  // of a row of a block
  static constexpr int kRowsAtOnce = 32 / kPieces;
  static constexpr int kWarpRows = kSlotKeys / kNumGatherWarps;

  // This warp's rows of K or V of a gathered slot; of others there are none. `key_0` is where the key at
  // position 0 would be.
  __device__ __forceinline__ void Fill(Barrier* full, const char* to, const Slot& slot, const char* key_0,
                                       int64_t key_stride) {
    if (slot.kind != SlotKind::kGathered) {
      if (attention::Lane() == 0) ArriveFor<32>(full);
      return;
    }
    const int lane = attention::Lane();
    const int32_t* keys = shared_.ring.keys + slot.first;
    const int piece = lane % kPieces;
    const int row = warp_ * kWarpRows + lane / kPieces;  // the first of this lane's
    const uint32_t address = SharedAddress(to);
    // Any key that is given stands for one that is not there: nothing is read of it.
    const int32_t any_key = shared_.tasks[PlaceOf<kTasks>(num_tiles_)].tile_task.tile.key_begin;
#pragma unroll 4
    for (int step = 0; step < kWarpRows / kRowsAtOnce; ++step) {
      const int i = row + step * kRowsAtOnce;
      const int32_t key = keys[i];
      const bool valid = key != attention::kNoKey;
      const char* from = key_0 + 2 * int64_t{valid ? key : any_key} * key_stride + piece * 16;
      // The swizzle: bits 4 .. of an address are permuted by bits 7 .. of it.
      const int line = i * ShapeOf::kRowBytes / 128;
      const uint32_t at = address + i * ShapeOf::kRowBytes + (piece ^ line % kPieces) * 16;
#pragma unroll
      for (int j = 0; j < ShapeOf::kBlocks; ++j) {
        attention::CopyAsync16(at + j * ShapeOf::kBlockBytes, from + j * ShapeOf::kRowBytes, valid);
      }
    }
    ArriveWhenCopied(full);
  }

  const attention::Args& args_;
  SharedMemory<ShapeOf>& shared_;
  const int warp_;  // of the two
  RingPlace<ShapeOf::kStages> stage_;
  int32_t num_tiles_ = 0;
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_LOAD_SLOTS_CUH_
