#include "deploy/cli/environment.h"

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "deploy/doctor/host_probe.h"

namespace longfill {

Launch ReadLaunch() {
  return LaunchOf([](const char* name) -> std::optional<std::string> {
    const char* value = std::getenv(name);
    if (value == nullptr) return std::nullopt;
    return value;
  });
}

void SetNcclDefaults() {
  setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
  setenv("NCCL_DEBUG_FILE", "/dev/stderr", /*overwrite=*/0);
}

std::string NcclVariables() {
  std::vector<std::string_view> found;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string_view text = *variable;
    if (text.starts_with("NCCL_")) found.push_back(text);
  }
  std::sort(found.begin(), found.end());
  return absl::StrJoin(found, " ", [](std::string* to, std::string_view text) { to->append(text); });
}

void ReturnLargeBlocksToSystem() {
  constexpr int kLargeBytes = 128 << 10;
  mallopt(M_MMAP_THRESHOLD, kLargeBytes);  // given by hand, it stays
}

bool NcclRanksMayShareGpus() {
  const char* value = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  return value != nullptr && std::string_view(value) == "1";
}

std::string PythonFromEnvironment() {
  const char* value = std::getenv("LONGFILL_PYTHON");
  return value == nullptr ? "" : value;
}

std::string PeerHostFromEnvironment() {
  const char* value = std::getenv("LONGFILL_PEER_HOST");
  return value == nullptr ? "" : value;
}

std::string HostName() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "localhost";
}

int DefaultThreads(int ranks_on_host) {
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const std::vector<int> allowed = AllowedCores();
  const int usable = allowed.empty() ? cores : static_cast<int>(allowed.size());
  return std::max(1, std::min(usable, cores / ranks_on_host));
}

#ifdef LONGFILL_HAVE_MPI

struct World::Session {
  std::unique_ptr<MpiSession> mpi;
};

MpiFacts FactsOfMpi() { return ReadMpiFacts(); }
Communicator& World::communicator() const { return session_->mpi->world(); }

#else

struct World::Session {
  std::unique_ptr<Communicator> alone = CreateSingleCommunicator();
};

MpiFacts FactsOfMpi() { return {}; }
Communicator& World::communicator() const { return *session_->alone; }

#endif

World::World() = default;
World::~World() = default;

absl::StatusOr<std::unique_ptr<World>> World::Create(const Launch& launch, int broken_exit_status,
                                                     const CommunicatorOptions& communicator) {
  std::unique_ptr<World> world(new World);
  world->session_ = std::make_unique<Session>();
  const std::string mpi_library = FactsOfMpi().library;
#ifdef LONGFILL_HAVE_MPI
  if (const std::string warning = WarnBeforeMpi(launch, mpi_library);
      !warning.empty() && launch.process == 0) {
    std::fprintf(stderr, "longfill: %s\n", warning.c_str());  // MPI_Init may end the process
  }
  MpiOptions options;
  options.launched = launch.parallel;
  options.broken_exit_status = broken_exit_status;
  options.communicator = communicator;
  LF_ASSIGN_OR_RETURN(world->session_->mpi, MpiSession::Start(options));
#else
  static_cast<void>(broken_exit_status);
  static_cast<void>(communicator);
  if (launch.parallel) {
    return absl::UnimplementedError("started by mpirun, but MPI is not built in (LONGFILL_MPI is off)");
  }
#endif
  if (const auto problem = FindLaunchProblem(launch, world->size(), mpi_library)) {
    return absl::InvalidArgumentError(absl::StrCat(problem->what, "; ", problem->advice));
  }
  world->launcher_ = launch.launcher;
  const std::string host = HostName();
  LF_ASSIGN_OR_RETURN(world->hosts_, AllGatherStrings(world->communicator(), host, world->stream_));
  const auto here = [&host](const auto begin, const auto end) {
    return static_cast<int>(std::count(begin, end, host));
  };
  world->ranks_on_host_ = here(world->hosts_.begin(), world->hosts_.end());
  world->local_rank_ = here(world->hosts_.begin(), world->hosts_.begin() + world->rank());
  return world;
}

int World::rank() const { return communicator().rank(); }
int World::size() const { return communicator().size(); }

absl::Status World::Agree(const absl::Status& mine) { return AgreeOnStatus(communicator(), mine, stream_); }

}  // namespace longfill
