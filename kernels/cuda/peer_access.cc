#include "kernels/cuda/peer_access.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/cuda_stream.h"

namespace longfill {
namespace {

// A handle is of the driver's allocation unit: smaller buffers would share one.
constexpr int64_t kUnitBytes = int64_t{2} << 20;

struct HandleText {
  char boot_id[36] = {};  // of the host
  uint64_t process = 0;   // ThisProcess there
  int32_t device = 0;     // its ordinal there
  const void* data = nullptr;
  cudaIpcMemHandle_t memory = {};
};

absl::Status ReadBootId(char (&id)[36]) {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  if (file.read(id, sizeof(id))) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "/proc/sys/kernel/random/boot_id, by which ranks know their host, is not there");
}

// Process ids repeat in containers.
uint64_t ThisProcess() {
  static const uint64_t number = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  return number;
}

absl::Status NoWay(const absl::Status& why, int device) {
  if (absl::IsResourceExhausted(why) || !LostDeviceStatus(device).ok()) return why;
  return absl::FailedPreconditionError(
      absl::StrCat("memory cannot be shared with peers: ", std::string(why.message())));
}

}  // namespace

void* SharedCudaMemoryResource::TryAllocate(int64_t size_bytes) {
  void* data = nullptr;
  const int64_t whole = (size_bytes + kUnitBytes - 1) / kUnitBytes * kUnitBytes;
  return CudaStatus(cudaMalloc(&data, static_cast<size_t>(whole)), "cudaMalloc").ok() ? data : nullptr;
}

void* SharedCudaMemoryResource::DoAllocate(int64_t size_bytes) {
  if (!UseDevice(device_).ok()) return nullptr;
  if (void* data = TryAllocate(size_bytes); data != nullptr) return data;
  if (!stream_.Sync().ok()) return nullptr;  // with its deadline, which Trim and cudaMalloc have not
  return pool_.Trim().ok() ? TryAllocate(size_bytes) : nullptr;
}

void SharedCudaMemoryResource::DoDeallocate(void* data, int64_t /*size_bytes*/) {
  // It waits for the device, and one that is lost may never answer. A failure means a lost device, which
  // CudaStatus remembers.
  if (!LostDeviceStatus(device_).ok() || !UseDevice(device_).ok()) return;
  CudaStatus(cudaFree(data), "cudaFree").IgnoreError();
}

absl::Status SharedCudaMemoryResource::DeviceHealth() const { return LostDeviceStatus(device_); }

absl::StatusOr<std::string> CudaPeerAccess::Host() {
  if (!host_.empty()) return host_;
  HandleText text{};
  LF_RETURN_IF_ERROR(ReadBootId(text.boot_id));
  return std::string(text.boot_id, sizeof(text.boot_id));
}

absl::StatusOr<std::string> CudaPeerAccess::Handle(const Buffer& buffer) {
  LF_RETURN_IF_ERROR(UseDevice(device_));
  HandleText text{};
  text.process = ThisProcess();
  text.device = device_;
  text.data = buffer.data();
  LF_RETURN_IF_ERROR(ReadBootId(text.boot_id));
  if (buffer.data() != nullptr) {
    const absl::Status status =
        CudaStatus(cudaIpcGetMemHandle(&text.memory, buffer.data()), "cudaIpcGetMemHandle");
    if (!status.ok()) return NoWay(status, device_);
  }
  return std::string(reinterpret_cast<const char*>(&text), sizeof(text));
}

absl::StatusOr<const void*> CudaPeerAccess::Open(std::string_view handle) {
  HandleText text{};
  if (handle.size() != sizeof(text))
    return absl::InvalidArgumentError("this is no handle of a peer's memory");
  std::memcpy(&text, handle.data(), sizeof(text));
  HandleText mine{};
  LF_RETURN_IF_ERROR(ReadBootId(mine.boot_id));
  if (std::memcmp(mine.boot_id, text.boot_id, sizeof(mine.boot_id)) != 0) {
    return absl::FailedPreconditionError("a peer's memory cannot be read: it is on another host");
  }
  LF_RETURN_IF_ERROR(UseDevice(device_));
  if (text.data == nullptr) return text.data;
  if (text.process == ThisProcess()) {
    if (text.device == device_) return text.data;
    const cudaError_t enabled = cudaDeviceEnablePeerAccess(text.device, 0);
    if (enabled == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();  // or the next launch would report it
      return text.data;
    }
    if (const absl::Status status = CudaStatus(enabled, "cudaDeviceEnablePeerAccess"); !status.ok())
      return NoWay(status, device_);
    return text.data;
  }
  void* opened = nullptr;
  const absl::Status status = CudaStatus(
      cudaIpcOpenMemHandle(&opened, text.memory, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
  if (!status.ok()) return NoWay(status, device_);
  const std::lock_guard<std::mutex> lock(mutex_);
  mapped_.insert(opened);
  return opened;
}

absl::Status CudaPeerAccess::Close(const void* opened) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (mapped_.erase(opened) == 0) return absl::OkStatus();  // of this process
  }
  LF_RETURN_IF_ERROR(UseDevice(device_));
  return CudaStatus(cudaIpcCloseMemHandle(const_cast<void*>(opened)), "cudaIpcCloseMemHandle");
}

absl::Status CudaPeerAccess::Copy(const Copy2DParams& params, Stream& stream) {
  if (params.planes != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("a copy from a peer of ", params.planes, " planes, it brings one"));
  }
  if (params.rows == 0 || params.row_bytes == 0) return absl::OkStatus();
  LF_ASSIGN_OR_RETURN(const cudaStream_t cuda_stream, CudaStreamOf(stream));
  LF_RETURN_IF_ERROR(UseDevice(device_));
  return CudaStatus(
      cudaMemcpy2DAsync(params.to, static_cast<size_t>(params.to_pitch), params.from,
                        static_cast<size_t>(params.from_pitch), static_cast<size_t>(params.row_bytes),
                        static_cast<size_t>(params.rows), cudaMemcpyDefault, cuda_stream),
      "cudaMemcpy2DAsync");
}

}  // namespace longfill
