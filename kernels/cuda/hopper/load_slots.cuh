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
  static constexpr int kTensorMap = kValues ? 1 : 0;                  // of the two of a sequence
  static constexpr int kFull = (kValues ? 2 : 1) * ShapeOf::kStages;  // barriers
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
// Its own time for a slot bounds sparse tiles, so it keeps what it needs of a tile and knows the next slot
// early.
template <typename ShapeOf, bool kValues>
class SlotLoader {
  using Rows = RowsOf<ShapeOf, kValues>;

 public:
  __device__ __forceinline__ SlotLoader(const attention::Args& args, SharedMemory<ShapeOf>* shared)
      : args_(args), shared_(*shared) {}

  __device__ __forceinline__ void Run() {
    bool starts = true;  // a tile
    for (int32_t batch = 0;; ++batch) {
      const int32_t place = PlaceOf<kBatches>(batch);
      Wait(&shared_.batch_full[place], FullParity<kBatches>(batch));
      const SlotBatch& slots = shared_.batches[place];
      const int32_t count = slots.count;
      Head slot = HeadOf(slots.slots[0]);
      if (slot.kind() == SlotKind::kStop) return;
      if (starts && slot.kind() != SlotKind::kEnd) {
        StartTile();
        starts = false;
      }
      for (int32_t i = 0; i < count; ++i) {
        const Head next = HeadOf(slots.slots[::min(i + 1, count - 1)]);
        Wait(&Rows::Empty(shared_)[stage_.place], stage_.parity ^ 1);
        Bring(slot);
        if (slot.kind() == SlotKind::kEnd) {
          ++num_tiles_;
          starts = true;
        }
        ArriveForIdle(slot);
        stage_.Next();
        full_.Next();
        slot = next;
      }
      ArriveAsWarp(&shared_.batch_empty[place]);
    }
  }

 private:
  static constexpr int kPieces = ShapeOf::kRowBytes / 16;        // of a row of a block, each a lane's
  static constexpr int kGroupRows = kSlotKeys / (32 / kPieces);  // of the lanes that have those of a row

  // What a loader must know of a slot.
  struct Head {
    int32_t first;
    uint32_t facts;
    __device__ __forceinline__ SlotKind kind() const { return Slot::KindOf(facts); }
  };
  static __device__ __forceinline__ Head HeadOf(const Slot& slot) {
    const int2 two = *reinterpret_cast<const int2*>(&slot);
    return {two.x, static_cast<uint32_t>(two.y)};
  }
  static __device__ __forceinline__ bool IsFirst() { return attention::Lane() == 0; }

  __device__ __forceinline__ void StartTile() {
    const attention::TileTask<kTileRows>& task = shared_.tasks[PlaceOf<kTasks>(num_tiles_)].tile_task;
    row_0_ = Rows::Row0(task) + attention::Lane() % kPieces * 16;
    kv_head_ = task.kv_head;
    key_begin_ = task.tile.key_begin;
    const auto* map =
        static_cast<const CUtensorMap*>(args_.tensor_maps) + 2 * task.sequence_number + Rows::kTensorMap;
    if (map != map_ && IsFirst()) AcquireTensorMap(map);
    map_ = map;
    __syncwarp();  // all have read the task, which the first lane's arrivals keep where it is
  }

  __device__ __forceinline__ void Bring(const Head& slot) {
    Barrier* const full = &Rows::Full(shared_)[full_.place];
    const uint32_t to = SharedAddress(Rows::Place(shared_, stage_.place));
    if (slot.kind() == SlotKind::kConsecutive) {
      if (IsFirst()) {
        ArriveExpecting(full, ShapeOf::kSlotBytes);
        CopyWholeRows(to, map_, slot.first - key_begin_, kv_head_, full);
      }
      return;
    }
    if (slot.kind() == SlotKind::kGathered) {
      Gather(slot.first, to);
      ExpectCopies(full);
      __syncwarp();  // all lanes' copies are expected, and the keys are read
    }
    if (IsFirst()) Arrive(full);
  }

  // Arrivals that are this loader's for halves that do not multiply the slot, once its place is its own.
  __device__ __forceinline__ void ArriveForIdle(const Head& slot) {
    if (!IsFirst()) return;
    if constexpr (kValues) {
      const int idle = 2 - __popc(Slot::UsedOf(slot.facts));
      if (idle == 0) return;
      ArriveFor(&shared_.v_empty[stage_.place], idle * kHalfArrivals);
      if (slot.kind() == SlotKind::kGathered) {
        ArriveFor(&shared_.gather_empty[slot.first / kSlotKeys], idle * kHalfArrivals);
      }
    } else if (slot.kind() == SlotKind::kEnd) {
      ArriveFor(&shared_.k_empty[stage_.place], kHalfArrivals);
    }
  }

  // Each group of lanes has kGroupRows consecutive rows, so that a lane reads four keys at a time and the
  // swizzle is known beforehand.
  __device__ __forceinline__ void Gather(int32_t first, uint32_t to) {
    const int group = attention::Lane() / kPieces;
    const int piece = attention::Lane() % kPieces;
    const int4* keys = reinterpret_cast<const int4*>(shared_.ring.keys + first + group * kGroupRows);
    const int64_t stride = 2 * Rows::RowStride(args_);
    to += group * kGroupRows * ShapeOf::kRowBytes;
#pragma unroll
    for (int i = 0; i < kGroupRows; i += 4) {
      const int4 four = keys[i / 4];
      CopyRow(i, four.x, piece, stride, to);
      CopyRow(i + 1, four.y, piece, stride, to);
      CopyRow(i + 2, four.z, piece, stride, to);
      CopyRow(i + 3, four.w, piece, stride, to);
    }
  }
  __device__ __forceinline__ void CopyRow(int i, int32_t key, int piece, int64_t stride, uint32_t to) {
    // Any key that is given stands for one that is not there: nothing is read of it.
    const bool valid = key != attention::kNoKey;
    const char* const from = row_0_ + int64_t{valid ? key : key_begin_} * stride;
    // The swizzle: bits 4 .. of an address are permuted by bits 7 .. of it.
    static_assert(kGroupRows * ShapeOf::kRowBytes / 128 % kPieces == 0);
    const int line = i * ShapeOf::kRowBytes / 128;
    const uint32_t at = to + i * ShapeOf::kRowBytes + (piece ^ line % kPieces) * 16;
#pragma unroll
    for (int j = 0; j < ShapeOf::kBlocks; ++j) {
      attention::CopyAsync16(at + j * ShapeOf::kBlockBytes, from + j * ShapeOf::kRowBytes, valid);
    }
  }

  const attention::Args& args_;
  SharedMemory<ShapeOf>& shared_;
  // Of the tile.
  const CUtensorMap* map_ = nullptr;
  const char* row_0_ = nullptr;  // this lane's piece of the row where that of the key at position 0 would be
  int32_t kv_head_ = 0;
  int32_t key_begin_ = 0;
  RingPlace<ShapeOf::kStages> stage_;
  RingPlace<Rows::kFull> full_;
  int32_t num_tiles_ = 0;
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_LOAD_SLOTS_CUH_
