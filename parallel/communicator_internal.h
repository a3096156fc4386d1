#ifndef LONGFILL_PARALLEL_COMMUNICATOR_INTERNAL_H_
#define LONGFILL_PARALLEL_COMMUNICATOR_INTERNAL_H_

// What all communicators share: argument checks, the first error of a family of groups, reductions.

#include <atomic>
#include <cstdint>
#include <mutex>
#include <span>
#include <string_view>

#include "kernels/base/status.h"
#include "parallel/communicator.h"

namespace longfill::internal {

// The first error of a group and of all groups split from it or containing it. Thread-safe.
class FirstError {
 public:
  // Keeps the first; true when this was it. An OK reason counts as Internal.
  bool Break(const absl::Status& reason);
  bool broken() const { return broken_.load(std::memory_order_acquire); }
  absl::Status status() const;

 private:
  mutable std::mutex mutex_;
  absl::Status status_;
  std::atomic<bool> broken_{false};
};

// How one communicator reports its family's error: the first call that meets it returns the error itself,
// later ones FailedPrecondition naming it.
class ErrorReport {
 public:
  // `error`: that of the family, OK while there is none.
  absl::Status Check(const absl::Status& error, std::string_view communicator, int rank);

 private:
  bool told_ = false;
};

// InvalidArgument for counts that can be seen to be wrong without asking a peer.
absl::Status CheckAllGather(std::span<const int64_t> counts_bytes, int size);
absl::Status CheckAllToAll(std::span<const int64_t> send_bytes, std::span<const int64_t> recv_bytes, int rank,
                           int size);
absl::Status CheckReduce(int64_t count, ReduceType type, ReduceOp op);
absl::Status CheckBroadcast(int64_t bytes, int root, int size);

int64_t ReduceTypeBytes(ReduceType type);
// accumulator = accumulator op value, elementwise.
void Reduce(void* accumulator, const void* value, int64_t count, ReduceType type, ReduceOp op);

// Ends the group because of this rank's `error` in the middle of a procedure: peers return Unavailable naming
// both. A group of one, where nobody waits, goes on.
void AbortGroup(Communicator& comm, const absl::Status& error);

}  // namespace longfill::internal

#endif  // LONGFILL_PARALLEL_COMMUNICATOR_INTERNAL_H_
