#include "deploy/doctor/examination.h"

#include <unistd.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "deploy/doctor/exchange_probe.h"
#include "deploy/doctor/group_checks.h"
#include "deploy/doctor/host_checks.h"
#include "deploy/doctor/host_probe.h"
#include "deploy/doctor/ports.h"
#include "runtime/client/endpoint.h"
#include "runtime/engine/memory_plan.h"

namespace longfill {
namespace {

constexpr int64_t kLinkBytes = int64_t{4} << 20;
constexpr std::chrono::milliseconds kReachTimeout{5000};
constexpr std::chrono::milliseconds kAnswerLinger{200};  // a last packet may come after the barrier

Finding Of(std::vector<int> ranks, Finding finding) {
  finding.ranks = std::move(ranks);
  return finding;
}

absl::StatusOr<std::vector<std::string>> GatherTexts(const Ranks& ranks, const std::string& mine) {
  CpuStream stream;
  return AllGatherStrings(*ranks.communicator, mine, stream);
}

// Cores that the ranks of this host may run on together.
absl::StatusOr<int> UsableCores(const Ranks& ranks, const std::vector<int>& mine) {
  std::string text;
  for (const int core : mine) absl::StrAppend(&text, core, " ");
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> all, GatherTexts(ranks, text));
  std::set<std::string> cores;
  for (const int rank : ranks.Here()) {
    for (const absl::string_view core :
         absl::StrSplit(all[static_cast<size_t>(rank)], ' ', absl::SkipEmpty())) {
      cores.emplace(core);
    }
  }
  return static_cast<int>(cores.size());
}

Finding MemoryFinding(const HostQuestion& question, int ranks_on_host) {
  const absl::StatusOr<int64_t> available = AvailableMemoryBytes(ranks_on_host, question.held_bytes);
  if (!available.ok()) return Skipped("memory.available", std::string(available.status().message()));
  return JudgeMemory(*available, question.weights_bytes, ranks_on_host);
}

// What one rank listens at for the others to come.
struct OpenPorts {
  std::vector<Listener> listeners;
  std::string endpoint;  // of its pages, as the manifest would name it; empty: it could not listen
};

std::string EndpointOf(const PortQuestion& question, const std::string& address, int port) {
  const absl::StatusOr<HostPort> at = ParseHostPort(address);
  const std::string host = at.ok() ? at->host : "";
  return absl::StrCat(question.advertise_host.empty() ? host : question.advertise_host, ":", port);
}

// As it stands in the report: not one line for each of many ranks.
std::string Shown(const PortQuestion& question, const std::string& address, bool opened) {
  const absl::StatusOr<HostPort> at = ParseHostPort(address);
  if (at.ok() && at->port == 0) return absl::StrCat(at->host, ", any free port,");
  return opened && !question.kv_option.empty() ? absl::StrCat(question.kv_option, " + rank") : address;
}

OpenPorts OpenAll(const Ranks& ranks, const PortQuestion& question, Findings& findings) {
  OpenPorts ports;
  const auto open = [&](const std::string& address, bool pages) {
    absl::StatusOr<Listener> listener = Listener::Open(address);
    const bool prompts = ranks.rank() == 0 && !pages;
    if (question.listen_given) {
      findings.push_back(Of(
          {ranks.rank()}, prompts
                              ? JudgePort("port.listen", "--listen", address, listener.status())
                              : JudgePort("port.kv", question.kv_option.empty() ? "--listen" : "--kv-listen",
                                          Shown(question, address, listener.ok()), listener.status())));
    }
    if (!listener.ok()) return;
    ports.endpoint = EndpointOf(question, address, listener->port());
    ports.listeners.push_back(*std::move(listener));
  };
  open(question.listen, /*pages=*/false);
  if (!question.kv_listen.empty()) {
    ports.endpoint.clear();
    open(question.kv_listen, /*pages=*/true);
  }
  return ports;
}

// The listeners of all ranks, as the first rank of each host tries to reach them.
class Round {
 public:
  Round(const PortQuestion& question, const std::vector<std::string>& announced,
        std::chrono::milliseconds timeout)
      : timeout_(timeout) {
    std::vector<std::string> addresses;
    for (size_t rank = 0; rank < announced.size(); ++rank) {
      const std::pair<std::string, std::string> parts =
          absl::StrSplit(announced[rank], absl::MaxSplits('\n', 1));
      if (parts.first.empty()) continue;  // it says so itself
      const absl::StatusOr<std::string> address = ResolveEndpoint(parts.first, question.target);
      reached_.push_back({.rank = static_cast<int>(rank),
                          .address = address.ok() ? *address : parts.first,
                          .heard = address,
                          .word = parts.second});
      if (address.ok()) addresses.push_back(*address);
    }
    callers_.emplace(addresses, timeout_);
  }

  // After every listener has answered.
  Finding Judge() {
    std::vector<absl::StatusOr<std::string>> heard = callers_->Hear(timeout_);
    size_t next = 0;
    for (Reached& rank : reached_) {
      if (rank.heard.ok()) rank.heard = std::move(heard[next++]);
    }
    return JudgeReachability(reached_);
  }

 private:
  const std::chrono::milliseconds timeout_;
  std::vector<Reached> reached_;
  std::optional<Callers> callers_;
};

}  // namespace

std::vector<int> Ranks::All() const {
  std::vector<int> all(hosts.size());
  std::iota(all.begin(), all.end(), 0);
  return all;
}

std::vector<int> Ranks::Here() const {
  std::vector<int> here;
  for (const int other : All()) {
    if (hosts[static_cast<size_t>(other)] == hosts[static_cast<size_t>(rank())]) here.push_back(other);
  }
  return here;
}

absl::Status ExamineHosts(const Ranks& ranks, const HostQuestion& question, Findings& findings) {
  const HostFacts facts = ReadHostFacts();
  const std::vector<int> allowed = AllowedCores();
  LF_ASSIGN_OR_RETURN(const int usable_cores, UsableCores(ranks, allowed));
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> boot_ids, GatherTexts(ranks, facts.boot_id));
  const std::vector<int> here = ranks.Here();
  const auto ranks_here = static_cast<int>(here.size());
  if (ranks.rank() == 0) findings.push_back(Of(ranks.All(), JudgeHostNames(ranks.hosts, boot_ids)));
  if (ranks.FirstHere()) {
    findings.push_back(Of(here, JudgeSystem(facts)));
    findings.push_back(Of(here, JudgeInstructionSet(facts.instruction_set)));
    findings.push_back(Of(here, JudgeCores(facts, usable_cores, ranks_here)));
  }
  findings.push_back(Of({ranks.rank()}, JudgeBinding(allowed, facts.cores, ranks_here)));
  if (ranks.FirstHere()) {
    findings.push_back(Of(here, MemoryFinding(question, ranks_here)));
    findings.push_back(Of(here, JudgeSharedMemory(facts.shared_memory_bytes, facts.shared_memory_free,
                                                  ranks_here, question.gpus)));
  }
  findings.push_back(Of({ranks.rank()}, JudgeLockedMemory(facts.locked_limit_bytes, facts.infiniband)));
  findings.push_back(Of({ranks.rank()}, JudgeOpenFiles(facts.open_files_limit)));
  return absl::OkStatus();
}

absl::Status ExamineSoftware(const Ranks& ranks, const Software& software, Findings& findings) {
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> builds, GatherTexts(ranks, software.build));
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> libraries, GatherTexts(ranks, software.mpi_library));
  if (ranks.rank() == 0) findings.push_back(Of(ranks.All(), JudgeBuilds(builds)));
  findings.push_back(Of({ranks.rank()}, JudgeMpiLibrary(software.mpi_compiled_with, software.mpi_library)));
  findings.push_back(Of({ranks.rank()}, JudgeThreadLevel(software.mpi_thread_level)));
  if (ranks.rank() == 0 && ranks.size() > 1)
    findings.push_back(Of(ranks.All(), JudgeMpiAgreement(libraries)));
  return absl::OkStatus();
}

absl::Status ExamineExchange(const Ranks& ranks, Findings& findings) {
  if (ranks.size() == 1) {
    findings.push_back(Of({0}, Skipped("exchange.reduction", "there is one rank")));
    findings.push_back(Of({0}, Skipped("clock.offset", "there is one host")));
    return absl::OkStatus();
  }
  Communicator& communicator = *ranks.communicator;
  LF_ASSIGN_OR_RETURN(const std::string wrong, CheckReductions(communicator));
  LF_ASSIGN_OR_RETURN(const double latency, MeasureLatency(communicator));
  LF_ASSIGN_OR_RETURN(const std::vector<LinkRate> links, MeasureLinks(communicator, kLinkBytes));
  LF_ASSIGN_OR_RETURN(const std::vector<ClockOffset> clocks, MeasureClocks(communicator, WallSeconds));
  findings.push_back(Of({ranks.rank()}, JudgeReduction(wrong, ranks.size())));
  if (ranks.rank() == 0) {
    findings.push_back(Of(ranks.All(), JudgeLatency(latency, ranks.SeveralHosts())));
    for (Finding& finding : JudgeLinks(links, ranks.hosts)) {
      findings.push_back(Of(ranks.All(), std::move(finding)));
    }
    if (!ranks.SeveralHosts())
      findings.push_back(Of(ranks.All(), Skipped("clock.offset", "there is one host")));
  } else if (ranks.FirstHere()) {
    findings.push_back(Of(ranks.Here(), JudgeClock(clocks[static_cast<size_t>(ranks.rank())])));
  }
  return absl::OkStatus();
}

absl::Status ExaminePorts(const Ranks& ranks, const PortQuestion& question, std::chrono::milliseconds timeout,
                          Findings& findings) {
  if (!question.listen_given && ranks.rank() == 0) {
    findings.push_back(Of({0}, Skipped("port.listen", "--listen is not given")));
  }
  if (question.listen.empty()) return absl::OkStatus();
  OpenPorts ports = OpenAll(ranks, question, findings);
  const std::string word = absl::StrCat("longfill doctor, ", ranks.hosts[static_cast<size_t>(ranks.rank())],
                                        ", rank ", ranks.rank(), ", ", getpid(), ", ", WallSeconds());
  LF_ASSIGN_OR_RETURN(const std::vector<std::string> announced,
                      GatherTexts(ranks, absl::StrCat(ports.endpoint, "\n", word)));
  const std::chrono::milliseconds patience = std::min(kReachTimeout, timeout / 3);
  std::optional<Round> round;
  if (ranks.FirstHere()) round.emplace(question, announced, patience);
  CpuStream stream;
  LF_RETURN_IF_ERROR(ranks.communicator->Barrier(stream));  // whoever could connect has
  for (Listener& listener : ports.listeners) listener.Answer(word, kAnswerLinger);
  if (round) findings.push_back(Of({ranks.rank()}, round->Judge()));
  return ranks.communicator->Barrier(stream);  // listeners stay until all have heard
}

}  // namespace longfill
