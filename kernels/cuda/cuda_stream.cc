#include "kernels/cuda/cuda_stream.h"

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/poll.h"

namespace longfill {
namespace {

absl::Status OtherDevice(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("a CUDA operation was given ", what, " of the CPU"));
}

}  // namespace

absl::StatusOr<cudaStream_t> CudaStreamOf(Stream& stream) {
  if (stream.device() != DeviceKind::kCuda) return OtherDevice("a stream");
  return static_cast<CudaStream&>(stream).get();
}

absl::StatusOr<int> CudaDeviceOf(Stream& stream) {
  const auto* cuda_stream = dynamic_cast<const CudaStream*>(&stream);
  if (cuda_stream == nullptr) return absl::InvalidArgumentError("the stream is not of CUDA");
  return cuda_stream->ordinal();
}

absl::StatusOr<std::unique_ptr<CudaStream>> CudaStream::Create(int device, bool first) {
  LF_RETURN_IF_ERROR(UseDevice(device));
  cudaStream_t stream = nullptr;
  int least = 0;
  int greatest = 0;
  LF_RETURN_IF_CUDA_ERROR(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  LF_RETURN_IF_CUDA_ERROR(
      cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, first ? greatest : least));
  return std::unique_ptr<CudaStream>(new CudaStream(device, stream));
}

CudaStream::~CudaStream() {
  if (UseDevice(ordinal_).ok()) CudaStatus(cudaStreamDestroy(stream_), "cudaStreamDestroy").IgnoreError();
}

absl::Status CudaStream::Sync() {
  LF_RETURN_IF_ERROR(LostDeviceStatus(ordinal_));
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
  LF_RETURN_IF_ERROR(LostDeviceStatus(ordinal_));
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
