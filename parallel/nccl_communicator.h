#ifndef LONGFILL_PARALLEL_NCCL_COMMUNICATOR_H_
#define LONGFILL_PARALLEL_NCCL_COMMUNICATOR_H_

// Exchanges between GPUs. Target longfill_parallel_nccl; only nccl_communicator.cc includes nccl.h. A build
// without NCCL has nccl_absent.cc in its place, whose errors say what is missing.

#include <chrono>
#include <memory>
#include <string>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"
#include "parallel/communicator.h"

namespace longfill {

struct NcclOptions {
  // From the moment when the GPU comes to a call until it has ended there; also of making a group.
  std::chrono::milliseconds timeout{120000};
  int max_ctas = 8;  // thread blocks, and so SMs, of one call at most
  // The ranks may share GPUs: the program has told NCCL so (NCCL_MULTI_RANK_GPU_ENABLE=1, NCCL 2.30.3).
  bool ranks_share_gpus = false;
};

// Of the library that is loaded, 22809 for NCCL 2.28.9. Unimplemented in a build without NCCL and for a
// backend that is no GPU.
absl::StatusOr<int> NcclVersionCode(Backend& backend);
int NcclHeaderVersionCode();                    // what longfill was compiled with; 0: without NCCL
std::string NcclVersionText(int version_code);  // "2.28.9"
inline constexpr int kFirstNcclWithSharedGpus = 23003;

// A communicator for memory of `backend`'s GPU beside one for host memory. With a CpuStream calls go to
// `host` as they are. With a stream of the GPU they are enqueued there and return once that is done; work
// given later finds their results. Every rank of `host` calls this; a rank that fails aborts `host`. Each
// rank has a GPU of its own, or `ranks_share_gpus` holds. `host` and `backend` outlive the result.
//
// Float sums are refused (Unimplemented, on all ranks alike, and the group stays usable): NCCL adds in an
// order of its own. NCCL does not notice calls that do not fit each other; they end at the deadline at the
// latest.
//
// A thread of the family of groups that are split from one another watches the GPU and `host`. When a call is
// late, NCCL reports an error, or the group has ended on any rank, it ends the group everywhere (Abort) and
// stops NCCL's kernels here: so each wait for the stream ends, with results that mean nothing, and the next
// call of any communicator of the family says why. Peers may still write into buffers of unfinished calls:
// the process should end then.
//
// seconds() are those of `host` and what exchanges that have run took of the stream, waiting for peers
// included; bytes_sent() counts a ring's share of a reduction, else what goes to each peer.
absl::StatusOr<std::unique_ptr<Communicator>> CreateNcclCommunicator(Communicator& host, Backend& backend,
                                                                     const NcclOptions& options);

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_NCCL_COMMUNICATOR_H_
