#ifndef LONGFILL_KERNELS_CUDA_CUDA_STATUS_H_
#define LONGFILL_KERNELS_CUDA_CUDA_STATUS_H_

// Results of CUDA and cuBLASLt calls as Status values that name the call and the error.

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <string_view>

#include "kernels/base/status.h"

namespace longfill {

// ResourceExhausted: no memory. Unavailable: no driver, no such device. Unimplemented: the device or driver
// does not run this code. Internal: all else; errors after which the device answers nothing any more are
// remembered (LostDeviceStatus). `call` is the name of the function, or the call as it is written. The
// runtime's own record of the error is cleared, so that no later launch reports it again.
absl::Status CudaStatus(cudaError_t error, std::string_view call);
absl::Status CublasStatus(cublasStatus_t status, std::string_view call);

// The calling thread's device for all calls that follow. Costs well under a microsecond.
absl::Status UseDevice(int device);

// The calling thread's device has not answered `call` within the deadline: DeadlineExceeded, and the device
// is lost.
absl::Status HungDevice(std::string_view call, std::chrono::milliseconds deadline);

// The first error that this process saw which a device does not survive; OK while there is none. A lost
// device is lost for every backend of the process.
absl::Status LostDeviceStatus(int device);

#define LF_RETURN_IF_CUDA_ERROR(call) LF_RETURN_IF_ERROR(::longfill::CudaStatus((call), #call))
#define LF_RETURN_IF_CUBLAS_ERROR(call) LF_RETURN_IF_ERROR(::longfill::CublasStatus((call), #call))

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_CUDA_STATUS_H_
