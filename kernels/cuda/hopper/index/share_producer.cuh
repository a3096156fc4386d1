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

template <typename ShapeOf>
class Producer {
 public:
  __device__ __forceinline__ Producer(const ShareSelectionArgs& args, const ShareMaps& maps,
                                      Memory<ShapeOf>* memory)
      : args_(args),
        maps_(maps),
        tile_(memory->tile),
        memory_(*memory),
        thread_(static_cast<int>(threadIdx.x) - kConsumerThreads) {}

  __device__ __forceinline__ void Run() {
    if (thread_ < 32) BringChunks();
    Wait(&memory_.marked, 0);
    if (memory_.spilled != 0) GatherCandidates();
  }

 private:
  static constexpr int kStages = Memory<ShapeOf>::kStages;

  // The keys of each row block, where there are samples, then chunks from the nearest to the first. One warp.
  __device__ __forceinline__ void BringChunks() {
    if (args_.num_samples > 0) {
      for (int i = 0; i < kRowBlocks; ++i) {
        Wait(&memory_.chunks.empty[place_.place], place_.parity ^ 1);
        if (thread_ == 0) {
          ArriveExpecting(&memory_.chunks.full[place_.place], ShapeOf::kSlotBytes);
          Copy(maps_.own_keys, static_cast<int32_t>(tile_.first_row()) + i * int{kRowBlock}, 0, 0);
        }
        OthersArrive();
        place_.Next();
      }
    }
    Eight eight = kNoEight;  // of this lane's place in the chunk that is filled from its end
    int count = 0;
    int32_t word = tile_.num_open_words() - 1;
    OpenWords next = word >= 0 ? OpenIn(word) : OpenWords{};
    for (; word >= 0; --word) {
      const OpenWords open = next;
      if (word > 0) next = OpenIn(word - 1);  // on its way while chunks are brought
      for (uint64_t any = open.Any(); any != 0;) {
        const int last = 63 - __clzll(static_cast<long long>(any));
        any &= ~(1ULL << last);
        ++count;
        if (thread_ == kEights - count) eight = Eight::Of(64 * word + last, open.At(last));
        if (count < kEights) continue;
        BringChunk(eight, count);
        eight = kNoEight;
        count = 0;
      }
    }
    if (count > 0) BringChunk(eight, count);
    Wait(&memory_.chunks.empty[place_.place], place_.parity ^ 1);
    Describe(kNoMore);
    if (thread_ < kArrivalsOfWarp) Arrive(&memory_.chunks.full[place_.place]);
  }
  // Of 64 eights, for each row block.
  struct OpenWords {
    uint64_t of[kRowBlocks];

    __device__ __forceinline__ uint64_t Any() const {
      uint64_t any = 0;
      for (int i = 0; i < kRowBlocks; ++i) any |= of[i];
      return any;
    }
    __device__ __forceinline__ int32_t At(int n) const {
      int32_t open = 0;
      for (int i = 0; i < kRowBlocks; ++i) open |= static_cast<int32_t>(of[i] >> n & 1) << i;
      return open;
    }
  };
  __device__ __forceinline__ OpenWords OpenIn(int32_t word) const {
    OpenWords open;
#pragma unroll
    for (int i = 0; i < kRowBlocks; ++i) open.of[i] = tile_.Exists(i) ? tile_.OpenEights(args_, i, word) : 0;
    return open;
  }
  // Lane n < kEights has the n-th eight of the chunk; `count` of them are none of kNoEight, the last ones.
  __device__ __forceinline__ void BringChunk(Eight eight, int count) {
    const int32_t first = __shfl_sync(attention::kAllLanes, eight.number(), 0);
    const int32_t last = __shfl_sync(attention::kAllLanes, eight.number(), kEights - 1);
    const bool neighbours = count == kEights && last - first == kEights - 1;
    for (int r = 0; r < args_.num_representatives; ++r) {
      Wait(&memory_.chunks.empty[place_.place], place_.parity ^ 1);
      if (r == 0) Describe(eight);
      if (thread_ == 0) {
        ArriveExpecting(&memory_.chunks.full[place_.place], count * (ShapeOf::kSlotBytes / kEights));
        if (neighbours) Copy(maps_.chunks, 8 * first, r, 0);
      }
      OthersArrive();
      __syncwarp();  // who copies first has to be expected
      if (!neighbours && thread_ < kEights && eight.exists())
        Copy(maps_.eights, eight.first_block(), r, 8 * thread_);
      place_.Next();
    }
    chunk_.Next();
  }
  // Beside the first lane, which has arrived expecting a stage.
  __device__ __forceinline__ void OthersArrive() {
    if (kEachLaneArrives && thread_ != 0) Arrive(&memory_.chunks.full[place_.place]);
  }
  // What consumers read of the chunk when its first stage is there.
  __device__ __forceinline__ void Describe(Eight eight) {
    if (thread_ < kEights) memory_.eights[chunk_.place][thread_] = eight;
    if constexpr (Memory<ShapeOf>::kFp8) {
      // Four lanes for each eight.
      const int32_t block =
          __shfl_sync(attention::kAllLanes, eight.first_block(), thread_ / 4) + thread_ % 4 * 2;
      const float2 scales =
          block < 0 ? float2{1, 1} : *reinterpret_cast<const float2*>(args_.block_scales + block);
      *reinterpret_cast<float2*>(memory_.chunk_scales.of_block[chunk_.place] + 2 * thread_) = scales;
    }
    __syncwarp();
  }
  // Rows from `row` of a plane on, as many as the map has in a box, to row `to_row` of the stage. One thread.
  __device__ __forceinline__ void Copy(const CUtensorMap& map, int32_t row, int32_t plane, int to_row) {
    const uint32_t to = SharedAddress(memory_.stages[place_.place]) + to_row * ShapeOf::kRowBytes;
#pragma unroll
    for (int i = 0; i < ShapeOf::kBlocks; ++i) {
      CopyBox(to + i * ShapeOf::kBlockBytes, &map, i * (ShapeOf::kRowBytes / 2), row, plane,
              &memory_.chunks.full[place_.place]);
    }
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
        if constexpr (Memory<ShapeOf>::kFp8) {
          __syncwarp();  // the list is there
          for (int i = thread_; i < kChunkBlocks; i += 32) {
            memory_.list_scales.of_block[list][i] = i < size ? args_.block_scales[memory_.lists[list][i]] : 1;
          }
        }
      }
      SyncWarpgroup(kRowBlocks);
      if (thread_ < kArrivalsOfWarp) Arrive(&memory_.list_full[list]);
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
      candidates |= __ldcg(reinterpret_cast<const unsigned long long*>(tile_.BitsOf(args_, i) + word));
    }
    return candidates;
  }

  // Rows of 16-byte pieces, swizzled as the copy engine does it; zeros beyond the list.
  __device__ __forceinline__ void Gather(const int32_t* list, int size, int r, uint32_t to) const {
    constexpr int kPieces = ShapeOf::kRowBytes / 16;  // of a row of a block
    constexpr int kRowsAtOnce = kWarpgroupThreads / kPieces;
    const char* const plane =
        static_cast<const char*>(args_.representatives) + ShapeOf::kElementBytes * r * args_.plane_stride;
    const int piece = thread_ % kPieces;
#pragma unroll 2
    for (int i = thread_ / kPieces; i < kChunkBlocks; i += kRowsAtOnce) {
      const bool valid = i < size;
      const char* from =
          plane + (valid ? int64_t{list[i]} : 0) * (ShapeOf::kElementBytes * ShapeOf::kHeadDim) + piece * 16;
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
  Memory<ShapeOf>& memory_;
  const int thread_;  // of the warpgroup
  RingPlace<kStages> place_;
  RingPlace<Memory<ShapeOf>::kChunks> chunk_;
};

}  // namespace longfill::cuda::hopper::share

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_INDEX_SHARE_PRODUCER_CUH_
