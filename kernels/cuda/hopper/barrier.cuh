#ifndef LONGFILL_KERNELS_CUDA_HOPPER_BARRIER_CUH_
#define LONGFILL_KERNELS_CUDA_HOPPER_BARRIER_CUH_

// Barriers in shared memory (PTX ISA: mbarrier) and between the proxies that access it. A barrier's phase
// ends when as many threads have arrived as it was made for and all announced bytes have been copied. Waiting
// is for the end of a phase, named by its parity: phases 0, 2, 4 .. have parity 0. A wait is right only for
// the phase under way or the one before it; a fresh barrier counts as if a phase of parity 1 had ended.

#include <cstdint>

#include "kernels/cuda/attention/mma.cuh"

namespace longfill::cuda::hopper {

using attention::SharedAddress;

struct alignas(8) Barrier {
  uint64_t state;
};

__device__ __forceinline__ void InitBarrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(SharedAddress(barrier)), "r"(arrivals)
               : "memory");
}
// Makes fresh barriers visible to the copy engine; once by the thread that made them, before a block barrier.
__device__ __forceinline__ void PublishBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// Releases what this thread did before to those who wait for the phase.
__device__ __forceinline__ void Arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];\n" ::"r"(SharedAddress(barrier))
               : "memory");
}
// The same for so many threads.
__device__ __forceinline__ void ArriveFor(Barrier* barrier, int threads) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;\n" ::"r"(SharedAddress(barrier)),
               "r"(threads)
               : "memory");
}
// The phase also waits for all cp.async that this thread has issued; somebody's arrival must still be to
// come. Who reads what they copied by wgmma needs FenceSharedForAsync after the wait.
__device__ __forceinline__ void ExpectCopies(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];\n" ::"r"(SharedAddress(barrier)) : "memory");
}
// This thread's arrival, made when all cp.async that it has issued are complete. Who reads what they copied
// by wgmma needs FenceSharedForAsync after the wait.
__device__ __forceinline__ void ArriveWhenCopied(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(SharedAddress(barrier))
               : "memory");
}
// Arrives, and the phase also waits for `bytes` that the copy engine brings.
__device__ __forceinline__ void ArriveExpecting(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;\n" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

#define LF_PHASE_HAS_ENDED(instruction, ended, barrier, parity)                                       \
  asm volatile("{\n.reg .pred ended;\nmbarrier." instruction                                          \
               ".parity.acquire.cta.shared::cta.b64 ended, [%1], %2;\nselp.u32 %0, 1, 0, ended;\n}\n" \
               : "=r"(ended)                                                                          \
               : "r"(SharedAddress(barrier)), "r"(parity)                                             \
               : "memory")
// Whether the phase has ended; if not, the thread may sleep for a while before the answer.
__device__ __forceinline__ bool HasEnded(Barrier* barrier, uint32_t parity) {
  uint32_t ended;
  LF_PHASE_HAS_ENDED("try_wait", ended, barrier, parity);
  return ended != 0;
}
// The same at once.
__device__ __forceinline__ bool HasEndedNow(Barrier* barrier, uint32_t parity) {
  uint32_t ended;
  LF_PHASE_HAS_ENDED("test_wait", ended, barrier, parity);
  return ended != 0;
}
#undef LF_PHASE_HAS_ENDED

#ifdef LONGFILL_HOPPER_WAIT_LIMIT_NS
// A build to find deadlocks: a thread that waits longer than the limit writes down for what and exits.
struct StuckWait {
  int32_t block, thread, barrier, parity;  // barrier: its address in shared memory
};
inline constexpr int kMaxStuckWaits = 1024;
__device__ int32_t g_num_stuck_waits;
__device__ StuckWait g_stuck_waits[kMaxStuckWaits];

__device__ __forceinline__ uint64_t Nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;\n" : "=l"(time));
  return time;
}
__device__ __forceinline__ void Wait(Barrier* barrier, uint32_t parity) {
  if (HasEnded(barrier, parity)) return;
  const uint64_t start = Nanoseconds();
  while (!HasEnded(barrier, parity)) {
    if (Nanoseconds() - start < LONGFILL_HOPPER_WAIT_LIMIT_NS) continue;
    const int32_t place = atomicAdd(&g_num_stuck_waits, 1);
    if (place < kMaxStuckWaits) {
      g_stuck_waits[place] = {static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(threadIdx.x),
                              static_cast<int32_t>(SharedAddress(barrier)), static_cast<int32_t>(parity)};
    }
    asm volatile("exit;\n");
  }
}
#else
__device__ __forceinline__ void Wait(Barrier* barrier, uint32_t parity) {
  while (!HasEnded(barrier, parity)) {
  }
}
#endif

// What was written to shared memory by ordinary stores or cp.async, and of which this thread knows, becomes
// visible to the wgmma and the copy engine of this thread and of those who learn of it after this.
__device__ __forceinline__ void FenceSharedForAsync() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Registers of each thread of a warpgroup from here on.
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace longfill::cuda::hopper

#endif  // LONGFILL_KERNELS_CUDA_HOPPER_BARRIER_CUH_
