#ifndef LONGFILL_DEPLOY_CLI_ENVIRONMENT_H_
#define LONGFILL_DEPLOY_CLI_ENVIRONMENT_H_

#include <memory>
#include <string>

#include "kernels/base/status.h"
#include "kernels/base/stream.h"
#include "parallel/communicator.h"

namespace longfill {

// What the environment says about the launch of this process. The only place that reads environment
// variables.
struct Launch {
  bool parallel = false;  // started by mpirun or srun, so MPI is to be initialised
  int rank = 0;
};
Launch ReadLaunch();

std::string HostName();

// Worker threads of one rank when --threads is absent: the cores of this host shared evenly by its ranks, no
// more than the process may run on, at least 1.
int DefaultThreads(int ranks_on_host);

// All ranks of the job: MPI under mpirun or srun, otherwise this process alone. At most one in a process;
// used by the thread that made it. Where the group broke (a rank was lost) its destructor does not return but
// ends the process with `broken_exit_status`, because MPI cannot be shut down then.
class World {
 public:
  static absl::StatusOr<std::unique_ptr<World>> Create(const Launch& launch, int broken_exit_status);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  Communicator& communicator() const;
  int rank() const;
  int size() const;
  int ranks_on_host() const { return ranks_on_host_; }
  int local_rank() const { return local_rank_; }  // among the ranks of this host

  // Collective: OK everywhere, or everywhere the error of the lowest failing rank.
  absl::Status Agree(const absl::Status& mine);

 private:
  struct Session;
  World();

  std::unique_ptr<Session> session_;
  CpuStream stream_;
  int ranks_on_host_ = 1;
  int local_rank_ = 0;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_ENVIRONMENT_H_
