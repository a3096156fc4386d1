#include "kernels/cuda/poll.h"

#include <thread>

#include "kernels/cuda/cuda_status.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds kYieldTime{200};  // most waits of a prefill's tail end within it
constexpr std::chrono::microseconds kSleep{50};

}  // namespace

void ForgetNotReady() { cudaGetLastError(); }

absl::Status Poll(std::string_view call, const std::function<cudaError_t()>& query,
                  std::chrono::milliseconds deadline) {
  const Clock::time_point begin = Clock::now();
  for (;;) {
    const cudaError_t answer = query();
    if (answer != cudaErrorNotReady) return CudaStatus(answer, call);
    ForgetNotReady();
    const Clock::duration waited = Clock::now() - begin;
    if (waited >= deadline) return HungDevice(call, deadline);
    if (waited < kYieldTime) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kSleep);
    }
  }
}

}  // namespace longfill
