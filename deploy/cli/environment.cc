#include "deploy/cli/environment.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#ifdef LONGFILL_HAVE_MPI
#include "parallel/mpi_communicator.h"
#endif

namespace longfill {
namespace {

// The variables by which launchers tell a process its rank: Open MPI's mpirun, PMIx (srun --mpi=pmix), PMI
// (srun
// --mpi=pmi2, MPICH).
constexpr std::array kRankVariables = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"};

}  // namespace

Launch ReadLaunch() {
  for (const char* name : kRankVariables) {
    const char* value = std::getenv(name);
    int rank = 0;
    if (value != nullptr && absl::SimpleAtoi(value, &rank)) return {true, rank};
  }
  return {};
}

std::string HostName() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "localhost";
}

int DefaultThreads(int ranks_on_host) {
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  cpu_set_t allowed;
  const int usable = sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : cores;
  return std::max(1, std::min(usable, cores / ranks_on_host));
}

#ifdef LONGFILL_HAVE_MPI

struct World::Session {
  std::unique_ptr<MpiSession> mpi;
};

Communicator& World::communicator() const { return session_->mpi->world(); }

#else

struct World::Session {
  std::unique_ptr<Communicator> alone = CreateSingleCommunicator();
};

Communicator& World::communicator() const { return *session_->alone; }

#endif

World::World() = default;
World::~World() = default;

absl::StatusOr<std::unique_ptr<World>> World::Create(const Launch& launch, int broken_exit_status) {
  std::unique_ptr<World> world(new World);
  world->session_ = std::make_unique<Session>();
#ifdef LONGFILL_HAVE_MPI
  MpiOptions options;
  options.launched = launch.parallel;
  options.broken_exit_status = broken_exit_status;
  LF_ASSIGN_OR_RETURN(world->session_->mpi, MpiSession::Start(options));
#else
  static_cast<void>(broken_exit_status);
  if (launch.parallel) {
    return absl::UnimplementedError("started by mpirun, but MPI is not built in (LONGFILL_MPI is off)");
  }
#endif
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> hosts,
                      AllGatherStrings(world->communicator(), HostName(), world->stream_));
  const auto here = [name = HostName()](const auto begin, const auto end) {
    return static_cast<int>(std::count(begin, end, name));
  };
  world->ranks_on_host_ = here(hosts.begin(), hosts.end());
  world->local_rank_ = here(hosts.begin(), hosts.begin() + world->rank());
  return world;
}

int World::rank() const { return communicator().rank(); }
int World::size() const { return communicator().size(); }

absl::Status World::Agree(const absl::Status& mine) { return AgreeOnStatus(communicator(), mine, stream_); }

}  // namespace longfill
