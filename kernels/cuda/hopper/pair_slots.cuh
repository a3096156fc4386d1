#ifndef LONGFILL_KERNELS_CUDA_HOPPER_PAIR_SLOTS_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_PAIR_SLOTS_CUH_

// The pairing warp: forms the pairs of slots that each half multiplies, so that consumers, whose time it is
// that bounds the kernel, only read what comes next. Which slots form a pair depends on the tile's slots
// alone, since it decides the rounding.

#include <cstdint>

#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/cuda/hopper/shared_memory.cuh"

namespace longfill::cuda::hopper {

// A pair is a slot of the half and its next one less than kReach further on, or the slot alone. Where a pair
// begins less than kReach after the one before did, it ends there too, and a half holds both at a time; else
// the half is told that it is apart.
template <typename ShapeOf>
class SlotPairer {
 public:
  __device__ __forceinline__ explicit SlotPairer(SharedMemory<ShapeOf>* shared) : shared_(*shared) {}

  __device__ __forceinline__ void Run() {
    for (int32_t batch = 0;; ++batch) {
      const int32_t place = PlaceOf<kBatches>(batch);
      Wait(&shared_.batch_full[place], FullParity<kBatches>(batch));
      const int32_t count = shared_.batches[place].count;
      for (int32_t i = 0; i < count; ++i) {
        const Slot& slot = shared_.batches[place].slots[i];
        const uint32_t facts = slot.Facts();
        if (Slot::KindOf(facts) == SlotKind::kStop) return;
        Wait(&shared_.k_empty[stage_.place], stage_.parity ^ 1);
        // For a half that does not multiply it; of a tile's end for one, the keys' loader arrives for the
        // other.
        if (Slot::UsedOf(facts) != 3 && IsFirst()) {
          ArriveFor(&shared_.k_empty[stage_.place], kHalfArrivals);
        }
        WriteDown(slot);
        if (attention::Lane() < 2) Pair(facts);
        stage_.Next();
        v_full_.Next();
        ++number_;
      }
      ArriveAsWarp(&shared_.batch_empty[place]);
    }
  }

 private:
  static __device__ __forceinline__ bool IsFirst() { return attention::Lane() == 0; }

  // What consumers look at where a slot is masked or gathered.
  __device__ __forceinline__ void WriteDown(const Slot& slot) {
    constexpr int kWords = sizeof(Slot) / 4;
    auto* const to = reinterpret_cast<uint32_t*>(&shared_.slots[PlaceOf<kSlotRing>(number_)]);
    if (attention::Lane() < kWords) {
      to[attention::Lane()] = reinterpret_cast<const uint32_t*>(&slot)[attention::Lane()];
    }
    __syncwarp();
  }

  // A lane for each half. Says what is certain with this slot and no later: consumers may have to go on for
  // the next to be brought.
  __device__ __forceinline__ void Pair(uint32_t facts) {
    const int half = attention::Lane();
    const bool ends = Slot::KindOf(facts) == SlotKind::kEnd;
    if ((Slot::UsedOf(facts) >> half & 1) != 0) {
      const SlotRef slot = RefOf(facts, half);
      if (first_.exists()) {
        PutPair(slot);
      } else {
        first_ = slot;
        first_number_ = number_;
        last_number_ = (holds_ ? held_number_ : number_) + kReach - 1;
      }
    }
    if (first_.exists() && (number_ == last_number_ || ends)) PutPair(first_);
    if (ends) {
      Put({SlotRef(), SlotRef()});
      holds_ = false;
    } else if (holds_ && !first_.exists() && number_ == held_number_ + kReach - 1) {
      const SlotRef apart = {SlotRef::kNone | SlotRef::kApart};
      Put({apart, apart});
      holds_ = false;
    }
  }

  __device__ __forceinline__ SlotRef RefOf(uint32_t facts, int half) const {
    SlotRef slot = {stage_.place | stage_.parity << SlotRef::kParityShift |
                    v_full_.parity << SlotRef::kValueParityShift |
                    static_cast<uint32_t>(PlaceOf<kSlotRing>(number_)) << SlotRef::kEntryShift};
    if (Slot::KindOf(facts) == SlotKind::kGathered) slot.bits |= SlotRef::kGathered;
    if ((facts >> Slot::kMaskedShift >> half & 1) != 0) slot.bits |= SlotRef::kMasked;
    return slot;
  }

  __device__ __forceinline__ void PutPair(SlotRef second) {
    Put({first_, second});
    held_number_ = first_number_;
    holds_ = true;
    first_ = SlotRef();
  }
  __device__ __forceinline__ void Put(SlotPair pair) {
    const int half = attention::Lane();
    shared_.pairs[half][put_] = pair;
    Arrive(&shared_.pair_full[half][put_]);
    put_ = (put_ + 1) % kPairRing;
  }

  SharedMemory<ShapeOf>& shared_;
  // Of the slot.
  int32_t number_ = 0;
  RingPlace<ShapeOf::kStages> stage_;
  RingPlace<2 * ShapeOf::kStages> v_full_;
  // Of the lane's half.
  uint32_t put_ = 0;  // place of the next pair
  SlotRef first_;     // that waits for its second
  int32_t first_number_ = 0;
  int32_t last_number_ = 0;  // the second's, at most
  bool holds_ = false;       // what comes may be near to the pair before,
  int32_t held_number_ = 0;  // whose first slot this is
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_PAIR_SLOTS_CUH_
