#ifndef LONGFILL_RUNTIME_SCALING_RECORDED_BACKEND_H_
#define LONGFILL_RUNTIME_SCALING_RECORDED_BACKEND_H_

#include <memory>

#include "kernels/api/backend.h"
#include "kernels/base/status.h"
#include "runtime/scaling/step_recorder.h"

namespace longfill {

// A stream of a RecordedBackend, whose calls are steps.
class RecordedStream final : public Stream {
 public:
  // `device` outlives the result where it is not owned.
  RecordedStream(StepRecorder& recorder, int number, Stream& device, std::unique_ptr<Stream> owned = nullptr)
      : recorder_(recorder), number_(number), owned_(std::move(owned)), device_(device) {}

  DeviceKind device() const override { return device_.device(); }
  absl::Status Sync() override;
  absl::Status WaitFor(const Event& event) override;

  int number() const { return number_; }
  Stream& of_device() { return device_; }

 private:
  StepRecorder& recorder_;
  const int number_;
  const std::unique_ptr<Stream> owned_;
  Stream& device_;
};

// A device that does what it is told, while everything that is given to its streams is written down. Its
// streams and events go with one another only. One thread.
class RecordedBackend final : public Backend {
 public:
  explicit RecordedBackend(Backend& device);  // which outlives the result
  ~RecordedBackend() override;

  StepRecorder& recorder() { return recorder_; }
  Backend& of_device() { return device_; }

  const DeviceFacts& facts() const override { return device_.facts(); }
  KernelSet& kernels() override { return *kernels_; }
  MemoryResource& memory() override { return device_.memory(); }
  MemoryResource& host_memory() override { return device_.host_memory(); }
  Stream& stream() override { return stream_; }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override;
  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override;
  absl::StatusOr<int64_t> FreeMemoryBytes() override { return device_.FreeMemoryBytes(); }
  absl::Status Health() override { return device_.Health(); }

 private:
  Backend& device_;
  StepRecorder recorder_;
  RecordedStream stream_;
  const std::unique_ptr<KernelSet> kernels_;
};

// Kernels that write down which stream they were given and which part of the work they are.
std::unique_ptr<KernelSet> RecordKernels(KernelSet& device, StepRecorder& recorder);

}  // namespace longfill

#endif  // LONGFILL_RUNTIME_SCALING_RECORDED_BACKEND_H_
