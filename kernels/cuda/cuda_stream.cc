#include "kernels/cuda/cuda_stream.h"

#include <chrono>
#include <thread>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_status.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds kYieldTime{200};  // most waits of a prefill's tail end within it
constexpr std::chrono::microseconds kSleep{50};

// The runtime keeps this answer as the thread's last error, where the check of a later launch would find it.
void ForgetNotReady() { cudaGetLastError(); }

// Asks `query` until it answers other than cudaErrorNotReady.
template <typename Query>
absl::Status Poll(const char* call, const Query& query) {
  const Clock::time_point begin = Clock::now();
  for (;;) {
    const cudaError_t answer = query();
    if (answer != cudaErrorNotReady) return CudaStatus(answer, call);
    ForgetNotReady();
    const Clock::duration waited = Clock::now() - begin;
    if (waited > Stream::kDeviceDeadline) {
      return absl::DeadlineExceededError(absl::StrCat(call, ": the device has not finished its work after ",
                                                      Stream::kDeviceDeadline.count(), " s"));
    }
    if (waited < kYieldTime) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kSleep);
    }
  }
}

absl::Status OtherDevice(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("a CUDA operation was given ", what, " of the CPU"));
}

}  // namespace

absl::StatusOr<cudaStream_t> CudaStreamOf(Stream& stream) {
  if (stream.device() != DeviceKind::kCuda) return OtherDevice("a stream");
  return static_cast<CudaStream&>(stream).get();
}

absl::StatusOr<std::unique_ptr<CudaStream>> CudaStream::Create(int device) {
  LF_RETURN_IF_ERROR(UseDevice(device));
  cudaStream_t stream = nullptr;
  LF_RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return std::unique_ptr<CudaStream>(new CudaStream(device, stream));
}

CudaStream::~CudaStream() {
  if (UseDevice(ordinal_).ok()) CudaStatus(cudaStreamDestroy(stream_), "cudaStreamDestroy").IgnoreError();
}

absl::Status CudaStream::Sync() {
  LF_RETURN_IF_ERROR(UseDevice(ordinal_));
  return Poll("cudaStreamQuery", [this] { return cudaStreamQuery(stream_); });
}

absl::Status CudaStream::WaitFor(const Event& event) {
  const auto* cuda_event = dynamic_cast<const CudaEvent*>(&event);
  if (cuda_event == nullptr) return OtherDevice("an event");
  LF_RETURN_IF_ERROR(UseDevice(ordinal_));
  return CudaStatus(cudaStreamWaitEvent(stream_, cuda_event->get(), 0), "cudaStreamWaitEvent");
}

absl::StatusOr<std::unique_ptr<CudaEvent>> CudaEvent::Create(int device) {
  LF_RETURN_IF_ERROR(UseDevice(device));
  cudaEvent_t event = nullptr;
  LF_RETURN_IF_CUDA_ERROR(cudaEventCreateWithFlags(&event, cudaEventDefault));
  return std::unique_ptr<CudaEvent>(new CudaEvent(device, event));
}

CudaEvent::~CudaEvent() {
  if (UseDevice(ordinal_).ok()) CudaStatus(cudaEventDestroy(event_), "cudaEventDestroy").IgnoreError();
}

absl::Status CudaEvent::Record(Stream& stream) {
  LF_ASSIGN_OR_RETURN(const cudaStream_t cuda_stream, CudaStreamOf(stream));
  LF_RETURN_IF_ERROR(UseDevice(ordinal_));
  return CudaStatus(cudaEventRecord(event_, cuda_stream), "cudaEventRecord");
}

absl::StatusOr<bool> CudaEvent::Passed() const {
  LF_RETURN_IF_ERROR(UseDevice(ordinal_));
  const cudaError_t answer = cudaEventQuery(event_);
  if (answer == cudaErrorNotReady) {
    ForgetNotReady();
    return false;
  }
  LF_RETURN_IF_ERROR(CudaStatus(answer, "cudaEventQuery"));
  return true;
}

absl::Status CudaEvent::Wait() const {
  LF_RETURN_IF_ERROR(UseDevice(ordinal_));
  return Poll("cudaEventQuery", [this] { return cudaEventQuery(event_); });
}

absl::StatusOr<double> CudaEvent::SecondsSince(const Event& earlier) const {
  const auto* cuda_event = dynamic_cast<const CudaEvent*>(&earlier);
  if (cuda_event == nullptr) return OtherDevice("an event");
  LF_RETURN_IF_ERROR(UseDevice(ordinal_));
  float milliseconds = 0;
  LF_RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&milliseconds, cuda_event->get(), event_));
  return static_cast<double>(milliseconds) * 1e-3;
}

}  // namespace longfill
