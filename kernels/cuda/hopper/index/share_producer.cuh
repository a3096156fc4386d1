#ifndef LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_PRODUCER_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_PRODUCER_CUH_

// The warpgroup of selection by share that brings stages.

#include <cstdint>

#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/hopper/index/launch_share_selection.h"
#include "kernels/cuda/hopper/index/share_memory.cuh"
#include "kernels/cuda/hopper/tma.cuh"
#include "kernels/cuda/index/gather_blocks.cuh"

namespace longfill::cuda::hopper::share {

template <int kHeadDim>
class Producer {
 public:
  __device__ __forceinline__ Producer(const ShareSelectionArgs& args, const ShareMaps& maps,
                                      Memory<kHeadDim>* memory)
      : args_(args),
        maps_(maps),
        tile_(memory->tile),
        memory_(*memory),
        thread_(static_cast<int>(threadIdx.x) - kConsumerThreads) {}

  __device__ __forceinline__ void Run() {
    if (thread_ == 0) BringChunks();
    __syncwarp();
    Wait(&memory_.marked, 0);
    if (memory_.spilled != 0) GatherCandidates();
  }

 private:
  using ShapeOf = Shape<kHeadDim>;
  static constexpr int kStages = Memory<kHeadDim>::kStages;

  // The keys of each row block, where there are samples, then chunks from the nearest to the first. One
  // thread.
  __device__ __forceinline__ void BringChunks() {
    if (args_.num_samples > 0) {
      for (int i = 0; i < kRowBlocks; ++i) {
        Bring(maps_.own_keys, static_cast<int32_t>(tile_.first_row()) + i * int{kRowBlock}, 0);
      }
    }
    for (int32_t chunk = tile_.num_chunks() - 1; chunk >= 0; --chunk) {
      for (int r = 0; r < args_.num_representatives; ++r)
        Bring(maps_.representatives, chunk * kChunkBlocks, r);
    }
  }
  __device__ __forceinline__ void Bring(const CUtensorMap& map, int32_t row, int32_t plane) {
    Wait(&memory_.chunks.empty[place_.place], place_.parity ^ 1);
    Barrier* const full = &memory_.chunks.full[place_.place];
    ArriveExpecting(full, ShapeOf::kSlotBytes);
    const uint32_t to = SharedAddress(memory_.stages[place_.place]);
#pragma unroll
    for (int i = 0; i < ShapeOf::kBlocks; ++i) {
      CopyBox(to + i * ShapeOf::kBlockBytes, &map, i * ShapeOf::kBlockDims, row, plane, full);
    }
    place_.Next();
  }

  // All representatives of the candidates of any row block, up to 64 candidates at a time.
  __device__ __forceinline__ void GatherCandidates() {
    RingPlace<kStages> place;
    int32_t word = 0;
    for (int32_t n = 0;; ++n) {
      const int32_t list = PlaceOf<kLists>(n);
      if (thread_ < 32) {
        Wait(&memory_.list_empty[list], EmptyParity<kLists>(n));
        const int size = share_selection::GatherBlocks(
            tile_.num_chunks(), [&](int32_t w) { return CandidatesIn(w); }, memory_.lists[list], &word);
        if (thread_ == 0) memory_.list_size[list] = size;
      }
      SyncWarpgroup(kRowBlocks);
      if (thread_ == 0) Arrive(&memory_.list_full[list]);
      const int size = memory_.list_size[list];
      if (size == 0) return;
      for (int r = 0; r < args_.num_representatives; ++r) {
        Wait(&memory_.gathered.empty[place.place], place.parity ^ 1);
        Gather(memory_.lists[list], size, r, SharedAddress(memory_.stages[place.place]));
        ArriveWhenCopied(&memory_.gathered.full[place.place]);
        place.Next();
      }
    }
  }
  // Past L1, as atomics of other threads wrote them.
  __device__ __forceinline__ uint64_t CandidatesIn(int32_t word) const {
    uint64_t candidates = 0;
    for (int i = 0; i < kRowBlocks; ++i) {
      if (!tile_.Exists(i)) continue;
      candidates |= __ldcg(reinterpret_cast<const unsigned long long*>(tile_.BitsOf(i) + word));
    }
    return candidates;
  }

  // Rows of 16-byte pieces, swizzled as the copy engine does it; zeros beyond the list.
  __device__ __forceinline__ void Gather(const int32_t* list, int size, int r, uint32_t to) const {
    constexpr int kPieces = ShapeOf::kRowBytes / 16;  // of a row of a block
    constexpr int kRowsAtOnce = kWarpgroupThreads / kPieces;
    const char* const plane = static_cast<const char*>(args_.representatives) + 2 * r * args_.plane_stride;
    const int piece = thread_ % kPieces;
#pragma unroll 2
    for (int i = thread_ / kPieces; i < kChunkBlocks; i += kRowsAtOnce) {
      const bool valid = i < size;
      const char* from = plane + (valid ? int64_t{list[i]} : 0) * (2 * kHeadDim) + piece * 16;
      const int line = i * ShapeOf::kRowBytes / 128;
      const uint32_t at = to + i * ShapeOf::kRowBytes + (piece ^ line % kPieces) * 16;
#pragma unroll
      for (int j = 0; j < ShapeOf::kBlocks; ++j) {
        attention::CopyAsync16(at + j * ShapeOf::kBlockBytes, from + j * ShapeOf::kRowBytes, valid);
      }
    }
  }

  const ShareSelectionArgs& args_;
  const ShareMaps& maps_;
  const Tile& tile_;
  Memory<kHeadDim>& memory_;
  const int thread_;  // of the warpgroup
  RingPlace<kStages> place_;
};

}  // namespace longfill::cuda::hopper::share

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_PRODUCER_CUH_
