#include "kernels/cuda/cuda_status.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <string>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

constexpr int kMaxDevices = 64;  // of one process; devices beyond share the last place
std::array<std::atomic<int>, kMaxDevices> lost_devices{};  // cudaError_t of each, 0 while it works
thread_local int current_device = 0;

std::atomic<int>& LostError(int device) { return lost_devices[std::min(device, kMaxDevices - 1)]; }

absl::string_view CallName(std::string_view call) {
  const std::string_view name = call.substr(0, call.find('('));
  return {name.data(), name.size()};
}

// The first error stays.
void RecordLost(cudaError_t error) {
  int none = cudaSuccess;
  LostError(current_device).compare_exchange_strong(none, error);
}

bool LosesDevice(cudaError_t error) {
  switch (error) {
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorContextIsDestroyed:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorUnknown:
      return true;
    default:
      return false;
  }
}

absl::StatusCode CodeOf(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::StatusCode::kResourceExhausted;
    case cudaErrorInitializationError:
    case cudaErrorCudartUnloading:
    case cudaErrorStubLibrary:
    case cudaErrorInsufficientDriver:
    case cudaErrorDevicesUnavailable:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorSystemNotReady:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
      return absl::StatusCode::kUnavailable;
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorNotSupported:
      return absl::StatusCode::kUnimplemented;
    default:
      return absl::StatusCode::kInternal;
  }
}

}  // namespace

absl::Status CudaStatus(cudaError_t error, std::string_view call) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();
  const bool lost = LosesDevice(error);
  if (lost) RecordLost(error);
  std::string message =
      absl::StrCat(CallName(call), ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
  if (lost) absl::StrAppend(&message, "; device ", current_device, " is lost to this process");
  return absl::Status(CodeOf(error), message);
}

absl::Status CublasStatus(cublasStatus_t status, std::string_view call) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  absl::StatusCode code = absl::StatusCode::kInternal;
  if (status == CUBLAS_STATUS_ALLOC_FAILED) code = absl::StatusCode::kResourceExhausted;
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_ARCH_MISMATCH) {
    code = absl::StatusCode::kUnimplemented;
  }
  return absl::Status(code, absl::StrCat(CallName(call), ": ", cublasLtGetStatusName(status), ", ",
                                         cublasLtGetStatusString(status)));
}

absl::Status UseDevice(int device) {
  current_device = device;
  return CudaStatus(cudaSetDevice(device), "cudaSetDevice");
}

absl::Status HungDevice(std::string_view call, std::chrono::milliseconds deadline) {
  RecordLost(cudaErrorLaunchTimeout);
  return absl::DeadlineExceededError(absl::StrCat(CallName(call), ": device ", current_device,
                                                  " has not finished its work after ", deadline.count(),
                                                  " ms; it is lost to this process"));
}

absl::Status LostDeviceStatus(int device) {
  const auto error = static_cast<cudaError_t>(LostError(device).load());
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("device ", device, " is lost to this process: ",
                                          cudaGetErrorName(error), ", ", cudaGetErrorString(error)));
}

}  // namespace longfill
