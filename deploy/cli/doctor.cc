// longfill doctor: what usually goes wrong before a prefill does, looked for by all ranks, told by rank 0.

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "deploy/cli/command.h"
#include "deploy/cli/serve_addresses.h"
#include "deploy/cli/version.h"
#include "deploy/doctor/examination.h"
#include "kernels/api/cuda_devices.h"
#include "models/weights.h"
#include "runtime/client/endpoint.h"

namespace longfill {
namespace {

using std::chrono::seconds;

struct DoctorOptions {
  ModelOptions model;
  std::string listen;
  std::string kv_listen;
  int64_t timeout_seconds = 30;
  bool json = false;
};

// Ends the process when a step takes longer than all its exchanges may: a driver, a resolver or MPI hangs.
class StepGuard {
 public:
  // `on_late` is called from the guard's thread and should end the process.
  StepGuard(seconds limit, std::function<void(const std::string& step)> on_late)
      : limit_(limit), on_late_(std::move(on_late)), thread_([this] { Watch(); }) {}
  ~StepGuard() {
    Enter("");
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  StepGuard(const StepGuard&) = delete;
  StepGuard& operator=(const StepGuard&) = delete;

  // The step before has ended. Empty: nothing is waited for.
  void Enter(std::string step) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      step_ = std::move(step);
      ++number_;
    }
    changed_.notify_all();
  }

 private:
  void Watch() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!closing_) {
      const int64_t number = number_;
      const bool moved = changed_.wait_for(lock, limit_, [&] { return closing_ || number_ != number; });
      if (moved || step_.empty()) continue;
      const std::string step = step_;
      lock.unlock();
      on_late_(step);
      lock.lock();
    }
  }

  const seconds limit_;
  const std::function<void(const std::string& step)> on_late_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string step_;
  int64_t number_ = 0;
  bool closing_ = false;
  std::thread thread_;  // last: it uses all of the above
};

// What rank 0 knows so far; the guard prints it where a step does not end.
class SharedReport {
 public:
  SharedReport(const DoctorOptions& options, const Launch& launch) : json_(options.json) {
    header_ = {.version = kVersion,
               .commit = kGitCommit,
               .launcher = launch.launcher,
               .device = options.model.device,
               .hosts = {HostName()}};
  }
  void SetHosts(const std::vector<std::string>& hosts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    header_.hosts = hosts;
  }
  void Add(Findings findings) {
    const std::lock_guard<std::mutex> lock(mutex_);
    report_.Add(std::move(findings));
  }
  int ExitCode() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return report_.Count(CheckResult::kFailed) > 0 ? kExitFailed : kExitDone;
  }
  void Print() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::string text = json_ ? absl::StrCat(report_.ToJson(header_), "\n") : report_.ToText(header_);
    std::fputs(text.c_str(), stdout);
    std::fflush(stdout);
  }

 private:
  const bool json_;
  std::mutex mutex_;
  ReportHeader header_;
  DoctorReport report_;
};

Finding OfRanks(std::vector<int> ranks, Finding finding) {
  finding.ranks = std::move(ranks);
  return finding;
}

// What the options ask of all steps; made before the first one.
struct Questions {
  HostQuestion host;
  PortQuestion ports;
  GpuQuestion gpus;
};

// Of the model that was named: what its weights take, on whatever computes.
absl::StatusOr<WeightsBytes> ReadWeightsBytes(const ModelOptions& options, const Ranks& ranks,
                                              HostQuestion& host) {
  if (options.model_dir.empty()) return WeightsBytes();
  LF_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model_dir));
  LF_ASSIGN_OR_RETURN(std::unique_ptr<const ModelWeights> loaded,
                      ModelWeights::Load(options.model_dir, config));
  const std::shared_ptr<const ModelWeights> weights = std::move(loaded);
  const Mesh mesh{ranks.size(), 1};
  const WeightPlacement placement = MakeWeightPlacement(options);
  WeightsBytes bytes = [=](const KernelSet& kernels) {
    return LargestWeightsBytes(placement, config, weights.get(), mesh, kernels);
  };
  if (options.device == "cpu") {
    host.weights_bytes = bytes(CreateCpuBackend(1)->kernels());
    if (!ShardsWeights(placement, mesh)) host.held_bytes = weights->mapped_bytes();
  }
  return bytes;
}

absl::StatusOr<PortQuestion> MakePortQuestion(const DoctorOptions& options, const Ranks& ranks) {
  PortQuestion question;
  question.listen_given = !options.listen.empty();
  if (!question.listen_given && !options.kv_listen.empty()) {
    return absl::InvalidArgumentError("--kv-listen without --listen: give both, as to serve");
  }
  if (!question.listen_given && !ranks.SeveralHosts()) return question;
  const std::string listen = question.listen_given ? options.listen : "0.0.0.0:0";
  LF_ASSIGN_OR_RETURN(const ServeAddresses addresses,
                      MakeServeAddresses(listen, options.kv_listen, ranks.rank(), ranks.hosts));
  LF_ASSIGN_OR_RETURN(const HostPort at, ParseHostPort(listen));
  question.listen = addresses.listen;
  question.kv_listen = addresses.kv_listen;
  question.advertise_host = addresses.advertise_host;
  const bool by_name = ranks.SeveralHosts() && IsWildcardHost(at.host);
  question.target = by_name ? absl::StrCat(ranks.hosts.front(), ":", at.port) : listen;
  LF_ASSIGN_OR_RETURN(const HostPort kv,
                      ParseHostPort(options.kv_listen.empty() ? listen : options.kv_listen));
  if (!options.kv_listen.empty() && kv.port != 0) question.kv_option = options.kv_listen;
  return question;
}

absl::StatusOr<Questions> MakeQuestions(const DoctorOptions& options, const Ranks& ranks) {
  Questions questions;
  questions.host.gpus = options.model.device != "cpu";
  LF_ASSIGN_OR_RETURN(questions.gpus.weights_bytes, ReadWeightsBytes(options.model, ranks, questions.host));
  LF_ASSIGN_OR_RETURN(questions.ports, MakePortQuestion(options, ranks));
  LF_ASSIGN_OR_RETURN(questions.gpus.communicator, MakeCommunicatorOptions(options.model));
  questions.gpus.communicator.nccl.timeout = seconds(options.timeout_seconds);
  const std::vector<int> here = ranks.Here();
  int local_rank = 0;
  while (here[static_cast<size_t>(local_rank)] != ranks.rank()) ++local_rank;
  LF_ASSIGN_OR_RETURN(questions.gpus.device,
                      DescribeDevice(options.model, static_cast<int>(here.size()), local_rank));
  // A driver or a GPU that is missing is what the doctor is asked about; a build without CUDA is not.
  if (questions.host.gpus && absl::IsUnimplemented(ReadCudaVersions().status())) {
    return MakeDeviceOptions(options.model, static_cast<int>(here.size()), local_rank).status();
  }
  return questions;
}

struct Step {
  const char* name;
  const char* advice;  // where ranks do not get through it
  std::function<absl::Status(Findings& findings)> run;
};

std::vector<Step> MakeSteps(const DoctorOptions& options, const Ranks& ranks, const Questions& questions) {
  constexpr char kNetwork[] =
      "look at the host that is named: whether its process lives, and whether the network between hosts lets "
      "MPI "
      "through (mpirun --mca btl_tcp_if_include IFACE names one)";
  std::vector<Step> steps = {
      {"software", kNetwork,
       [&ranks](Findings& findings) {
         const MpiFacts mpi = FactsOfMpi();
         return ExamineSoftware(ranks,
                                {.build = absl::StrCat(kVersion, " (commit ", kGitCommit, ")"),
                                 .mpi_compiled_with = mpi.compiled_with,
                                 .mpi_library = mpi.library,
                                 .mpi_thread_level = mpi.thread_level},
                                findings);
       }},
      {"hosts", kNetwork, [&](Findings& findings) { return ExamineHosts(ranks, questions.host, findings); }},
      {"ports", kNetwork,
       [&](Findings& findings) {
         return ExaminePorts(ranks, questions.ports, seconds(options.timeout_seconds), findings);
       }},
      {"exchange", kNetwork, [&ranks](Findings& findings) { return ExamineExchange(ranks, findings); }},
  };
  if (questions.host.gpus) {
    steps.push_back(
        {"gpus",
         "NCCL_DEBUG=INFO shows where NCCL stops; memory.shm, NCCL_SOCKET_IFNAME and nvidia-smi topo -m "
         "are the usual suspects, and --communicator mpi does without it",
         [&](Findings& findings) { return ExamineGpus(ranks, questions.gpus, findings); }});
  }
  return steps;
}

// Collective: all ranks' findings into rank 0's report.
absl::Status Collect(const Ranks& ranks, const Findings& mine, SharedReport& report) {
  CpuStream stream;
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                      AllGatherStrings(*ranks.communicator, FindingsToText(mine), stream));
  for (const std::string& text : all) {
    LF_ASSIGN_OR_RETURN(Findings findings, FindingsFromText(text));
    report.Add(std::move(findings));
  }
  return absl::OkStatus();
}

// Runs the steps up to the first that ranks do not get through; the report has then what was found up to it.
void RunSteps(const std::vector<Step>& steps, const Ranks& ranks, StepGuard& guard, SharedReport& report) {
  for (const Step& step : steps) {
    guard.Enter(step.name);
    Findings mine;
    absl::Status status = step.run(mine);
    if (status.ok()) status = Collect(ranks, mine, report);
    if (status.ok()) continue;
    mine.push_back(OfRanks({ranks.rank()}, Failed(absl::StrCat("group.", step.name),
                                                  std::string(status.message()), step.advice)));
    report.Add(std::move(mine));
    return;
  }
}

// Ranks that MPI has joined; or, where the launch went wrong, this process alone, which looks at its host.
int Examine(const DoctorOptions& options, const Ranks& ranks, bool speaks, StepGuard& guard,
            SharedReport& report) {
  report.SetHosts(ranks.hosts);
  guard.Enter("options");
  CpuStream stream;
  const absl::StatusOr<Questions> questions = MakeQuestions(options, ranks);
  if (const absl::Status status = AgreeOnStatus(*ranks.communicator, questions.status(), stream);
      !status.ok()) {
    if (speaks) Report(status);
    return absl::IsDataLoss(status) ? static_cast<int>(kExitUsage) : ExitCodeOf(status);
  }
  RunSteps(MakeSteps(options, ranks, *questions), ranks, guard, report);
  guard.Enter("");
  if (speaks) report.Print();
  return report.ExitCode();
}

Finding JudgeLaunch(const Launch& launch, int num_ranks) {
  if (launch.launcher.empty()) return Ok("launch.ranks", "one process, without a launcher");
  return Ok("launch.ranks",
            absl::StrCat(num_ranks, num_ranks == 1 ? " rank by " : " ranks by ", launch.launcher));
}

// Why there is no World, as a finding.
Finding JudgeNoWorld(const Launch& launch, const absl::Status& status) {
  if (const auto problem = FindLaunchProblem(launch, 1, FactsOfMpi().library);
      problem && absl::StartsWith(status.message(), problem->what)) {
    return Failed("launch.ranks", problem->what, problem->advice);
  }
  return Failed(
      "launch.ranks", std::string(status.message()),
      "mpirun -np N hostname shows whether the launcher itself works; see deploy/README.md, Several hosts");
}

int Doctor(const DoctorOptions& options, CommandContext& context) {
  const Launch& launch = context.launch;
  SharedReport report(options, launch);
  // A step is several exchanges, each of which has the timeout.
  const seconds limit(3 * options.timeout_seconds + 10);
  StepGuard guard(limit, [&](const std::string& step) {
    const std::string what = absl::StrCat("step ", step, " did not end within ", limit.count(), " s");
    if (launch.process == 0) {
      report.Add(
          {OfRanks({0}, Failed(absl::StrCat("group.", step), what,
                               "a driver, a name server or the MPI library does not answer: see dmesg, and "
                               "getent hosts for the names of the hosts"))});
      report.Print();
    } else {
      PrintError(absl::StrCat("doctor: ", HostName(), ", rank ", launch.process, ": ", what));
    }
    _exit(kExitFailed);
  });
  guard.Enter("launch");
  const auto world = World::Create(launch, kExitFailed, {.timeout = seconds(options.timeout_seconds)});
  Ranks ranks;
  if (world.ok()) {
    ranks = {&(*world)->communicator(), (*world)->hosts()};
    report.Add({OfRanks(ranks.All(), JudgeLaunch(launch, ranks.size()))});
    return Examine(options, ranks, ranks.rank() == 0, guard, report);
  }
  const std::unique_ptr<Communicator> alone = CreateSingleCommunicator();
  ranks = {alone.get(), {HostName()}};
  report.Add({OfRanks({0}, JudgeNoWorld(launch, world.status()))});
  return Examine(options, ranks, launch.process == 0, guard, report);
}

}  // namespace

Command AddDoctorCommand(CLI::App& program) {
  CLI::App* app = program.add_subcommand(
      "doctor",
      "Look for what usually goes wrong, on all ranks that mpirun or srun has started, and say what to do");
  auto options = std::make_shared<DoctorOptions>();
  AddModelOption(*app, options->model)->required(false);
  AddListenOptions(*app, options->listen, options->kv_listen);
  AddDeviceOption(*app, options->model);
  AddWeightsOption(*app, options->model);
  app->add_option("--timeout", options->timeout_seconds,
                  absl::StrCat("seconds that ranks wait for each other in one exchange (default: ",
                               options->timeout_seconds, ")"))
      ->type_name("SECONDS")
      ->check(CLI::Range(1, 600));
  app->add_flag("--json", options->json, "print the report as one JSON object");
  app->footer("Exit codes: 0 nothing failed, 1 a check failed, 2 bad usage.");
  return {app, [options](CommandContext& context) { return Doctor(*options, context); }};
}

}  // namespace longfill
