#ifndef LONGFILL_KERNELS_CUDA_POLL_H_
#define LONGFILL_KERNELS_CUDA_POLL_H_

#include <cuda_runtime_api.h>

#include <chrono>
#include <functional>
#include <string_view>

#include "kernels/base/status.h"
#include "kernels/base/stream.h"

namespace longfill {

// Asks `query`, which `call` names, until it answers other than cudaErrorNotReady, the thread given up
// between. DeadlineExceeded at the deadline: the calling thread's device hangs, and counts as lost from then
// on (LostDeviceStatus), since what it was given may run at any time.
absl::Status Poll(std::string_view call, const std::function<cudaError_t()>& query,
                  std::chrono::milliseconds deadline = Stream::kDeviceDeadline);

// The runtime keeps cudaErrorNotReady as the thread's last error, where the check of a later launch would
// find it.
void ForgetNotReady();

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_POLL_H_
