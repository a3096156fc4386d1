#ifndef LONGFILL_TESTS_UNIT_RUNTIME_FAKE_DEVICE_H_
#define LONGFILL_TESTS_UNIT_RUNTIME_FAKE_DEVICE_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "kernels/api/backend.h"

namespace longfill {

// A queue of work with a thread of its own, as a stream of a GPU has. Work that waits for an event waits for
// what was recorded when the wait was enqueued.
class FakeStream final : public Stream {
 public:
  FakeStream();
  ~FakeStream() override;
  DeviceKind device() const override { return DeviceKind::kCuda; }
  absl::Status Sync() override;
  absl::Status WaitFor(const Event& event) override;
  void Enqueue(std::function<void()> work);

 private:
  void Run();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  int64_t enqueued_ = 0, done_ = 0;
  bool closing_ = false;
  std::thread thread_;
};

// A device that can do nothing but copy, out slowly if asked to. Its memory is the host's.
class FakeDevice final : public Backend {
 public:
  FakeDevice();
  ~FakeDevice() override;

  const DeviceFacts& facts() const override { return facts_; }
  KernelSet& kernels() override { return *kernels_; }
  MemoryResource& memory() override { return memory_; }
  MemoryResource& host_memory() override { return host_memory_; }
  FakeStream& stream() override { return stream_; }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override;
  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override;
  absl::StatusOr<int64_t> FreeMemoryBytes() override { return int64_t{1} << 40; }
  absl::Status Health() override { return absl::OkStatus(); }

  std::atomic<int64_t> copy_microseconds = 0;  // each
  std::atomic<int64_t> copies = 0;
  std::atomic<bool> hangs = false;  // no event is waited for with success
  std::atomic<int64_t> waits_while_hung = 0;
  std::atomic<int64_t> failing_copy = -1;  // the number of the copy that cannot be enqueued

 private:
  class Kernels;
  const DeviceFacts facts_{.name = "fake device", .memory_bytes = int64_t{1} << 40};
  CpuMemoryResource memory_;
  CpuMemoryResource host_memory_;
  std::unique_ptr<KernelSet> kernels_;
  FakeStream stream_;
};

}  // namespace longfill

#endif  // LONGFILL_TESTS_UNIT_RUNTIME_FAKE_DEVICE_H_
