#include "tests/unit/runtime/fake_device.h"

#include <cstring>
#include <utility>

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;

// One Record of an event: passed once the stream has come to it.
struct Mark {
  std::mutex mutex;
  std::condition_variable changed;
  bool passed = false;
  Clock::time_point time;

  void Pass() {
    const std::lock_guard lock(mutex);
    passed = true;
    time = Clock::now();
    changed.notify_all();
  }
  bool Wait() {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, std::chrono::seconds(30), [this] { return passed; });
  }
};

class FakeEvent final : public Event {
 public:
  explicit FakeEvent(FakeDevice& device) : device_(device) {}
  absl::Status Record(Stream& stream) override {
    auto mark = std::make_shared<Mark>();
    {
      const std::lock_guard lock(mutex_);
      mark_ = mark;
    }
    static_cast<FakeStream&>(stream).Enqueue([mark] { mark->Pass(); });
    return absl::OkStatus();
  }
  absl::StatusOr<bool> Passed() const override {
    const std::shared_ptr<Mark> now = mark();
    if (now == nullptr) return true;
    const std::lock_guard lock(now->mutex);
    return now->passed;
  }
  absl::Status Wait() const override {
    if (device_.hangs) {
      ++device_.waits_while_hung;
      return absl::DeadlineExceededError("the fake device hangs");
    }
    const std::shared_ptr<Mark> now = mark();
    if (now == nullptr || now->Wait()) return absl::OkStatus();
    return absl::DeadlineExceededError("fake event");
  }
  absl::StatusOr<double> SecondsSince(const Event& earlier) const override {
    return std::chrono::duration<double>(mark()->time - static_cast<const FakeEvent&>(earlier).mark()->time)
        .count();
  }
  std::shared_ptr<Mark> mark() const {
    const std::lock_guard lock(mutex_);
    return mark_;
  }

 private:
  FakeDevice& device_;
  mutable std::mutex mutex_;
  std::shared_ptr<Mark> mark_;
};

absl::Status CannotDo() { return absl::UnimplementedError("the fake device only copies"); }

}  // namespace

FakeStream::FakeStream() : thread_([this] { Run(); }) {}

FakeStream::~FakeStream() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void FakeStream::Enqueue(std::function<void()> work) {
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    ++enqueued_;
  }
  changed_.notify_all();
}

absl::Status FakeStream::Sync() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return done_ == enqueued_; });
  return absl::OkStatus();
}

absl::Status FakeStream::WaitFor(const Event& event) {
  const std::shared_ptr<Mark> mark = static_cast<const FakeEvent&>(event).mark();
  if (mark != nullptr) Enqueue([mark] { mark->Wait(); });
  return absl::OkStatus();
}

void FakeStream::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return closing_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const std::function<void()> work = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    work();
    lock.lock();
    ++done_;
    changed_.notify_all();
  }
}

class FakeDevice::Kernels final : public KernelSet {
 public:
  explicit Kernels(FakeDevice* device) : device_(device) {}

  std::string_view name() const override { return "fake"; }
  DeviceKind device() const override { return DeviceKind::kCuda; }
  DType compute_dtype() const override { return DType::kBFloat16; }
  MemoryResource& memory() override { return device_->memory_; }
  int64_t preferred_rows() const override { return 128; }

  absl::Status CopyOut(void* host, const void* from, int64_t bytes, Stream& stream) override {
    if (device_->copies++ == device_->failing_copy)
      return absl::InternalError("this copy cannot be enqueued");
    static_cast<FakeStream&>(stream).Enqueue([device = device_, host, from, bytes] {
      std::this_thread::sleep_for(std::chrono::microseconds(device->copy_microseconds));
      std::memcpy(host, from, static_cast<size_t>(bytes));
    });
    return absl::OkStatus();
  }

  absl::Status CopyIn(void*, const void*, int64_t, Stream&) override { return CannotDo(); }
  absl::Status Copy2D(const Copy2DParams& params, Stream& stream) override {
    if (params.planes != 1) return CannotDo();
    static_cast<FakeStream&>(stream).Enqueue([params] {
      for (int64_t row = 0; row < params.rows; ++row) {
        std::memcpy(static_cast<char*>(params.to) + row * params.to_pitch,
                    static_cast<const char*>(params.from) + row * params.from_pitch,
                    static_cast<size_t>(params.row_bytes));
      }
    });
    return absl::OkStatus();
  }
  absl::Status Zero(void* data, int64_t bytes, Stream& stream) override {
    static_cast<FakeStream&>(stream).Enqueue(
        [data, bytes] { std::memset(data, 0, static_cast<size_t>(bytes)); });
    return absl::OkStatus();
  }
  absl::Status FillRandom(const FillRandomParams&, Stream&) override { return CannotDo(); }
  absl::Status Embed(const EmbedParams&, Stream&) override { return CannotDo(); }
  absl::Status RmsNorm(const RmsNormParams&, Stream&) override { return CannotDo(); }
  int64_t GemmWorkspaceBytes(int64_t, int64_t, int64_t) const override { return 0; }
  absl::Status Gemm(const GemmParams&, Workspace, Stream&) override { return CannotDo(); }
  absl::Status GatedActivation(const GatedActivationParams&, Stream&) override { return CannotDo(); }
  absl::Status Rotary(const RotaryParams&, Stream&) override { return CannotDo(); }
  int64_t AttentionWorkspaceBytes(const AttentionBounds&) const override { return 0; }
  absl::Status Attention(const AttentionParams&, Workspace, Stream&) override { return CannotDo(); }
  int64_t LastQueryWorkspaceBytes(int64_t, int64_t, int64_t) const override { return 0; }
  absl::Status LastQueryRowMax(const LastQueryParams&, float*, Workspace, Stream&) override {
    return CannotDo();
  }
  absl::Status LastQueryRowSum(const LastQueryParams&, const float*, uint64_t*, Workspace, Stream&) override {
    return CannotDo();
  }
  absl::Status LastQueryScore(const LastQueryParams&, const float*, const uint64_t*, const LastQueryScores&,
                              Workspace, Stream&) override {
    return CannotDo();
  }
  absl::Status JoinScores(const JoinScoresParams&, Stream&) override { return CannotDo(); }
  absl::Status SelectionStart(std::span<const int64_t>, SelectionCut*, Stream&) override {
    return CannotDo();
  }
  absl::Status SelectionHistogram(const SelectionLists&, int, const SelectionCut*, uint64_t*,
                                  Stream&) override {
    return CannotDo();
  }
  absl::Status SelectionAdvance(int64_t, int, const uint64_t*, SelectionCut*, Stream&) override {
    return CannotDo();
  }
  absl::Status SelectionMark(const SelectionLists&, const SelectionCut*, uint64_t*, int64_t,
                             Stream&) override {
    return CannotDo();
  }
  int64_t BuildIndexWorkspaceBytes(int64_t, int64_t) const override { return 0; }
  absl::Status BuildIndex(const BuildIndexParams&, Workspace, Stream&) override { return CannotDo(); }
  int64_t CountPairsWorkspaceBytes(int64_t, int64_t) const override { return 0; }
  absl::Status CountPairs(const CountPairsParams&, Workspace, Stream&) override { return CannotDo(); }
  absl::Status Pool(const PoolParams&, Stream&) override { return CannotDo(); }
  int64_t SelectBlocksWorkspaceBytes(int64_t, int64_t, int64_t) const override { return 0; }
  absl::Status SelectBlocks(const SelectBlocksParams&, Workspace, Stream&) override { return CannotDo(); }
  absl::Status Representatives(const RepresentativesParams&, Stream&) override { return CannotDo(); }
  absl::Status CoarseRepresentatives(const CoarseRepresentativesParams&, Stream&) override {
    return CannotDo();
  }
  int64_t ShareSelectionWorkspaceBytes(const ShareSelectionBounds&) const override { return 0; }
  absl::Status SelectByShare(const ShareSelectionParams&, Workspace, Stream&) override { return CannotDo(); }
  int64_t BuildBlockListsWorkspaceBytes(int64_t, int64_t) const override { return 0; }
  absl::Status BuildBlockLists(const BuildBlockListsParams&, Workspace, Stream&) override {
    return CannotDo();
  }

 private:
  FakeDevice* const device_;
};

FakeDevice::FakeDevice() : kernels_(std::make_unique<Kernels>(this)) {}
FakeDevice::~FakeDevice() = default;

absl::StatusOr<std::unique_ptr<Stream>> FakeDevice::NewStream() { return std::make_unique<FakeStream>(); }
absl::StatusOr<std::unique_ptr<Event>> FakeDevice::NewEvent() { return std::make_unique<FakeEvent>(*this); }

}  // namespace longfill
