#ifndef LONGFILL_DEPLOY_CLI_LAUNCH_SUMMARY_H_
#define LONGFILL_DEPLOY_CLI_LAUNCH_SUMMARY_H_

// What was chosen for the ranks at their start, for whoever reads the first lines of a log.

#include <string>

#include "deploy/cli/environment.h"
#include "kernels/api/backend.h"
#include "kernels/base/status.h"
#include "runtime/engine/engine_device.h"

namespace longfill {

// Where ranks differ, "ranks 0-1: ...; rank 2: ...".
struct LaunchSummary {
  std::string launcher;        // "none", "mpirun", "srun --mpi=pmix"
  std::string ranks;           // "host-a 0-3, host-b 4-7"
  std::string ranks_per_host;  // "4"
  std::string devices;         // "CPU (AVX3, 2 threads)", "rank 0: GPU 0, NVIDIA H100 80GB HBM3 (sm_90); ..."
  std::string threads;         // worker threads
  std::string cores;           // that a rank may run on: "0-15"
  std::string nccl;            // variables of NCCL, with the program's defaults; empty on CPUs
};

// Collective; the result is known on all ranks. `backend` is that of `device`.
absl::StatusOr<LaunchSummary> SummarizeLaunch(World& world, const Backend& backend,
                                              const DeviceOptions& device);

void LogLaunch(const LaunchSummary& summary);          // the log line `launch`
std::string LaunchText(const LaunchSummary& summary);  // one line for people, without its end

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_LAUNCH_SUMMARY_H_
