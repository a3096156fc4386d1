#include "tests/testing/guarded_backend.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/thread_pool.h"
#include "kernels/cpu/cpu_kernel_set.h"

namespace longfill {
namespace {

// Each allocation ends at a page that can never be touched, and can itself be touched while the memory is
// open.
class GuardedMemory final : public MemoryResource {
 public:
  GuardedMemory(int64_t limit_bytes, std::shared_ptr<SharedDevice> device)
      : limit_bytes_(limit_bytes), device_(std::move(device)) {}

  // Between the two one thread has the memory.
  void Open() {
    open_.lock();
    Protect(PROT_READ | PROT_WRITE);
  }
  void Close() {
    Protect(PROT_NONE);
    open_.unlock();
  }

  absl::StatusOr<int64_t> IdleBytes() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return idle_bytes_;
  }
  absl::Status Trim() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    device_->held_bytes -= std::exchange(idle_bytes_, 0);
    return absl::OkStatus();
  }

 private:
  // As a pool does: first of what is idle here, then of the device.
  bool Hold(int64_t size_bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t more = std::max<int64_t>(0, size_bytes - idle_bytes_);
    if ((device_->held_bytes += more) > device_->memory_bytes) {
      device_->held_bytes -= more;
      return false;
    }
    idle_bytes_ += more - size_bytes;
    return true;
  }
  absl::Status DeviceHealth() const override {
    return device_->lost ? absl::InternalError("the device is lost") : absl::OkStatus();
  }
  void* DoAllocate(int64_t size_bytes) override {
    if (limit_bytes_ > 0 && bytes_in_use() + size_bytes > limit_bytes_) return nullptr;
    if (device_->lost || !Hold(size_bytes)) return nullptr;
    const size_t page = static_cast<size_t>(getpagesize());
    const size_t aligned = (static_cast<size_t>(size_bytes) + 63) / 64 * 64;
    const size_t usable = (aligned + page - 1) / page * page;
    void* const base =
        mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    std::memset(base, 0x7F, usable);
    LF_CHECK(mprotect(base, usable + page, PROT_NONE) == 0);
    void* const data = static_cast<char*>(base) + usable - aligned;
    const std::lock_guard<std::mutex> lock(mutex_);
    mappings_[data] = {base, usable};
    return data;
  }
  void DoDeallocate(void* data, int64_t size_bytes) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_bytes_ += size_bytes;
    const auto mapping = mappings_.find(data);
    LF_CHECK(mapping != mappings_.end());
    const auto [base, usable] = mapping->second;
    LF_CHECK(munmap(base, usable + static_cast<size_t>(getpagesize())) == 0);
    mappings_.erase(mapping);
  }
  void Protect(int protection) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [data, mapping] : mappings_) {
      LF_CHECK(mprotect(mapping.first, mapping.second, protection) == 0);
    }
  }

  const int64_t limit_bytes_;
  const std::shared_ptr<SharedDevice> device_;
  std::mutex open_;
  mutable std::mutex mutex_;
  int64_t idle_bytes_ = 0;
  std::map<void*, std::pair<void*, size_t>> mappings_;  // base and usable bytes of each allocation
};

class GuardedStream final : public Stream {
 public:
  DeviceKind device() const override { return DeviceKind::kCuda; }
  absl::Status Sync() override {
    DeliverUntil(num_given_);
    return absl::OkStatus();
  }
  absl::Status WaitFor(const Event&) override { return absl::OkStatus(); }

  void Deliver(void* to, std::vector<char> bytes) {
    if (bytes.empty()) return;
    std::memset(to, 0x7F, bytes.size());
    on_their_way_.emplace_back(to, std::move(bytes));
    ++num_given_;
  }
  int64_t num_given() const { return num_given_; }
  void DeliverUntil(int64_t number) {
    for (; num_delivered_ < number; ++num_delivered_) {
      const auto& [to, bytes] = on_their_way_.front();
      std::memcpy(to, bytes.data(), bytes.size());
      on_their_way_.pop_front();
    }
  }

 private:
  std::deque<std::pair<void*, std::vector<char>>> on_their_way_;
  int64_t num_given_ = 0;
  int64_t num_delivered_ = 0;
};

// Its stream outlives the last wait.
class GuardedEvent final : public Event {
 public:
  absl::Status Record(Stream& stream) override {
    if (stream.device() != DeviceKind::kCuda) return absl::InvalidArgumentError("a stream of the CPU");
    stream_ = static_cast<GuardedStream*>(&stream);
    num_given_ = stream_->num_given();
    CpuStream cpu;
    return event_.Record(cpu);
  }
  absl::StatusOr<bool> Passed() const override {
    LF_RETURN_IF_ERROR(Wait());
    return true;
  }
  absl::Status Wait() const override {
    if (stream_ != nullptr) stream_->DeliverUntil(num_given_);
    return absl::OkStatus();
  }
  absl::StatusOr<double> SecondsSince(const Event& earlier) const override {
    return event_.SecondsSince(static_cast<const GuardedEvent&>(earlier).event_);
  }

 private:
  CpuEvent event_;
  GuardedStream* stream_ = nullptr;
  int64_t num_given_ = 0;  // to the stream, when this was recorded
};

class GuardedKernelSet final : public KernelSet {
 public:
  GuardedKernelSet(ThreadPool& pool, GuardedMemory& memory, decltype(GuardedOptions::fault) fault)
      : memory_(memory), fault_(std::move(fault)), cpu_(CreateCpuKernelSet(pool, memory)) {}

  std::string_view name() const override { return "guarded"; }
  DeviceKind device() const override { return DeviceKind::kCuda; }
  DType compute_dtype() const override { return cpu_->compute_dtype(); }
  MemoryResource& memory() override { return memory_; }
  int64_t preferred_rows() const override { return cpu_->preferred_rows(); }

  absl::Status CopyIn(void* to, const void* host, int64_t bytes, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->CopyIn(to, host, bytes, cpu); });
  }
  absl::Status CopyOut(void* host, const void* from, int64_t bytes, Stream& stream) override {
    std::vector<char> copy(static_cast<size_t>(bytes));
    LF_RETURN_IF_ERROR(
        Run(__func__, stream, [&](Stream& cpu) { return cpu_->CopyOut(copy.data(), from, bytes, cpu); }));
    static_cast<GuardedStream&>(stream).Deliver(host, std::move(copy));
    return absl::OkStatus();
  }
  absl::Status Copy2D(const Copy2DParams& params, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->Copy2D(params, cpu); });
  }
  absl::Status Zero(void* data, int64_t bytes, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->Zero(data, bytes, cpu); });
  }
  absl::Status FillRandom(const FillRandomParams& params, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->FillRandom(params, cpu); });
  }
  absl::Status Embed(const EmbedParams& params, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->Embed(params, cpu); });
  }
  absl::Status RmsNorm(const RmsNormParams& params, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->RmsNorm(params, cpu); });
  }
  int64_t GemmWorkspaceBytes(int64_t max_rows, int64_t max_in_width, int64_t max_out_width) const override {
    return cpu_->GemmWorkspaceBytes(max_rows, max_in_width, max_out_width);
  }
  absl::Status Gemm(const GemmParams& params, Workspace workspace, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->Gemm(params, workspace, cpu); });
  }
  absl::Status GatedActivation(const GatedActivationParams& params, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->GatedActivation(params, cpu); });
  }
  absl::Status Rotary(const RotaryParams& params, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->Rotary(params, cpu); });
  }
  int64_t AttentionWorkspaceBytes(const AttentionBounds& bounds) const override {
    return cpu_->AttentionWorkspaceBytes(bounds);
  }
  absl::Status Attention(const AttentionParams& params, Workspace workspace, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->Attention(params, workspace, cpu); });
  }
  int64_t LastQueryWorkspaceBytes(int64_t num_heads, int64_t num_keys, int64_t head_dim) const override {
    return cpu_->LastQueryWorkspaceBytes(num_heads, num_keys, head_dim);
  }
  absl::Status LastQueryRowMax(const LastQueryParams& params, float* row_max, Workspace workspace,
                               Stream& stream) override {
    return Run(__func__, stream,
               [&](Stream& cpu) { return cpu_->LastQueryRowMax(params, row_max, workspace, cpu); });
  }
  absl::Status LastQueryRowSum(const LastQueryParams& params, const float* row_max, uint64_t* row_sum,
                               Workspace workspace, Stream& stream) override {
    return Run(__func__, stream,
               [&](Stream& cpu) { return cpu_->LastQueryRowSum(params, row_max, row_sum, workspace, cpu); });
  }
  absl::Status LastQueryScore(const LastQueryParams& params, const float* row_max, const uint64_t* row_sum,
                              const LastQueryScores& scores, Workspace workspace, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) {
      return cpu_->LastQueryScore(params, row_max, row_sum, scores, workspace, cpu);
    });
  }
  absl::Status JoinScores(const JoinScoresParams& params, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->JoinScores(params, cpu); });
  }
  absl::Status SelectionStart(std::span<const int64_t> budgets, SelectionCut* cuts, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->SelectionStart(budgets, cuts, cpu); });
  }
  absl::Status SelectionHistogram(const SelectionLists& lists, int pass, const SelectionCut* cuts,
                                  uint64_t* histogram, Stream& stream) override {
    return Run(__func__, stream,
               [&](Stream& cpu) { return cpu_->SelectionHistogram(lists, pass, cuts, histogram, cpu); });
  }
  absl::Status SelectionAdvance(int64_t num_lists, int pass, const uint64_t* histogram, SelectionCut* cuts,
                                Stream& stream) override {
    return Run(__func__, stream,
               [&](Stream& cpu) { return cpu_->SelectionAdvance(num_lists, pass, histogram, cuts, cpu); });
  }
  absl::Status SelectionMark(const SelectionLists& lists, const SelectionCut* cuts, uint64_t* bits,
                             int64_t words_per_list, Stream& stream) override {
    return Run(__func__, stream,
               [&](Stream& cpu) { return cpu_->SelectionMark(lists, cuts, bits, words_per_list, cpu); });
  }
  int64_t BuildIndexWorkspaceBytes(int64_t num_heads, int64_t words_per_list) const override {
    return cpu_->BuildIndexWorkspaceBytes(num_heads, words_per_list);
  }
  absl::Status BuildIndex(const BuildIndexParams& params, Workspace workspace, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->BuildIndex(params, workspace, cpu); });
  }
  int64_t CountPairsWorkspaceBytes(int64_t num_heads, int64_t num_tokens) const override {
    return cpu_->CountPairsWorkspaceBytes(num_heads, num_tokens);
  }
  absl::Status CountPairs(const CountPairsParams& params, Workspace workspace, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->CountPairs(params, workspace, cpu); });
  }
  absl::Status Pool(const PoolParams& params, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->Pool(params, cpu); });
  }
  int64_t SelectBlocksWorkspaceBytes(int64_t num_row_blocks, int64_t num_key_blocks,
                                     int64_t head_dim) const override {
    return cpu_->SelectBlocksWorkspaceBytes(num_row_blocks, num_key_blocks, head_dim);
  }
  absl::Status SelectBlocks(const SelectBlocksParams& params, Workspace workspace, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->SelectBlocks(params, workspace, cpu); });
  }
  absl::Status Representatives(const RepresentativesParams& params, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->Representatives(params, cpu); });
  }
  absl::Status CoarseRepresentatives(const CoarseRepresentativesParams& params, Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->CoarseRepresentatives(params, cpu); });
  }
  int64_t ShareSelectionWorkspaceBytes(const ShareSelectionBounds& bounds) const override {
    return cpu_->ShareSelectionWorkspaceBytes(bounds);
  }
  absl::Status SelectByShare(const ShareSelectionParams& params, Workspace workspace,
                             Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->SelectByShare(params, workspace, cpu); });
  }
  int64_t BuildBlockListsWorkspaceBytes(int64_t num_heads, int64_t num_row_blocks) const override {
    return cpu_->BuildBlockListsWorkspaceBytes(num_heads, num_row_blocks);
  }
  absl::Status BuildBlockLists(const BuildBlockListsParams& params, Workspace workspace,
                               Stream& stream) override {
    return Run(__func__, stream, [&](Stream& cpu) { return cpu_->BuildBlockLists(params, workspace, cpu); });
  }

 private:
  template <typename Body>
  absl::Status Run(const char* call, Stream& stream, const Body& body) {
    if (fault_) LF_RETURN_IF_ERROR(fault_(call));
    if (stream.device() != DeviceKind::kCuda) return absl::InvalidArgumentError("a stream of the CPU");
    CpuStream cpu;
    memory_.Open();
    absl::Status status = body(cpu);
    memory_.Close();
    return status;
  }

  GuardedMemory& memory_;
  const decltype(GuardedOptions::fault) fault_;
  const std::unique_ptr<KernelSet> cpu_;
};

// Memory that threads of other ranks read, so that nothing guards it; its bytes are of the device all the
// same.
class SharedGuardedMemory final : public MemoryResource {
 public:
  SharedGuardedMemory(int64_t limit_bytes, MemoryResource& guarded, std::shared_ptr<SharedDevice> device)
      : limit_bytes_(limit_bytes), guarded_(guarded), device_(std::move(device)) {}

 private:
  void* DoAllocate(int64_t size_bytes) override {
    if (limit_bytes_ > 0 && guarded_.bytes_in_use() + bytes_in_use() + size_bytes > limit_bytes_)
      return nullptr;
    if (device_->lost) return nullptr;
    if (device_->held_bytes + size_bytes > device_->memory_bytes) guarded_.Trim().IgnoreError();
    if ((device_->held_bytes += size_bytes) > device_->memory_bytes) {
      device_->held_bytes -= size_bytes;
      return nullptr;
    }
    void* const data = std::malloc(static_cast<size_t>(size_bytes));
    std::memset(data, 0x7F, static_cast<size_t>(size_bytes));
    return data;
  }
  void DoDeallocate(void* data, int64_t size_bytes) override {
    device_->held_bytes -= size_bytes;
    std::free(data);
  }
  absl::Status DeviceHealth() const override {
    return device_->lost ? absl::InternalError("the device is lost") : absl::OkStatus();
  }

  const int64_t limit_bytes_;
  MemoryResource& guarded_;
  const std::shared_ptr<SharedDevice> device_;
};

// Handles are addresses, for this process alone.
class GuardedPeers final : public PeerAccess {
 public:
  GuardedPeers(int64_t limit_bytes, GuardedKernelSet& kernels, std::shared_ptr<SharedDevice> device,
               std::string host)
      : kernels_(kernels),
        memory_(limit_bytes, kernels.memory(), std::move(device)),
        host_(std::move(host)) {}

  MemoryResource& memory() override { return memory_; }
  absl::StatusOr<std::string> Host() override { return host_; }
  absl::StatusOr<std::string> Handle(const Buffer& buffer) override {
    return absl::StrCat(getpid(), ":", reinterpret_cast<uintptr_t>(buffer.data()));
  }
  absl::StatusOr<const void*> Open(std::string_view handle) override {
    const std::vector<std::string> parts =
        absl::StrSplit(absl::string_view(handle.data(), handle.size()), ':');
    uintptr_t address = 0;
    if (parts[0] != absl::StrCat(getpid())) return absl::FailedPreconditionError("it is of another process");
    LF_CHECK(absl::SimpleAtoi(parts[1], &address));
    return reinterpret_cast<const void*>(address);  // NOLINT(performance-no-int-to-ptr)
  }
  absl::Status Close(const void*) override { return absl::OkStatus(); }
  absl::Status Copy(const Copy2DParams& params, Stream& stream) override {
    LF_CHECK(params.planes == 1);
    return kernels_.Copy2D(params, stream);
  }

 private:
  GuardedKernelSet& kernels_;
  SharedGuardedMemory memory_;
  const std::string host_;
};

class GuardedBackend final : public Backend {
 public:
  explicit GuardedBackend(GuardedOptions options)
      : device_(std::move(options.device)),
        facts_{.name = "guarded CPU",
               .id = absl::StrCat(absl::Hex(reinterpret_cast<uintptr_t>(device_.get()))),
               .memory_bytes = device_->memory_bytes,
               .free_bytes_before = device_->memory_bytes - device_->held_bytes},
        memory_(options.limit_bytes, device_),
        kernels_(pool_, memory_, std::move(options.fault)),
        peers_(options.limit_bytes, kernels_, device_, std::move(options.host)) {}

  const DeviceFacts& facts() const override { return facts_; }
  KernelSet& kernels() override { return kernels_; }
  MemoryResource& memory() override { return memory_; }
  MemoryResource& host_memory() override { return host_memory_; }
  Stream& stream() override { return stream_; }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override { return std::make_unique<GuardedStream>(); }
  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override { return std::make_unique<GuardedEvent>(); }
  absl::StatusOr<int64_t> FreeMemoryBytes() override {
    LF_RETURN_IF_ERROR(Health());
    LF_ASSIGN_OR_RETURN(const int64_t idle_bytes, memory_.IdleBytes());
    return device_->memory_bytes - device_->held_bytes + idle_bytes;
  }
  PeerAccess* peers() override { return &peers_; }
  absl::Status Health() override {
    return device_->lost ? absl::InternalError("it has fallen off the bus") : absl::OkStatus();
  }

 private:
  const std::shared_ptr<SharedDevice> device_;
  const DeviceFacts facts_;
  ThreadPool pool_{1};
  GuardedMemory memory_;
  CpuMemoryResource host_memory_;
  GuardedKernelSet kernels_;
  GuardedPeers peers_;
  GuardedStream stream_;
};

class LimitedCpuBackend final : public Backend {
 public:
  explicit LimitedCpuBackend(int64_t limit_bytes)
      : facts_{.name = "CPU"}, memory_(limit_bytes), kernels_(CreateCpuKernelSet(pool_, memory_)) {}

  const DeviceFacts& facts() const override { return facts_; }
  KernelSet& kernels() override { return *kernels_; }
  MemoryResource& memory() override { return memory_; }
  MemoryResource& host_memory() override { return memory_; }
  Stream& stream() override { return stream_; }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override { return std::make_unique<CpuStream>(); }
  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override { return std::make_unique<CpuEvent>(); }
  absl::StatusOr<int64_t> FreeMemoryBytes() override { return 0; }
  absl::Status Health() override { return absl::OkStatus(); }

 private:
  const DeviceFacts facts_;
  ThreadPool pool_{1};
  CpuMemoryResource memory_;
  const std::unique_ptr<KernelSet> kernels_;
  CpuStream stream_;
};

}  // namespace

std::unique_ptr<Backend> CreateGuardedBackend(GuardedOptions options) {
  if (options.device == nullptr) options.device = std::make_shared<SharedDevice>(int64_t{1} << 40);
  return std::make_unique<GuardedBackend>(std::move(options));
}

std::unique_ptr<Backend> CreateLimitedCpuBackend(int64_t limit_bytes) {
  return std::make_unique<LimitedCpuBackend>(limit_bytes);
}

}  // namespace longfill
