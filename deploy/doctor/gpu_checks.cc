#include "deploy/doctor/gpu_checks.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "parallel/nccl_communicator.h"

namespace longfill {
namespace {

constexpr int kFirstNccl = 22800;      // parallel/nccl.cmake
constexpr double kSlowHostCopy = 8e9;  // bytes per second; PCIe 4 x16 has about 25, PCIe 5 x16 55
constexpr double kSlowPeerCopy = 8e9;
constexpr double kUneven = 2;  // times slower than the fastest
constexpr double kSlowExchange = 1e9;

std::string Rate(double bytes_per_second) { return Scaled(bytes_per_second, "B/s"); }
std::string Bytes(int64_t bytes) { return Scaled(static_cast<double>(bytes), "B"); }
std::string CudaText(int version) { return absl::StrCat(version / 1000, ".", version % 1000 / 10); }

}  // namespace

Finding JudgeDriver(const CudaVersions& versions) {
  constexpr char kCheck[] = "cuda.driver";
  const std::string built = absl::StrCat("longfill is built with CUDA ", CudaText(versions.runtime));
  if (versions.driver == 0) {
    return Failed(
        kCheck, absl::StrCat("there is no driver; ", built),
        "install NVIDIA's driver; in a container start it with --gpus all (nvidia-container-toolkit)");
  }
  const std::string value = absl::StrCat("the driver serves CUDA ", CudaText(versions.driver), "; ", built);
  if (versions.driver / 1000 < versions.runtime / 1000) {
    return Failed(kCheck, value, "update the driver, or build longfill with the older CUDA toolkit");
  }
  // Minor versions are compatible but for code that the driver compiles (CUDA compatibility guide).
  if (versions.driver < versions.runtime) {
    return Warning(kCheck, value, "update the driver: it cannot compile kernels of the newer toolkit");
  }
  return Ok(kCheck, value);
}

Finding JudgeDevice(int ordinal, const CudaDeviceFacts& device) {
  const std::string value =
      absl::StrCat("GPU ", ordinal, ", ", device.name, " (sm_", device.compute_capability, "), ",
                   Bytes(device.memory_bytes), ", ECC ", device.ecc ? "on" : "off");
  if (device.compute_capability < kMinComputeCapability) {
    return Failed("cuda.device", value,
                  absl::StrCat("longfill needs sm_", kMinComputeCapability,
                               " (A100) or newer: hide this GPU with CUDA_VISIBLE_DEVICES"));
  }
  return Ok("cuda.device", value);
}

Finding JudgeSharing(const std::vector<std::string>& ids, int visible) {
  std::map<std::string, int> ranks_of;
  for (const std::string& id : ids) ++ranks_of[id];
  const int most = std::max_element(ranks_of.begin(), ranks_of.end(), [](const auto& a, const auto& b) {
                     return a.second < b.second;
                   })->second;
  const auto used = static_cast<int>(ranks_of.size());
  const std::string value = absl::StrCat(ids.size(), " ranks on ", used, " GPUs, ", visible, " visible");
  if (most == 1) return Ok("cuda.sharing", value);
  if (used < visible) {
    return Warning(
        "cuda.sharing", value,
        "ranks share a GPU while others idle: give --device cuda without a number, which deals them out");
  }
  return Warning(
      "cuda.sharing", value,
      absl::StrCat("up to ", most,
                   " ranks share a GPU, its memory and its time, and exchange through "
                   "host memory: start one rank for each GPU, or check CUDA_VISIBLE_DEVICES and --gpus"));
}

Finding JudgeDeviceMemory(int64_t free_bytes, int ranks_on_device, int64_t weights_bytes) {
  const int64_t share = free_bytes / std::max(1, ranks_on_device);
  std::string value = absl::StrCat(Bytes(share), " free for each of ", ranks_on_device,
                                   ranks_on_device == 1 ? " rank" : " ranks", " on the GPU");
  if (weights_bytes > 0) absl::StrAppend(&value, ", weights take ", Bytes(weights_bytes));
  if (weights_bytes > share) {
    return Failed(
        "cuda.memory", value,
        "the model does not fit: --weights sharded, more GPUs, or end what else uses them (nvidia-smi)");
  }
  return Ok("cuda.memory", value);
}

Finding JudgeHostCopy(const HostCopyRates& rates) {
  const std::string value =
      absl::StrCat(Rate(rates.to_device), " to the GPU, ", Rate(rates.to_host), " back, page-locked");
  if (!rates.intact) {
    return Failed("cuda.host_copy", "bytes came back changed",
                  "the GPU, its slot or the memory is defective: look at dmesg for Xid messages");
  }
  if (std::min(rates.to_device, rates.to_host) < kSlowHostCopy) {
    return Warning(
        "cuda.host_copy", value,
        "the slot has fewer or slower lanes than the GPU (nvidia-smi -q -d PCI), or the rank runs on the "
        "other socket: bind it to the GPU's NUMA node");
  }
  return Ok("cuda.host_copy", value);
}

Finding JudgePeers(const std::vector<PeerRate>& peers) {
  constexpr char kCheck[] = "cuda.peer_copy";
  if (peers.empty()) return Skipped(kCheck, "this rank sees one GPU");
  const auto [slow, fast] = std::minmax_element(
      peers.begin(), peers.end(),
      [](const PeerRate& a, const PeerRate& b) { return a.bytes_per_second < b.bytes_per_second; });
  const auto direct =
      std::count_if(peers.begin(), peers.end(), [](const PeerRate& peer) { return peer.direct; });
  const std::string value =
      absl::StrCat(Rate(slow->bytes_per_second), " (GPU ", slow->from, " to ", slow->to, ") to ",
                   Rate(fast->bytes_per_second), ", ", direct, " of ", peers.size(), " ways direct");
  if (direct < static_cast<int64_t>(peers.size())) {
    return Warning(
        kCheck, value,
        "copies go through the host: nvidia-smi topo -m shows how GPUs are joined; ACS and IOMMU of the "
        "host must allow peer access, and virtual machines need both GPUs passed through together");
  }
  if (slow->bytes_per_second < kSlowPeerCopy || slow->bytes_per_second * kUneven < fast->bytes_per_second) {
    return Warning(kCheck, value,
                   "some GPUs are joined by a slower way than others: see nvidia-smi topo -m and nvlink -s");
  }
  return Ok(kCheck, value);
}

Finding JudgeNccl(int header_version, int library_version) {
  constexpr char kCheck[] = "nccl.version";
  if (header_version == 0) {
    return Skipped(kCheck,
                   "this build has no NCCL (CMake option LONGFILL_NCCL): GPUs exchange through host memory");
  }
  const std::string compiled = absl::StrCat("compiled with ", NcclVersionText(header_version));
  if (library_version == 0) {
    return Failed(kCheck, absl::StrCat("the library does not say its version; ", compiled),
                  "install libnccl2 where the loader finds it");
  }
  const std::string value = absl::StrCat(NcclVersionText(library_version), ", ", compiled);
  if (library_version < kFirstNccl || library_version / 10000 != header_version / 10000) {
    return Failed(kCheck, value,
                  absl::StrCat("longfill needs NCCL ", NcclVersionText(kFirstNccl),
                               " or newer of the same major "
                               "version: LD_LIBRARY_PATH finds another one first"));
  }
  if (library_version < header_version) {
    return Warning(kCheck, value,
                   "an older library is found than the one compiled with: see LD_LIBRARY_PATH");
  }
  return Ok(kCheck, value);
}

Finding JudgeDeviceExchange(const CommunicatorChoice& choice, double bytes_per_second,
                            std::string_view wrong) {
  constexpr char kCheck[] = "exchange.device";
  const bool nccl = choice.kind == CommunicatorKind::kNccl;
  const std::string how = absl::StrCat(nccl ? "NCCL" : "through host memory", " (", choice.reason, ")");
  if (!wrong.empty()) {
    return Failed(kCheck, absl::StrCat(how, ": ", std::string(wrong)),
                  "exchanged data is corrupt: try --communicator mpi, and look at dmesg for Xid messages");
  }
  const std::string value = absl::StrCat(how, ", ", Rate(bytes_per_second), " into the slowest rank");
  if (bytes_per_second < kSlowExchange) {
    return Warning(
        kCheck, value,
        nccl ? "NCCL_DEBUG=INFO shows which network it uses; NCCL_SOCKET_IFNAME and NCCL_IB_HCA name one"
             : "give every rank a GPU of its own and every host one NCCL, so that NCCL is used");
  }
  return Ok(kCheck, value);
}

}  // namespace longfill
