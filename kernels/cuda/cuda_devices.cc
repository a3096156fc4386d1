#include "kernels/api/cuda_devices.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/api/backend.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/cuda_stream.h"

namespace longfill {
namespace {

constexpr int kPeerCopies = 4;  // the first one warms up

// Memory of one device.
class DeviceBlock {
 public:
  static absl::StatusOr<DeviceBlock> Allocate(int device, int64_t bytes) {
    LF_RETURN_IF_ERROR(UseDevice(device));
    void* data = nullptr;
    LF_RETURN_IF_CUDA_ERROR(cudaMalloc(&data, static_cast<size_t>(bytes)));
    return DeviceBlock(device, data);
  }
  DeviceBlock(DeviceBlock&& other) noexcept
      : device_(other.device_), data_(std::exchange(other.data_, nullptr)) {}
  DeviceBlock& operator=(DeviceBlock&&) = delete;
  ~DeviceBlock() {
    if (data_ != nullptr && UseDevice(device_).ok()) cudaFree(data_);
  }
  void* data() const { return data_; }

 private:
  DeviceBlock(int device, void* data) : device_(device), data_(data) {}
  int device_;
  void* data_;
};

// Whether `from` reaches `to`, without which a copy goes through the host.
absl::StatusOr<bool> CanReach(int from, int to) {
  int can = 0;
  LF_RETURN_IF_CUDA_ERROR(cudaDeviceCanAccessPeer(&can, from, to));
  return can != 0;
}

absl::Status OpenWay(int from, int to) {
  LF_ASSIGN_OR_RETURN(const bool can, CanReach(from, to));
  if (!can) return absl::OkStatus();
  LF_RETURN_IF_ERROR(UseDevice(from));
  const cudaError_t error = cudaDeviceEnablePeerAccess(to, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();  // else the next launch would report it
    return absl::OkStatus();
  }
  return CudaStatus(error, "cudaDeviceEnablePeerAccess");
}

}  // namespace

absl::StatusOr<CudaVersions> ReadCudaVersions() {
  CudaVersions versions;
  LF_RETURN_IF_CUDA_ERROR(cudaDriverGetVersion(&versions.driver));
  LF_RETURN_IF_CUDA_ERROR(cudaRuntimeGetVersion(&versions.runtime));
  return versions;
}

absl::StatusOr<std::vector<CudaDeviceFacts>> ListCudaDevices() {
  LF_ASSIGN_OR_RETURN(const int count, CudaDeviceCount());
  std::vector<CudaDeviceFacts> devices;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties = {};
    LF_RETURN_IF_CUDA_ERROR(cudaGetDeviceProperties(&properties, device));
    CudaDeviceFacts facts;
    facts.name = properties.name;
    facts.id = absl::BytesToHexString({properties.uuid.bytes, sizeof(properties.uuid.bytes)});
    facts.compute_capability = 10 * properties.major + properties.minor;
    facts.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    facts.ecc = properties.ECCEnabled != 0;
    for (int other = 0; other < count; ++other) {
      bool reaches = other == device;
      if (!reaches) {
        LF_ASSIGN_OR_RETURN(reaches, CanReach(device, other));
      }
      facts.reaches.push_back(reaches);
    }
    devices.push_back(std::move(facts));
  }
  return devices;
}

absl::StatusOr<double> MeasurePeerCopy(int from, int to, int64_t bytes) {
  LF_RETURN_IF_ERROR(OpenWay(from, to));
  LF_ASSIGN_OR_RETURN(const DeviceBlock target, DeviceBlock::Allocate(to, bytes));
  LF_ASSIGN_OR_RETURN(const DeviceBlock source, DeviceBlock::Allocate(from, bytes));  // current from here on
  LF_ASSIGN_OR_RETURN(const std::unique_ptr<CudaStream> stream, CudaStream::Create(from));
  LF_ASSIGN_OR_RETURN(const std::unique_ptr<CudaEvent> start, CudaEvent::Create(from));
  LF_ASSIGN_OR_RETURN(const std::unique_ptr<CudaEvent> end, CudaEvent::Create(from));
  double best = 0;
  for (int copy = 0; copy < kPeerCopies; ++copy) {
    LF_RETURN_IF_ERROR(UseDevice(from));
    LF_RETURN_IF_ERROR(start->Record(*stream));
    LF_RETURN_IF_CUDA_ERROR(cudaMemcpyPeerAsync(target.data(), to, source.data(), from,
                                                static_cast<size_t>(bytes), stream->get()));
    LF_RETURN_IF_ERROR(end->Record(*stream));
    LF_RETURN_IF_ERROR(end->Wait());
    LF_ASSIGN_OR_RETURN(const double seconds, end->SecondsSince(*start));
    if (copy > 0) best = std::max(best, static_cast<double>(bytes) / std::max(seconds, 1e-9));
  }
  return best;
}

}  // namespace longfill
