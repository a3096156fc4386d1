// ExamineGpus: driver and devices, then copies of each rank, then the exchange between them.

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "deploy/doctor/examination.h"
#include "deploy/doctor/gpu_checks.h"
#include "deploy/doctor/gpu_probe.h"

namespace longfill {
namespace {

constexpr int64_t kCopyBytes = int64_t{64} << 20;
constexpr int64_t kExchangeBytes = int64_t{16} << 20;

// One rank's way through the step.
class GpuExamination {
 public:
  GpuExamination(const Ranks& ranks, const GpuQuestion& question, Findings& findings)
      : ranks_(ranks), question_(question), findings_(findings) {}

  absl::Status Run() {
    OpenDevice();
    const std::string mine = backend_ == nullptr ? "" : backend_->facts().id;
    CpuStream stream;
    LF_ASSIGN_OR_RETURN(ids_, AllGatherStrings(*ranks_.communicator, mine, stream));
    if (backend_ != nullptr) LookAtDevice();
    JudgeSharingHere();
    return ExamineExchangeOfDevices();
  }

 private:
  void Add(Finding finding) {
    finding.ranks = {ranks_.rank()};
    findings_.push_back(std::move(finding));
  }

  // Leaves backend_ empty where the GPU cannot be used, and says why.
  void OpenDevice() {
    const absl::StatusOr<CudaVersions> versions = ReadCudaVersions();
    if (!versions.ok()) {
      Add(Failed("cuda.driver", std::string(versions.status().message()), "install NVIDIA's driver"));
      return;
    }
    Add(JudgeDriver(*versions));
    absl::StatusOr<std::vector<CudaDeviceFacts>> devices = ListCudaDevices();
    if (!devices.ok()) {
      Add(Failed("cuda.device", std::string(devices.status().message()),
                 "nvidia-smi says whether the driver is loaded; in a container look at --gpus, and at "
                 "CUDA_VISIBLE_DEVICES"));
      return;
    }
    devices_ = *std::move(devices);
    const auto count = static_cast<int>(devices_.size());
    const int ordinal = DeviceOrdinal(question_.device, count);
    if (ordinal >= count) {
      Add(Failed("cuda.device",
                 absl::StrCat("GPU ", ordinal, " is asked for, the visible ones are 0 to ", count - 1),
                 "name one that is there, or give --device cuda"));
      return;
    }
    Finding device = JudgeDevice(ordinal, devices_[static_cast<size_t>(ordinal)]);
    const bool usable = device.result == CheckResult::kOk;
    Add(std::move(device));
    if (!usable) return;
    absl::StatusOr<std::shared_ptr<Backend>> backend = CreateBackend(question_.device);
    if (backend.ok()) {
      backend_ = *std::move(backend);
    } else {
      Add(Failed("cuda.backend", std::string(backend.status().message()),
                 "look at dmesg for Xid messages and at nvidia-smi for what else uses the GPU"));
    }
  }

  void LookAtDevice() {
    const absl::StatusOr<int64_t> free_bytes = backend_->FreeMemoryBytes();
    const auto ranks_on_device = static_cast<int>(std::count(ids_.begin(), ids_.end(), backend_->facts().id));
    if (free_bytes.ok()) {
      Add(JudgeDeviceMemory(*free_bytes, ranks_on_device,
                            question_.weights_bytes ? question_.weights_bytes(backend_->kernels()) : 0));
    } else {
      Add(Failed("cuda.memory", std::string(free_bytes.status().message()),
                 "look at dmesg for Xid messages"));
    }
    const absl::StatusOr<HostCopyRates> rates = MeasureHostCopy(*backend_, kCopyBytes);
    Add(rates.ok() ? JudgeHostCopy(*rates)
                   : Failed("cuda.host_copy", std::string(rates.status().message()),
                            "end what else uses the GPU, and look at dmesg for Xid messages"));
    if (!ranks_.FirstHere()) return;
    const absl::StatusOr<std::vector<PeerRate>> peers = MeasurePeers(devices_, kCopyBytes);
    Add(peers.ok()
            ? JudgePeers(*peers)
            : Failed("cuda.peer_copy", std::string(peers.status().message()),
                     "nvidia-smi topo -m shows how GPUs are joined; ACS and IOMMU must allow peer access"));
  }

  void JudgeSharingHere() {
    if (!ranks_.FirstHere()) return;
    std::vector<std::string> here;
    for (const int rank : ranks_.Here()) {
      if (!ids_[static_cast<size_t>(rank)].empty()) here.push_back(ids_[static_cast<size_t>(rank)]);
    }
    if (here.empty()) return;
    Finding finding = JudgeSharing(here, static_cast<int>(devices_.size()));
    finding.ranks = ranks_.Here();
    findings_.push_back(std::move(finding));
  }

  absl::Status ExamineExchangeOfDevices() {
    constexpr char kCheck[] = "exchange.device";
    std::vector<int> without;
    for (int rank = 0; rank < ranks_.size(); ++rank) {
      if (ids_[static_cast<size_t>(rank)].empty()) without.push_back(rank);
    }
    if (!without.empty()) {
      Add(Skipped(kCheck, absl::StrCat("no usable GPU: ", NameRanks(without))));
      return absl::OkStatus();
    }
    const int version = NcclVersionCode(*backend_).value_or(0);
    Add(JudgeNccl(NcclHeaderVersionCode(), version));
    if (ranks_.size() == 1) {
      Add(Skipped(kCheck, "there is one rank"));
      return absl::OkStatus();
    }
    std::vector<RankDevice> all;
    CpuStream stream;
    std::vector<int> versions(ids_.size());
    LF_RETURN_IF_ERROR(ranks_.communicator->AllGather(
        &version, versions.data(), std::vector<int64_t>(ids_.size(), int64_t{sizeof(int)}), stream));
    for (size_t rank = 0; rank < ids_.size(); ++rank) all.push_back({ids_[rank], versions[rank]});
    const absl::StatusOr<CommunicatorChoice> choice = ChooseCommunicator(question_.communicator, all);
    if (!choice.ok()) {  // on all ranks alike
      Add(Failed(kCheck, std::string(choice.status().message()),
                 "give --communicator auto, or mend what is named"));
      return absl::OkStatus();
    }
    LF_ASSIGN_OR_RETURN(
        const std::unique_ptr<Communicator> communicator,
        CreateDeviceCommunicator(*choice, question_.communicator.nccl, *ranks_.communicator, *backend_));
    LF_ASSIGN_OR_RETURN(const DeviceExchange exchange,
                        MeasureDeviceExchange(*communicator, *backend_, kExchangeBytes));
    Add(JudgeDeviceExchange(*choice, exchange.bytes_per_second, exchange.wrong));
    return absl::OkStatus();
  }

  const Ranks& ranks_;
  const GpuQuestion& question_;
  Findings& findings_;
  std::vector<CudaDeviceFacts> devices_;
  std::shared_ptr<Backend> backend_;
  std::vector<std::string> ids_;  // of the GPUs, by rank; empty: none that can be used
};

}  // namespace

absl::Status ExamineGpus(const Ranks& ranks, const GpuQuestion& question, Findings& findings) {
  return GpuExamination(ranks, question, findings).Run();
}

}  // namespace longfill
