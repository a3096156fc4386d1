#ifndef LONGFILL_PARALLEL_STAGED_COMMUNICATOR_H_
#define LONGFILL_PARALLEL_STAGED_COMMUNICATOR_H_

#include <cstdint>
#include <memory>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"
#include "parallel/communicator.h"

namespace longfill {

inline constexpr int64_t kStagingSliceBytes = int64_t{32} << 20;

// A communicator for memory of `backend`'s device on top of one for host memory. With a CpuStream calls go to
// `host` as they are. With a stream of the device they go through host memory of the backend in slices of at
// most `slice_bytes` (equal on all ranks) in each direction, which is taken once, here, and shared with the
// groups that are split off: one thread at a time among all of them. Such a call waits for the stream before
// each exchange; what it received is in place for later work on the stream when it returns. `host` and
// `backend` outlive the result. No communication. A group of one takes no staging memory. seconds() are those
// of `host` and, of exchanges that have run, what their copies take of the stream.
absl::StatusOr<std::unique_ptr<Communicator>> CreateStagedCommunicator(
    Communicator& host, Backend& backend, int64_t slice_bytes = kStagingSliceBytes);

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_STAGED_COMMUNICATOR_H_
