#ifndef LONGFILL_PARALLEL_COMMUNICATOR_H_
#define LONGFILL_PARALLEL_COMMUNICATOR_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/base/stream.h"

namespace longfill {

enum class ReduceType : uint8_t { kFloat32, kFloat64, kInt64, kUInt64 };
enum class ReduceOp : uint8_t { kSum, kMax, kMin };

// A group of ranks that call the same operations in the same order. Each call is enqueued on `stream` (on the
// CPU it has finished when it returns); its buffers are memory of the stream's device, so host memory with a
// CpuStream (staged_communicator.h and nccl_communicator.h make communicators for streams of a device). Each
// call has the communicator's deadline: a peer that is dead, stopped or late gives DeadlineExceeded or
// Unavailable, and from then on the group is broken: every later call returns the first error at once
// (FailedPrecondition names it), here and, through Abort, on the peers. One thread at a time per
// communicator. Buffers of a call that failed by deadline may still be written by a peer's late message: an
// implementation keeps them out of the caller's memory or says that the process must end
// (parallel/README.md).
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string_view name() const = 0;  // "mpi", "in-process", "single", "staged mpi", "nccl"

  // recv holds the pieces of ranks 0, 1, ... one behind the other; counts_bytes[size()] is equal on all ranks
  // and counts_bytes[rank()] is the size of send. In place (send inside recv at its own place) is allowed.
  virtual absl::Status AllGather(const void* send, void* recv, std::span<const int64_t> counts_bytes,
                                 Stream& stream) = 0;
  // In place; integer and max/min results are exact, float sums are formed in rank order and equal on all
  // ranks, or refused on all of them (Unimplemented, which leaves the group usable): "nccl".
  virtual absl::Status AllReduce(void* data, int64_t count, ReduceType type, ReduceOp op, Stream& stream) = 0;
  virtual absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& stream) = 0;
  // Piece r of send goes to rank r, piece r of recv comes from rank r; send_bytes[r] here equals
  // recv_bytes[rank()] there.
  virtual absl::Status AllToAll(const void* send, std::span<const int64_t> send_bytes, void* recv,
                                std::span<const int64_t> recv_bytes, Stream& stream) = 0;
  virtual absl::Status Barrier(Stream& stream) = 0;

  // Ranks with equal color form a new group, ordered by key, then by rank here. Every rank calls it.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) = 0;

  // Ends the group (and groups split from or containing it) on every rank that can still be reached.
  // Thread-safe, never blocks; the first reason wins.
  virtual void Abort(const absl::Status& reason) = 0;
  // OK, or the error that ended the group, also one that a peer has sent. Thread-safe, never blocks.
  virtual absl::Status Health() = 0;

  // Bytes that this rank has sent, and wall time spent inside calls; for reports.
  virtual int64_t bytes_sent() const = 0;
  virtual double seconds() const = 0;
};

struct CommunicatorOptions {
  std::chrono::milliseconds timeout{120000};  // of one call
};

// A group of one.
std::unique_ptr<Communicator> CreateSingleCommunicator();

// `size` ranks as threads of this process; element r is for the thread that plays rank r.
std::vector<std::unique_ptr<Communicator>> CreateInProcessCommunicators(int size,
                                                                        CommunicatorOptions options);

// Collective helper on host values, so `stream` is a CpuStream: every rank passes its own status; all return
// OK, or all return the error of the lowest failing rank ("rank 2: ..." in front; a group of one adds
// nothing). Leaves the group usable. This is how errors before the first collective of a request become the
// same error on all.
absl::Status AgreeOnStatus(Communicator& comm, const absl::Status& mine, Stream& stream);

// Collective helpers for host values of any length, with a CpuStream: root's string, or everybody's.
absl::StatusOr<std::string> BroadcastString(Communicator& comm, std::string value, int root, Stream& stream);
absl::StatusOr<std::vector<std::string>> AllGatherStrings(Communicator& comm, const std::string& value,
                                                          Stream& stream);

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_COMMUNICATOR_H_
