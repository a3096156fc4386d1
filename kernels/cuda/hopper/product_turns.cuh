#ifndef LONGFILL_KERNELS_CUDA_HOPPER_PRODUCT_TURNS_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_PRODUCT_TURNS_CUH_

// The two consumers take turns at the matrix units: whoever starts products of a pair keeps the turn until
// its scores are there. So one has its softmax while the other has the matrix units, instead of both waiting
// for the same (the ping-pong of FlashAttention-3, but without a fixed order, since the halves of a tile
// have different slots: a turn is for whoever asks first).

#include <cstdint>

#include "kernels/cuda/attention/mma.cuh"
#include "kernels/cuda/attention/tile_rows.cuh"
#include "kernels/cuda/hopper/barrier.cuh"
#include "kernels/cuda/hopper/shared_memory.cuh"

namespace longfill::cuda::hopper {

// A lock with numbered tickets: ticket n waits until n turns were given back, of which at most one is out.
template <typename ShapeOf>
class ProductTurns {
 public:
  __device__ __forceinline__ ProductTurns(int half, SharedMemory<ShapeOf>* shared)
      : shared_(*shared), half_(half) {}

  // All threads of the warpgroup.
  __device__ __forceinline__ void Take() {
    if (IsFirst()) {
      // Only the ticket's parity matters. Additions would be made into one for the warp first.
      uint32_t ticket;
      asm volatile("atom.relaxed.cta.shared::cta.xor.b32 %0, [%1], 1;\n"
                   : "=r"(ticket)
                   : "r"(SharedAddress(&shared_.next_turn))
                   : "memory");
      Wait(&shared_.turn_given, ticket ^ 1);
    }
    __syncwarp();
    SyncWarpgroup(half_);
  }
  __device__ __forceinline__ void Give() {
    if (IsFirst()) Arrive(&shared_.turn_given);
  }

 private:
  static __device__ __forceinline__ bool IsFirst() { return attention::Thread() % kWarpgroupThreads == 0; }

  SharedMemory<ShapeOf>& shared_;
  const int half_;
};

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_PRODUCT_TURNS_CUH_
