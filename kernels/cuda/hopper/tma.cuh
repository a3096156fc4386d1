#ifndef LONGFILL_KERNELS_CUDA_HOPPER_TMA_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_TMA_CUH_

// The copy engine (PTX ISA: cp.async.bulk.tensor, tensormap).

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/hopper/barrier.cuh"

namespace longfill::cuda::hopper {

// Tensor maps were written to global memory by an earlier kernel; this orders their use behind that.
__device__ __forceinline__ void AcquireTensorMap(const CUtensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;\n" ::"l"(map) : "memory");
}

// A box of the map, whose shape the map has, from element (x, y, z) on; what lies outside of the tensor
// arrives as zeros and counts as bytes too. One thread.
__device__ __forceinline__ void CopyBox(uint32_t to, const CUtensorMap* map, int32_t x, int32_t y, int32_t z,
                                        Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%4}], [%5];\n" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(SharedAddress(barrier))
      : "memory");
}

// Whole rows by a map of EncodeWholeRowsMap, from row y of head z on.
__device__ __forceinline__ void CopyWholeRows(uint32_t to, const CUtensorMap* map, int32_t y, int32_t z,
                                              Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%2, %4}], [%5];\n" ::"r"(to),
      "l"(map), "r"(0), "r"(y), "r"(z), "r"(SharedAddress(barrier))
      : "memory");
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_TMA_CUH_
