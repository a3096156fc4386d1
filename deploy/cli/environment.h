#ifndef LONGFILL_DEPLOY_CLI_ENVIRONMENT_H_
#define LONGFILL_DEPLOY_CLI_ENVIRONMENT_H_

#include <memory>
#include <string>
#include <vector>

#include "deploy/cli/launch.h"
#include "kernels/base/status.h"
#include "kernels/base/stream.h"
#include "parallel/communicator.h"
#include "parallel/mpi_communicator.h"

namespace longfill {

// The only place that reads and sets environment variables.

// What the environment says about the launch of this process.
Launch ReadLaunch();

// Tells NCCL, before any thread runs, what it can be told by no other way: no multicast (NVLS), whose memory
// some machines forbid and from which only large reductions gain; a log that is asked for (NCCL_DEBUG) does
// not go to standard output, which is ours. What the user has set stays.
void SetNcclDefaults();
// The variables of NCCL that are set, by the user or by SetNcclDefaults: "NCCL_NVLS_ENABLE=0 ...", sorted.
std::string NcclVariables();

// Large blocks go back to the system when they are freed. Of itself glibc takes them from its heaps once the
// first of them was freed, and small ones that outlive them keep these heaps from shrinking: a rank that
// computed prompts for an hour held many times what it used.
void ReturnLargeBlocksToSystem();
// Whether the user has let ranks on one GPU use NCCL (NCCL_MULTI_RANK_GPU_ENABLE=1).
bool NcclRanksMayShareGpus();

// LONGFILL_PYTHON: the Python that `longfill eval` runs; empty: not set.
std::string PythonFromEnvironment();

// LONGFILL_PEER_HOST: ranks for which it differs do not read one another's memory; empty: not set.
std::string PeerHostFromEnvironment();

std::string HostName();

// Worker threads of one rank when --threads is absent: the cores of this host shared evenly by its ranks, no
// more than the process may run on, at least 1.
int DefaultThreads(int ranks_on_host);

// ReadMpiFacts; all empty in a build without MPI.
MpiFacts FactsOfMpi();

// All ranks of the job: MPI under mpirun or srun, otherwise this process alone. At most one in a process;
// used by the thread that made it. Where the group broke (a rank was lost) its destructor does not return but
// ends the process with `broken_exit_status`, because MPI cannot be shut down then.
class World {
 public:
  // InvalidArgument where the launcher has started processes that MPI does not join (FindLaunchProblem).
  static absl::StatusOr<std::unique_ptr<World>> Create(const Launch& launch, int broken_exit_status,
                                                       const CommunicatorOptions& communicator = {});
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  Communicator& communicator() const;
  int rank() const;
  int size() const;
  const std::string& launcher() const { return launcher_; }         // Launch::launcher
  const std::vector<std::string>& hosts() const { return hosts_; }  // their names, by rank
  bool several_hosts() const { return ranks_on_host_ < size(); }
  int ranks_on_host() const { return ranks_on_host_; }
  int local_rank() const { return local_rank_; }  // among the ranks of this host

  // Collective: OK everywhere, or everywhere the error of the lowest failing rank.
  absl::Status Agree(const absl::Status& mine);

 private:
  struct Session;
  World();

  std::unique_ptr<Session> session_;
  CpuStream stream_;
  std::string launcher_;
  std::vector<std::string> hosts_;
  int ranks_on_host_ = 1;
  int local_rank_ = 0;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_ENVIRONMENT_H_
