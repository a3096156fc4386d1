#include "deploy/doctor/group_checks.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace longfill {
namespace {

constexpr double kSlowReduction = 5e-3;          // seconds, ranks of one host
constexpr double kSlowReductionOfHosts = 20e-3;  // and of several
constexpr double kSlowLink = 0.25e9;             // bytes per second, through shared memory
constexpr double kSlowLinkOfHosts = 0.125e9;     // of an Ethernet of 1 Gb/s
constexpr double kUneven = 4;                    // times slower than the median of its kind
constexpr double kWantedClock = 1;               // seconds

constexpr char kOpenMpi[] = "Open MPI";

bool AllEqual(const std::vector<std::string>& texts) {
  return std::set<std::string>(texts.begin(), texts.end()).size() <= 1;
}

// Of "Open MPI v4.1.4": name and digits. A name without a version has none.
struct Library {
  std::string name;
  std::string version;
};

Library ParseLibrary(std::string_view text) {
  const size_t digit = text.find_first_of("0123456789");
  if (digit == std::string_view::npos) return {std::string(text), ""};
  std::string_view name = text.substr(0, digit);
  while (!name.empty() && (name.back() == 'v' || name.back() == ' ')) name.remove_suffix(1);
  const std::string_view rest = text.substr(digit);
  return {std::string(name), std::string(rest.substr(0, rest.find_first_not_of("0123456789.")))};
}

std::string Rate(double bytes_per_second) { return Scaled(bytes_per_second, "B/s"); }

struct LinkKind {
  const char* name;
  double slow;
  const char* advice;
};

constexpr LinkKind kInside = {
    "inside hosts", kSlowLink,
    "ranks of a host should exchange through shared memory: see memory.shm and cpu.cores above, and let no "
    "OMPI_MCA_btl leave out vader (sm)"};
constexpr LinkKind kBetween = {"between hosts", kSlowLinkOfHosts,
                               "name the fast network: mpirun --mca btl_tcp_if_include IFACE (Open MPI "
                               "chooses by itself), and look at its "
                               "speed with ethtool IFACE"};

std::optional<Finding> JudgeKind(std::vector<LinkRate> links, const LinkKind& kind) {
  if (links.empty()) return std::nullopt;
  std::sort(links.begin(), links.end(),
            [](const LinkRate& a, const LinkRate& b) { return a.bytes_per_second < b.bytes_per_second; });
  const LinkRate& slowest = links.front();
  const double median = links[links.size() / 2].bytes_per_second;
  std::string value = absl::StrCat(kind.name, ": ", Rate(slowest.bytes_per_second));
  if (links.size() > 1) {
    absl::StrAppend(&value, " (rank ", slowest.from, " to ", slowest.to, ") to ",
                    Rate(links.back().bytes_per_second), ", median ", Rate(median));
  }
  if (slowest.bytes_per_second < kind.slow) return Warning("exchange.bandwidth", value, kind.advice);
  if (slowest.bytes_per_second * kUneven < median) {
    return Warning(
        "exchange.bandwidth", value,
        absl::StrCat("the link from rank ", slowest.from, " to ", slowest.to,
                     " is much slower than others, and every exchange waits for it: look at its cable, "
                     "its adapter and what else uses it"));
  }
  return Ok("exchange.bandwidth", value);
}

}  // namespace

Finding JudgeBuilds(const std::vector<std::string>& builds) {
  if (AllEqual(builds)) return Ok("build.version", builds.empty() ? "" : builds.front());
  return Failed(
      "build.version", ByRank(builds),
      "install one build of longfill on all hosts: ranks of different ones do not understand each other");
}

Finding JudgeMpiLibrary(std::string_view compiled_with, std::string_view library) {
  if (compiled_with.empty()) return Skipped("mpi.library", "this build has no MPI (LONGFILL_MPI is off)");
  const Library header = ParseLibrary(compiled_with);
  const Library loaded = ParseLibrary(library);
  const std::string value =
      absl::StrCat(std::string(library), ", compiled with ", std::string(compiled_with));
  const bool named = header.name != "MPI";
  if (named && !loaded.name.starts_with(header.name)) {
    // MPICH and those that come from it have one binary interface, Open MPI another.
    constexpr char kAnother[] =
        "another MPI is found first at run time: set LD_LIBRARY_PATH, or build longfill with the MPI that is "
        "there";
    const bool foreign = header.name == kOpenMpi || loaded.name == kOpenMpi;
    return foreign ? Failed("mpi.library", value, kAnother) : Warning("mpi.library", value, kAnother);
  }
  if (named && header.version != loaded.version) {
    return Warning("mpi.library", value,
                   "build longfill with the MPI that it runs with, or let the other one be found first");
  }
  return Ok("mpi.library", value);
}

Finding JudgeMpiAgreement(const std::vector<std::string>& libraries) {
  if (AllEqual(libraries)) return Ok("mpi.equal", "the same library everywhere");
  return Failed("mpi.equal", ByRank(libraries), "install one version of MPI on all hosts");
}

Finding JudgeThreadLevel(std::string_view level) {
  if (level.empty()) return Skipped("mpi.threads", "no launcher, so MPI was not started");
  if (level == "MPI_THREAD_SERIALIZED" || level == "MPI_THREAD_MULTIPLE") {
    return Ok("mpi.threads", std::string(level));
  }
  return Failed("mpi.threads", std::string(level),
                "longfill needs MPI_THREAD_SERIALIZED: use an MPI that was built with thread support");
}

Finding JudgeReduction(std::string_view wrong, int num_ranks) {
  if (wrong.empty()) {
    return Ok("exchange.reduction", absl::StrCat("sums and maxima over ", num_ranks, " ranks are right"));
  }
  return Failed(
      "exchange.reduction", std::string(wrong),
      "the network or the MPI library corrupts data: try mpirun --mca pml ob1 --mca btl self,tcp, and "
      "test the memory of the hosts");
}

Finding JudgeLatency(double seconds, bool several_hosts) {
  const std::string value = absl::StrFormat("%.0f us for a reduction over all ranks", seconds * 1e6);
  if (seconds > (several_hosts ? kSlowReductionOfHosts : kSlowReduction)) {
    return Warning("exchange.latency", value,
                   several_hosts
                       ? "the network is slow or busy, or ranks share cores: see cpu.cores, ping the hosts"
                       : "ranks wait for a core: see cpu.cores, and what else runs on this host");
  }
  return Ok("exchange.latency", value);
}

std::vector<Finding> JudgeLinks(const std::vector<LinkRate>& links, const std::vector<std::string>& hosts) {
  std::vector<LinkRate> inside;
  std::vector<LinkRate> between;
  for (const LinkRate& link : links) {
    if (!link.intact) {
      return {Failed("exchange.bandwidth",
                     absl::StrCat("bytes from rank ", link.from, " to ", link.to, " came changed"),
                     "the network or the MPI library corrupts data: look at the adapters of both hosts")};
    }
    const bool same = hosts[static_cast<size_t>(link.from)] == hosts[static_cast<size_t>(link.to)];
    (same ? inside : between).push_back(link);
  }
  std::vector<Finding> findings;
  for (const auto& [kind, of_kind] : {std::pair(&kInside, &inside), std::pair(&kBetween, &between)}) {
    if (std::optional<Finding> finding = JudgeKind(*of_kind, *kind)) findings.push_back(*std::move(finding));
  }
  return findings;
}

Finding JudgeClock(const ClockOffset& offset) {
  const std::string value = absl::StrFormat("%+.3f s against the host of rank 0, plus or minus %.1f ms",
                                            offset.seconds, offset.uncertainty * 1e3);
  if (std::abs(offset.seconds) - offset.uncertainty > kWantedClock) {
    return Warning(
        "clock.offset", value,
        "run an NTP client such as chrony: leases and deadlines are counted on each host by itself and "
        "stay right, but times of log lines of different hosts do not compare");
  }
  return Ok("clock.offset", value);
}

}  // namespace longfill
