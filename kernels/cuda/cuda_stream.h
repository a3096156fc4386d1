#ifndef LONGFILL_KERNELS_CUDA_CUDA_STREAM_H_
#define LONGFILL_KERNELS_CUDA_CUDA_STREAM_H_

#include <cuda_runtime_api.h>

#include <memory>

#include "kernels/base/status.h"
#include "kernels/base/stream.h"

namespace longfill {

// Waiting asks the device again and again, the thread given up between, so that a device that hangs ends in
// DeadlineExceeded and ranks that share a core do not starve each other.
class CudaStream final : public Stream {
 public:
  // `first`: its kernels get multiprocessors before those of other streams.
  static absl::StatusOr<std::unique_ptr<CudaStream>> Create(int device, bool first = false);
  ~CudaStream() override;  // work given so far still runs
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  DeviceKind device() const override { return DeviceKind::kCuda; }
  absl::Status Sync() override;
  absl::Status WaitFor(const Event& event) override;
  cudaStream_t get() const { return stream_; }
  int ordinal() const { return ordinal_; }  // of its device

 private:
  CudaStream(int ordinal, cudaStream_t stream) : ordinal_(ordinal), stream_(stream) {}
  const int ordinal_;
  const cudaStream_t stream_;
};

class CudaEvent final : public Event {
 public:
  static absl::StatusOr<std::unique_ptr<CudaEvent>> Create(int device);
  ~CudaEvent() override;
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  absl::Status Record(Stream& stream) override;
  absl::StatusOr<bool> Passed() const override;
  absl::Status Wait() const override;
  absl::StatusOr<double> SecondsSince(const Event& earlier) const override;
  cudaEvent_t get() const { return event_; }

 private:
  CudaEvent(int ordinal, cudaEvent_t event) : ordinal_(ordinal), event_(event) {}
  const int ordinal_;
  const cudaEvent_t event_;
};

// The stream behind the interface; InvalidArgument for a stream of another kind of device.
absl::StatusOr<cudaStream_t> CudaStreamOf(Stream& stream);
// The ordinal of its device; InvalidArgument for a stream that is not of CUDA, whatever it says of itself.
absl::StatusOr<int> CudaDeviceOf(Stream& stream);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_CUDA_CUDA_STREAM_H_
