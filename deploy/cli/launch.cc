#include "deploy/cli/launch.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

constexpr char kMpirun[] = "mpirun";
constexpr char kSrun[] = "srun";
constexpr char kSrunPmix[] = "srun --mpi=pmix";
constexpr char kSrunPmi2[] = "srun --mpi=pmi2";

using Get = std::function<std::optional<std::string>(const char* name)>;

std::optional<int> Number(const Get& get, const char* name) {
  const std::optional<std::string> text = get(name);
  int value = 0;
  if (!text || !absl::SimpleAtoi(*text, &value) || value < 0) return std::nullopt;
  return value;
}

void TakeCount(const Get& get, const char* name, Launch& launch) {
  const std::optional<int> count = Number(get, name);
  if (!count || *count < 1) return;
  launch.num_processes = *count;
  launch.evidence = absl::StrCat(name, "=", *count);
}

Launch Parallel(std::string launcher, int rank) {
  return {.parallel = true, .rank = rank, .launcher = std::move(launcher), .process = rank};
}

// absl's string_view is not std's here.
absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

std::string Advice(const Launch& launch, std::string_view mpi_library) {
  const std::string& by = launch.launcher;
  if (by == kSrun || by == kSrunPmi2) {
    return absl::StrCat(
        "start them with srun --mpi=pmix (srun --mpi=list shows what this Slurm has), or with "
        "mpirun from inside the allocation; processes that are to work alone get an srun -n 1 "
        "each");
  }
  if (by == kSrunPmix) {
    return absl::StrCat("the PMIx of this Slurm and that of the MPI library (", View(mpi_library),
                        ") do not fit each other: start them with mpirun from inside the allocation");
  }
  return absl::StrCat("start them with the mpirun of the MPI library that longfill runs with (",
                      View(mpi_library), "); another one is first in the PATH");
}

}  // namespace

Launch LaunchOf(const Get& get) {
  const bool in_step = get("SLURM_STEP_ID").has_value();
  if (const std::optional<int> rank = Number(get, "OMPI_COMM_WORLD_RANK")) {
    Launch launch = Parallel(kMpirun, *rank);
    TakeCount(get, "OMPI_COMM_WORLD_SIZE", launch);
    return launch;
  }
  if (const std::optional<int> rank = Number(get, "PMIX_RANK")) {
    Launch launch = Parallel(in_step ? kSrunPmix : "a PMIx launcher", *rank);
    if (in_step) TakeCount(get, "SLURM_STEP_NUM_TASKS", launch);
    return launch;
  }
  if (const std::optional<int> rank = Number(get, "PMI_RANK")) {
    Launch launch = Parallel(in_step ? kSrunPmi2 : "a PMI launcher", *rank);
    TakeCount(get, "PMI_SIZE", launch);
    return launch;
  }
  Launch launch;
  if (!in_step) return launch;
  TakeCount(get, "SLURM_STEP_NUM_TASKS", launch);
  if (launch.num_processes == 1) return {};  // srun's interactive shells, srun -n 1
  launch.launcher = kSrun;
  launch.process = Number(get, "SLURM_PROCID").value_or(0);
  return launch;
}

std::optional<LaunchProblem> FindLaunchProblem(const Launch& launch, int world_size,
                                               std::string_view mpi_library) {
  if (world_size >= launch.num_processes) return std::nullopt;
  return LaunchProblem{.what = absl::StrCat(launch.launcher, " has started ", launch.num_processes,
                                            " processes (", launch.evidence, "), but MPI joins ",
                                            world_size == 1 ? "none of them: each would be rank 0 of 1"
                                                            : absl::StrCat("only ", world_size)),
                       .advice = Advice(launch, mpi_library)};
}

std::string WarnBeforeMpi(const Launch& launch, std::string_view mpi_library) {
  if (launch.launcher != kSrunPmi2 || !mpi_library.starts_with("Open MPI")) return "";
  return absl::StrCat("started by srun with PMI2, which most builds of Open MPI do not understand: if ",
                      View(mpi_library), " does not start now, ", Advice(launch, mpi_library));
}

}  // namespace longfill
