#ifndef LONGFILL_PARALLEL_MPI_COMMUNICATOR_H_
#define LONGFILL_PARALLEL_MPI_COMMUNICATOR_H_

// Ranks as processes started by mpirun. Target longfill_parallel_mpi; only mpi_communicator.cc includes
// mpi.h.

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/base/status.h"
#include "parallel/communicator.h"

namespace longfill {

struct MpiOptions {
  // Whether a launcher started this process; the program tells from its environment (libraries read none).
  // When false the process is a group of one, and MPI is not touched at all.
  bool launched = false;
  CommunicatorOptions communicator;
  // MPI cannot end a collective that a peer never joins, so a process whose group broke must not run
  // MPI_Finalize: the session's destructor then leaves by _exit with this status.
  int broken_exit_status = 3;
  // Bytes of one MPI message at most, header included; tests lower it. MPI counts are int, so never above
  // 2^30.
  int64_t max_message_bytes = int64_t{1} << 20;
};

// Which MPI this is.
struct MpiFacts {
  std::string compiled_with;  // "Open MPI 4.1.4", of the header; "MPI 3.1" for one that does not say its name
  std::string library;        // what the library that is loaded calls itself: "Open MPI v4.1.4"
  std::string thread_level;   // that it gives: "MPI_THREAD_SERIALIZED"; empty: MPI was not started
};
// Before, in and after a session.
MpiFacts ReadMpiFacts();

// MPI_Init to MPI_Finalize; at most one in the life of a process. Lives longer than its communicators.
class MpiSession {
 public:
  static absl::StatusOr<std::unique_ptr<MpiSession>> Start(const MpiOptions& options);
  // Intact group: waits for the peers (with the deadline), then MPI_Finalize. Broken group: does not return
  // (_exit).
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  Communicator& world();
  bool broken() const;

 private:
  struct Impl;
  explicit MpiSession(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_MPI_COMMUNICATOR_H_
