#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/api/backend.h"
#include "kernels/api/cuda_devices.h"
#include "kernels/cuda/cuda_kernel_set.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/cuda_stream.h"
#include "kernels/cuda/device_limits.h"
#include "kernels/cuda/free_memory.h"
#include "kernels/cuda/peer_access.h"
#include "kernels/cuda/upload.h"

namespace longfill {
namespace {

absl::StatusOr<int> Attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  LF_RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

absl::StatusOr<DeviceLimits> ReadLimits(int device) {
  DeviceLimits limits;
  limits.device = device;
  LF_ASSIGN_OR_RETURN(const int major, Attribute(cudaDevAttrComputeCapabilityMajor, device));
  LF_ASSIGN_OR_RETURN(const int minor, Attribute(cudaDevAttrComputeCapabilityMinor, device));
  limits.compute_capability = 10 * major + minor;
  LF_ASSIGN_OR_RETURN(limits.num_sms, Attribute(cudaDevAttrMultiProcessorCount, device));
  LF_ASSIGN_OR_RETURN(limits.shared_bytes_per_block,
                      Attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  LF_ASSIGN_OR_RETURN(limits.shared_bytes_per_sm,
                      Attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  LF_ASSIGN_OR_RETURN(limits.l2_bytes, Attribute(cudaDevAttrL2CacheSize, device));
  return limits;
}

struct MemoryInfo {
  int64_t free_bytes = 0;
  int64_t total_bytes = 0;
};

// Of the current device.
absl::StatusOr<MemoryInfo> ReadMemoryInfo() {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  LF_RETURN_IF_CUDA_ERROR(cudaMemGetInfo(&free_bytes, &total_bytes));
  return MemoryInfo{static_cast<int64_t>(free_bytes), static_cast<int64_t>(total_bytes)};
}

absl::Status CheckOptions(const CudaBackendOptions& options) {
  if (options.compute_dtype != DType::kBFloat16 && options.compute_dtype != DType::kFloat16) {
    return absl::UnimplementedError(absl::StrCat("the CUDA backend computes in bfloat16 or float16, not in ",
                                                 std::string(DTypeName(options.compute_dtype))));
  }
  LF_ASSIGN_OR_RETURN(const int count, CudaDeviceCount());
  if (options.device < 0 || options.device >= count) {
    return absl::UnavailableError(
        absl::StrCat("there is no CUDA device ", options.device, ": ", count, " visible"));
  }
  return absl::OkStatus();
}

class CudaBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<Backend>> Create(const CudaBackendOptions& options);

  const DeviceFacts& facts() const override { return facts_; }
  KernelSet& kernels() override { return *kernels_; }
  MemoryResource& memory() override { return *memory_; }
  MemoryResource& host_memory() override { return host_memory_; }
  Stream& stream() override { return *stream_; }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    return CudaStream::Create(limits_.device, /*first=*/true);
  }
  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override { return CudaEvent::Create(limits_.device); }

  absl::StatusOr<int64_t> FreeMemoryBytes() override {
    LF_RETURN_IF_ERROR(UseDevice(limits_.device));
    LF_ASSIGN_OR_RETURN(const MemoryInfo info, ReadMemoryInfo());
    LF_ASSIGN_OR_RETURN(const int64_t idle_bytes, memory_->IdleBytes());
    return info.free_bytes + idle_bytes;
  }

  PeerAccess* peers() override { return peers_.get(); }

  absl::Status Health() override {
    LF_RETURN_IF_ERROR(LostDeviceStatus(limits_.device));
    // A device that is lost answers every call with the error that lost it.
    LF_RETURN_IF_ERROR(UseDevice(limits_.device));
    return ReadMemoryInfo().status();
  }

 private:
  explicit CudaBackend(const DeviceLimits& limits) : limits_(limits), host_memory_(limits.device) {}
  absl::Status Start(const CudaBackendOptions& options);
  absl::Status RunFirstKernel();

  const DeviceLimits limits_;
  DeviceFacts facts_;
  PinnedMemoryResource host_memory_;
  std::unique_ptr<CudaStream> stream_;
  std::unique_ptr<CudaMemoryResource> memory_;
  std::unique_ptr<CudaPeerAccess> peers_;
  std::unique_ptr<KernelSet> kernels_;
};

absl::StatusOr<std::unique_ptr<Backend>> CudaBackend::Create(const CudaBackendOptions& options) {
  LF_RETURN_IF_ERROR(CheckOptions(options));
  LF_ASSIGN_OR_RETURN(DeviceLimits limits, ReadLimits(options.device));
  limits.generic_kernels = options.generic_kernels;
  cudaDeviceProp properties = {};
  LF_RETURN_IF_CUDA_ERROR(cudaGetDeviceProperties(&properties, options.device));
  std::string name = absl::StrCat(properties.name, " (sm_", limits.compute_capability, ")");
  if (limits.compute_capability < kMinComputeCapability) {
    return absl::UnimplementedError(absl::StrCat("CUDA device ", options.device, ", ", name, ", is below sm_",
                                                 kMinComputeCapability, ", the least that longfill runs on"));
  }
  std::unique_ptr<CudaBackend> backend(new CudaBackend(limits));
  backend->facts_.name = std::move(name);
  backend->facts_.num_multiprocessors = limits.num_sms;
  backend->facts_.free_bytes_before = FreeBytesWithoutContext(properties.uuid);
  backend->facts_.id = absl::BytesToHexString({properties.uuid.bytes, sizeof(properties.uuid.bytes)});
  LF_RETURN_IF_ERROR(Annotate(backend->Start(options), backend->facts_.name));
  return backend;
}

absl::Status CudaBackend::Start(const CudaBackendOptions& options) {
  LF_RETURN_IF_ERROR(UseDevice(limits_.device));
  LF_ASSIGN_OR_RETURN(const MemoryInfo info, ReadMemoryInfo());
  facts_.memory_bytes = info.total_bytes;
  LF_ASSIGN_OR_RETURN(stream_, CudaStream::Create(limits_.device));
  LF_ASSIGN_OR_RETURN(memory_, CudaMemoryResource::Create(limits_.device, stream_->get()));
  peers_ = std::make_unique<CudaPeerAccess>(limits_.device, *memory_, *stream_, options.peer_host);
  LF_RETURN_IF_ERROR(Annotate(RunFirstKernel(), "the first kernel"));
  LF_ASSIGN_OR_RETURN(kernels_, CreateCudaKernelSet(limits_, options.compute_dtype, *memory_));
  return absl::OkStatus();
}

// Finds a build without code for this device now, not in the middle of a prompt.
absl::Status CudaBackend::RunFirstKernel() {
  const uint32_t word = 1;
  LF_ASSIGN_OR_RETURN(const Buffer place, memory_->Allocate(sizeof(word), "a first word"));
  LF_RETURN_IF_ERROR(Upload(place.data(), &word, sizeof(word), stream_->get()));
  return stream_->Sync();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaBackendOptions& options) {
  return CudaBackend::Create(options);
}

absl::StatusOr<int> CudaDeviceCount() {
  int count = 0;
  LF_RETURN_IF_ERROR(
      Annotate(CudaStatus(cudaGetDeviceCount(&count), "cudaGetDeviceCount"), "no CUDA device can be used"));
  return count;
}

}  // namespace longfill
