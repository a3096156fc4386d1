#ifndef LONGFILL_DEPLOY_DOCTOR_EXAMINATION_H_
#define LONGFILL_DEPLOY_DOCTOR_EXAMINATION_H_

// The steps of `longfill doctor`: each reads or measures, judges, and appends what this rank has to say. All
// are collective, and every wait in them has a deadline: that of the communicator, or one of their own. Whom
// a finding is of: a rank says what concerns it alone, the first rank of a host what concerns the host, rank
// 0 what concerns all. An error is one of the communicator, after which the group is of no more use.

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "deploy/doctor/finding.h"
#include "kernels/api/kernel_set.h"
#include "kernels/base/status.h"
#include "parallel/communicator.h"
#include "runtime/engine/device_communicator.h"
#include "runtime/engine/engine_device.h"

namespace longfill {

struct Ranks {
  Communicator* communicator = nullptr;
  std::vector<std::string> hosts;  // by rank

  int rank() const { return communicator->rank(); }
  int size() const { return communicator->size(); }
  std::vector<int> All() const;
  std::vector<int> Here() const;  // those of this rank's host
  bool FirstHere() const { return Here().front() == rank(); }
  bool SeveralHosts() const { return static_cast<int>(Here().size()) < size(); }
};

using Findings = std::vector<Finding>;

// Bytes of the weights of one rank that computes with these kernels.
using WeightsBytes = std::function<int64_t(const KernelSet& kernels)>;

struct HostQuestion {
  bool gpus = false;          // the ranks compute on them
  int64_t weights_bytes = 0;  // that a rank needs in host memory; 0: none, or no model was named
  int64_t held_bytes = 0;     // of AvailableMemoryBytes
};
absl::Status ExamineHosts(const Ranks& ranks, const HostQuestion& question, Findings& findings);

// What a rank runs.
struct Software {
  std::string build;  // "0.1.0 (commit abc)"
  std::string mpi_compiled_with;
  std::string mpi_library;
  std::string mpi_thread_level;
};
absl::Status ExamineSoftware(const Ranks& ranks, const Software& software, Findings& findings);

// Reductions, latency and bandwidth over host memory, and clocks.
absl::Status ExamineExchange(const Ranks& ranks, Findings& findings);

struct PortQuestion {
  std::string listen;          // of this rank, as `serve` would; empty: the ports are not asked about
  std::string kv_listen;       // rank 0's second address; empty: none
  std::string advertise_host;  // empty: the host listened at
  std::string target;          // HOST:PORT of rank 0, as clients would name it
  bool listen_given = false;   // else only whether hosts reach each other is looked at
  std::string kv_option;       // "--kv-listen 0.0.0.0:50060" as given; empty: not given
};
absl::Status ExaminePorts(const Ranks& ranks, const PortQuestion& question, std::chrono::milliseconds timeout,
                          Findings& findings);

struct GpuQuestion {
  DeviceOptions device;
  DeviceCommunicatorOptions communicator;
  WeightsBytes weights_bytes;  // empty: no model was named
};
absl::Status ExamineGpus(const Ranks& ranks, const GpuQuestion& question, Findings& findings);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_DOCTOR_EXAMINATION_H_
