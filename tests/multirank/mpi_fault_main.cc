// One rank of a group in which something goes wrong; tests/multirank/mpi_faults.sh runs it under mpirun and
// reads what each rank wrote to DIR/rank-R. Usage: mpi_fault_main SCENARIO DIR

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <fstream>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "parallel/mpi_communicator.h"
#include "parallel/watchdog.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// Appends a line; each rank has its own file.
class Report {
 public:
  Report(const std::string& directory, int rank) : path_(absl::StrCat(directory, "/rank-", rank)) {}
  void Line(const std::string& text) {
    const auto elapsed = std::chrono::duration_cast<milliseconds>(Clock::now() - start_).count();
    std::lock_guard<std::mutex> lock(mutex_);
    std::ofstream(path_, std::ios::app) << text << " after " << elapsed << " ms" << std::endl;
  }

 private:
  const std::string path_;
  const Clock::time_point start_ = Clock::now();
  std::mutex mutex_;
};

absl::Status BarriersUntilError(Communicator& world, Stream& stream) {
  absl::Status status;
  while (status.ok()) status = world.Barrier(stream);
  return status;
}

// The status with which this rank's group ends.
absl::Status PlayCommunicator(const std::string& scenario, Communicator& world, Stream& stream) {
  const bool culprit = world.rank() == world.size() - 1;
  if (scenario == "missing" && culprit) std::this_thread::sleep_for(std::chrono::seconds(4));
  if (scenario == "abort" && culprit) {
    std::this_thread::sleep_for(milliseconds(200));
    world.Abort(absl::DataLossError("first reason"));
    world.Abort(absl::InternalError("second reason"));
  }
  if (scenario == "mismatch" && culprit) {
    std::vector<char> data(100);
    return world.Broadcast(data.data(), 100, culprit ? world.rank() : 0, stream);
  }
  if (scenario == "kill" && culprit) {
    // While all ranks are in one large exchange after the other.
    std::thread([] {
      std::this_thread::sleep_for(milliseconds(100));
      kill(getpid(), SIGKILL);
    }).detach();
  }
  std::vector<char> large(world.size() * (size_t{8} << 20));
  const std::vector<int64_t> counts(world.size(), int64_t{8} << 20);
  absl::Status status;
  while (status.ok() && scenario == "kill") {
    status = world.AllGather(large.data() + world.rank() * counts[0], large.data(), counts, stream);
  }
  return status.ok() ? BarriersUntilError(world, stream) : status;
}

// The watchdog's word, without any collective.
absl::Status PlayWatchdog(const std::string& scenario, Communicator& world, Stream& stream, Report& report) {
  std::mutex mutex;
  std::condition_variable changed;
  absl::Status lost;
  WatchdogCallbacks callbacks;
  callbacks.on_peer_lost = [&](int, const absl::Status& status) {
    std::lock_guard<std::mutex> lock(mutex);
    lost = status;
    changed.notify_all();
  };
  WatchdogOptions options;
  options.interval = milliseconds(100);
  options.timeout = milliseconds(2000);
  LF_ASSIGN_OR_RETURN(const auto watchdog, Watchdog::Start(world, options, callbacks, stream));
  const int culprit = scenario == "watchdog-root" ? 0 : world.size() - 1;
  std::this_thread::sleep_for(milliseconds(300));
  report.Line("fault");
  if (world.rank() == culprit) {
    kill(getpid(), scenario == "watchdog-stop" ? SIGSTOP : SIGKILL);
  }
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait_for(lock, std::chrono::seconds(20), [&] { return !lost.ok(); });
  world.Abort(lost.ok() ? absl::InternalError("the watchdog said nothing") : lost);
  return lost;
}

int Main(const std::string& scenario, const std::string& directory) {
  signal(SIGTERM, SIG_IGN);  // mpirun's first word when a rank has died; the last is SIGKILL
  MpiOptions options;
  options.launched = true;
  options.communicator.timeout = milliseconds(1500);
  auto session = MpiSession::Start(options);
  if (!session.ok()) {
    std::cerr << session.status() << std::endl;
    return 1;
  }
  Communicator& world = (*session)->world();
  CpuStream stream;
  Report report(directory, world.rank());
  const absl::Status ended = scenario.rfind("watchdog", 0) == 0
                                 ? PlayWatchdog(scenario, world, stream, report)
                                 : PlayCommunicator(scenario, world, stream);
  report.Line(ended.ToString());
  report.Line(absl::StrCat("later: ", world.Barrier(stream).ToString()));
  return 0;  // not reached: the session leaves by _exit(3)
}

}  // namespace
}  // namespace longfill

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: mpi_fault_main SCENARIO DIR" << std::endl;
    return 2;
  }
  return longfill::Main(argv[1], argv[2]);
}
