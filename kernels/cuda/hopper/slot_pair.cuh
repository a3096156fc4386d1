#ifndef LONGFILL_KERNELS_CUDA_HOPPER_SLOT_PAIR_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_SLOT_PAIR_CUH_

// What a consumer is told of the slots that it multiplies: from the warp that pairs them (pair_slots.cuh).

#include <cstdint>

namespace longfill::cuda::hopper {

// A slot in one register: where it is, what it is, and where more is written of it.
struct SlotRef {
  uint32_t bits = kNone;

  static constexpr int kParityShift = 4;       // of k_full
  static constexpr int kValueParityShift = 5;  // of v_full, see SharedMemory
  static constexpr uint32_t kGathered = 1U << 6;
  static constexpr uint32_t kMasked = 1U << 7;  // not all rows of the half see all its keys
  static constexpr uint32_t kNone = 1U << 8;
  // With kNone: what follows in the tile lies too far from the pair before to be held together with it.
  static constexpr uint32_t kApart = 1U << 9;
  static constexpr int kEntryShift = 16;

  __device__ __forceinline__ bool exists() const { return (bits & kNone) == 0; }
  __device__ __forceinline__ bool is_apart() const { return (bits & kApart) != 0; }
  __device__ __forceinline__ uint32_t place() const { return bits & 15; }
  __device__ __forceinline__ uint32_t parity() const { return bits >> kParityShift & 1; }
  __device__ __forceinline__ uint32_t value_parity() const { return bits >> kValueParityShift & 1; }
  __device__ __forceinline__ bool gathered() const { return (bits & kGathered) != 0; }
  __device__ __forceinline__ bool masked() const { return (bits & kMasked) != 0; }
  // Place in the ring of slots.
  __device__ __forceinline__ uint32_t entry() const { return bits >> kEntryShift; }
};

// A pair of one slot has it twice, the second time to be multiplied by zeros: a branch around products would
// make the compiler wait for them one by one. Without a first slot there is none, and either the tile ends
// here or what follows is apart.
struct alignas(8) SlotPair {
  SlotRef first;
  SlotRef second;

  __device__ __forceinline__ bool has_two() const { return first.bits != second.bits; }
  __device__ __forceinline__ bool any_gathered() const {
    return ((first.bits | second.bits) & SlotRef::kGathered) != 0;
  }
  __device__ __forceinline__ bool any_masked() const {
    return ((first.bits | second.bits) & SlotRef::kMasked) != 0;
  }
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_SLOT_PAIR_CUH_
