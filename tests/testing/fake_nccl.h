#ifndef LONGFILL_TESTS_TESTING_FAKE_NCCL_H_
#define LONGFILL_TESTS_TESTING_FAKE_NCCL_H_

// A stand-in for the NCCL library, for a program that is linked without it and without the CUDA backend:
// ranks are threads, their GPUs are backends of CreateFakeGpu. As the real one with blocking = 0 it returns
// before peers have come, is asked whether it is through, and orders float sums in its own way.

#include <memory>

#include "kernels/api/backend.h"

namespace longfill {

// The guarded CPU backend; its events may be asked by any thread, and can be held.
std::unique_ptr<Backend> CreateFakeGpu();

// The fake's switches and counts. Thread-safe.
struct FakeNccl {
  static void Reset();
  // ncclCommInitRankConfig fails on this rank; -1: on none.
  static void FailInit(int rank);
  // Every group of the rank reports ncclRemoteError from now on.
  static void FailLater(int rank);
  // Ends of exchanges that are enqueued from now on do not pass, as if kernels of peers never came.
  static void HoldEnds(bool hold);
  static int made();       // groups of ranks
  static int destroyed();  // of these, in order
  static int aborted();
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_TESTING_FAKE_NCCL_H_
