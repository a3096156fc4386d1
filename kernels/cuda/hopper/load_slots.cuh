#ifndef LONGFILL_KERNELS_CUDA_HOPPER_LOAD_SLOTS_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_LOAD_SLOTS_CUH_

// The loaders: one warp brings keys, another one values, so that the place of a key is filled again as soon
// as its products are there and not when its value's are. A lane brings consecutive rows with the copy
// engine, all of them gathered ones. Both walk through all slots.

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/attention/attention_args.h"
#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/hopper/shared_memory.cuh"
#include "kernels/cuda/hopper/tma.cuh"

namespace longfill::cuda::hopper {

// What the keys' and the values' loader differ in.
template <typename ShapeOf, bool kValues>
struct RowsOf {
  static constexpr int kTensorMap = kValues ? 1 : 0;  // of the two of a sequence
  static __device__ __forceinline__ char* Place(SharedMemory<ShapeOf>& shared, uint32_t i) {
    return kValues ? shared.v[i] : shared.k[i];
  }
  static __device__ __forceinline__ Barrier* Full(SharedMemory<ShapeOf>& shared) {
    return kValues ? shared.v_full : shared.k_full;
  }
  static __device__ __forceinline__ Barrier* Empty(SharedMemory<ShapeOf>& shared) {
    return kValues ? shared.v_empty : shared.k_empty;
  }
  static __device__ __forceinline__ const char* Row0(const attention::TileTask<kTileRows>& task) {
    return kValues ? task.v : task.k;
  }
  static __device__ __forceinline__ int64_t RowStride(const attention::Args& args) {
    return kValues ? args.v_row_stride : args.k_row_stride;
  }
};

// One warp. Copies announce themselves when they are complete, so that it goes on to the next slot at once.
template <typename ShapeOf, bool kValues>
class SlotLoader {
  using Rows = RowsOf<ShapeOf, kValues>;

 public:
  __device__ __forceinline__ SlotLoader(const attention::Args& args, SharedMemory<ShapeOf>* shared)
      : args_(args), shared_(*shared) {}

  __device__ __forceinline__ void Run() {
    for (int32_t batch = 0;; ++batch) {
      const int32_t place = PlaceOf<kBatches>(batch);
      Wait(&shared_.batch_full[place], FullParity<kBatches>(batch));
      const int32_t count = shared_.batches[place].count;
      for (int32_t i = 0; i < count; ++i, ++number_) {
        const Slot& slot = shared_.batches[place].slots[i];
        if (slot.kind == SlotKind::kStop) return;
        Wait(&Rows::Empty(shared_)[stage_.place], stage_.parity ^ 1);
        // What a slot is, consumers read once its keys are there.
        if (!kValues && IsFirst()) shared_.slots[PlaceOf<kSlotRing>(number_)] = slot;
        Bring(slot);
        stage_.Next();
        if (slot.kind == SlotKind::kEnd) ++num_tiles_;
      }
      __syncwarp();
      if (kEachLaneArrives || IsFirst()) Arrive(&shared_.batch_empty[place]);
    }
  }

 private:
  static constexpr int kPieces = ShapeOf::kRowBytes / 16;  // of a row of a block
  static constexpr int kRowsAtOnce = 32 / kPieces;

  static __device__ __forceinline__ bool IsFirst() { return attention::Lane() == 0; }
  __device__ __forceinline__ const attention::TileTask<kTileRows>& task() const {
    return shared_.tasks[PlaceOf<kTasks>(num_tiles_)].tile_task;
  }

  // The first lane's own arrival is what releases that it has written down the slot; those of all lanes (see
  // kFullArrivals) are of what was copied.
  __device__ __forceinline__ void Bring(const Slot& slot) {
    Barrier* const full = &Rows::Full(shared_)[stage_.place];
    const uint32_t to = SharedAddress(Rows::Place(shared_, stage_.place));
    if (slot.kind == SlotKind::kGathered) {
      Gather(slot, to);
      ArriveWhenCopied(full);
      if (IsFirst()) Arrive(full);
      return;
    }
    if (!IsFirst()) return;
    ArriveFor<32>(full);
    if (slot.kind == SlotKind::kConsecutive) {
      CopyConsecutive(slot.first, to, full);
    } else {
      Arrive(full);
    }
  }

  // One lane.
  __device__ __forceinline__ void CopyConsecutive(int32_t first, uint32_t to, Barrier* full) {
    const int32_t kv_head = task().kv_head;
    const int32_t key_begin = task().tile.key_begin;
    const auto* map =
        static_cast<const CUtensorMap*>(args_.tensor_maps) + 2 * task().sequence_number + Rows::kTensorMap;
    if (map != map_) {
      AcquireTensorMap(map);
      map_ = map;
    }
    ArriveExpecting(full, ShapeOf::kSlotBytes);
#pragma unroll
    for (int i = 0; i < ShapeOf::kBlocks; ++i) {
      CopyBox(to + i * ShapeOf::kBlockBytes, map, i * ShapeOf::kBlockDims, first - key_begin, kv_head, full);
    }
  }

  __device__ __forceinline__ void Gather(const Slot& slot, uint32_t to) {
    const int lane = attention::Lane();
    const int32_t* keys = shared_.ring.keys + slot.first;
    const char* const row_0 = Rows::Row0(task());  // where that of the key at position 0 would be
    const int64_t stride = Rows::RowStride(args_);
    const int piece = lane % kPieces;
    // Any key that is given stands for one that is not there: nothing is read of it.
    const int32_t any_key = task().tile.key_begin;
#pragma unroll 4
    for (int i = lane / kPieces; i < kSlotKeys; i += kRowsAtOnce) {
      const int32_t key = keys[i];
      const bool valid = key != attention::kNoKey;
      const char* from = row_0 + 2 * int64_t{valid ? key : any_key} * stride + piece * 16;
      // The swizzle: bits 4 .. of an address are permuted by bits 7 .. of it.
      const int line = i * ShapeOf::kRowBytes / 128;
      const uint32_t at = to + i * ShapeOf::kRowBytes + (piece ^ line % kPieces) * 16;
#pragma unroll
      for (int j = 0; j < ShapeOf::kBlocks; ++j) {
        attention::CopyAsync16(at + j * ShapeOf::kBlockBytes, from + j * ShapeOf::kRowBytes, valid);
      }
    }
  }

  const attention::Args& args_;
  SharedMemory<ShapeOf>& shared_;
  const CUtensorMap* map_ = nullptr;
  int32_t number_ = 0;
  RingPlace<ShapeOf::kStages> stage_;
  int32_t num_tiles_ = 0;
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_LOAD_SLOTS_CUH_
