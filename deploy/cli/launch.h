#ifndef LONGFILL_DEPLOY_CLI_LAUNCH_H_
#define LONGFILL_DEPLOY_CLI_LAUNCH_H_

// How this process was started, told from the variables that launchers set. Reads no environment itself.

#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace longfill {

struct Launch {
  bool parallel = false;  // the launcher lets MPI find the peers, so MPI is to be initialised
  int rank = 0;           // 0 where not parallel

  std::string launcher;   // "mpirun", "srun --mpi=pmix", "srun --mpi=pmi2", "srun", ...; empty: none
  int num_processes = 1;  // that the launcher says it has started together; 1 also where it says nothing
  int process = 0;        // which of them this one is: the rank, also where MPI will not know it
  std::string evidence;   // of num_processes: "SLURM_STEP_NUM_TASKS=4"; may be empty
};

// `get` returns the value of a variable, nothing where it is not set. Variables of a Slurm allocation
// (SLURM_NTASKS), which a batch script and salloc's shell have too, are not looked at: those of a step are.
Launch LaunchOf(const std::function<std::optional<std::string>(const char* name)>& get);

struct LaunchProblem {
  std::string what;    // "srun has started 4 processes (SLURM_STEP_NUM_TASKS=4), ..."
  std::string advice;  // "start them with ..."
};

// Processes that were started together but that MPI does not join, each of which would be rank 0 of 1.
// `world_size`: ranks that MPI sees. `mpi_library`: "Open MPI v4.1.4", for the advice.
std::optional<LaunchProblem> FindLaunchProblem(const Launch& launch, int world_size,
                                               std::string_view mpi_library);

// What to say before MPI is started, since MPI_Init may end the process: srun with PMI2, which Open MPI only
// understands where it was built for it. Empty: nothing.
std::string WarnBeforeMpi(const Launch& launch, std::string_view mpi_library);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_LAUNCH_H_
