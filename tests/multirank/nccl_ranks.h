#ifndef LONGFILL_TESTS_MULTIRANK_NCCL_RANKS_H_
#define LONGFILL_TESTS_MULTIRANK_NCCL_RANKS_H_

// Backends of ranks that exchange over NCCL: GPUs (gpu_nccl_ranks.cc), or the CPU under a stand-in for NCCL
// (fake_nccl_ranks.cc).

#include <memory>

#include "kernels/api/backend.h"
#include "parallel/nccl_communicator.h"

namespace longfill {

// OK, or what is missing for so many ranks.
absl::Status CheckNcclRanks(int size);

// Thread-safe. One for each rank, never destroyed.
absl::StatusOr<std::shared_ptr<Backend>> NcclRankBackend(int rank);

NcclOptions NcclTestOptions();

}  // namespace longfill

#endif  // LONGFILL_TESTS_MULTIRANK_NCCL_RANKS_H_
