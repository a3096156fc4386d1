#include "deploy/doctor/host_probe.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/block_selection_simd.h"

namespace longfill {
namespace {

std::string FirstLine(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

int64_t SoftLimit(decltype(RLIMIT_NOFILE) resource) {
  rlimit limit{};
  if (getrlimit(resource, &limit) != 0) return kUnknown;
  return limit.rlim_cur == RLIM_INFINITY ? kUnlimited : static_cast<int64_t>(limit.rlim_cur);
}

// Version 2 of control groups, then version 1.
double ReadQuota() {
  const std::string version2 = FirstLine("/sys/fs/cgroup/cpu.max");
  if (!version2.empty()) return QuotaOf(version2);
  return QuotaOf(absl::StrCat(FirstLine("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), " ",
                              FirstLine("/sys/fs/cgroup/cpu/cpu.cfs_period_us")));
}

bool HasInfiniband() {
  std::error_code error;
  const std::filesystem::directory_iterator devices("/sys/class/infiniband", error);
  return !error && devices != std::filesystem::directory_iterator();
}

}  // namespace

double QuotaOf(const std::string& cpu_max) {
  std::istringstream text(cpu_max);
  double quota = 0;
  double period = 0;
  if (!(text >> quota >> period) || quota <= 0 || period <= 0) return 0;
  return quota / period;
}

std::vector<int> AllowedCores() {
  std::vector<int> cores;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &allowed)) cores.push_back(core);
  }
  return cores;
}

HostFacts ReadHostFacts() {
  HostFacts facts;
  utsname names{};
  if (uname(&names) == 0) facts.kernel = absl::StrCat(names.sysname, " ", names.release);
  facts.boot_id = FirstLine("/proc/sys/kernel/random/boot_id");
  facts.cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  facts.quota_cores = ReadQuota();
  facts.instruction_set = InstructionSet();
  const auto pages = sysconf(_SC_PHYS_PAGES);
  if (pages > 0) facts.memory_bytes = int64_t{pages} * sysconf(_SC_PAGESIZE);
  facts.locked_limit_bytes = SoftLimit(RLIMIT_MEMLOCK);
  facts.open_files_limit = SoftLimit(RLIMIT_NOFILE);
  struct statvfs shm {};
  if (statvfs("/dev/shm", &shm) == 0) {
    facts.shared_memory_bytes = static_cast<int64_t>(shm.f_blocks * shm.f_frsize);
    facts.shared_memory_free = static_cast<int64_t>(shm.f_bavail * shm.f_frsize);
  }
  facts.infiniband = HasInfiniband();
  return facts;
}

}  // namespace longfill
