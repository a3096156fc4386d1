// The only file that includes nccl.h.
//
// - All groups are made non-blocking, so that no call of NCCL holds a thread: what is in progress is polled
//   up to the deadline.
// - Handles of NCCL are used under the family's lock only. The watch takes them away under that lock and
//   aborts them outside of it, each in a thread of its own: an abort waits for work of the GPU that may wait
//   for another group's kernel.
// - NCCL multicast (NVLS) is not asked for: its memory may be forbidden, and only reductions gain from it.
//   NCCL reads that wish from the environment alone, which belongs to the program
//   (deploy/cli/environment.cc).

#include "parallel/nccl_communicator.h"

#include <nccl.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/cuda_stream.h"
#include "parallel/communicator_internal.h"
#include "parallel/exchange_timer.h"

static_assert(NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0), "longfill needs NCCL 2.28 or newer");

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kWatchInterval{2};
constexpr std::chrono::microseconds kSpin{200};  // most calls are enqueued at once
constexpr std::chrono::microseconds kNap{50};    // between looks at those that are not
constexpr std::chrono::seconds kAbortGrace{5};   // for NCCL's kernels to stop, before their owner goes

// InProgress is not an error of a call: Await says how it ends.
absl::Status NcclStatus(ncclResult_t result, std::string_view call, ncclComm_t comm = nullptr) {
  if (result == ncclSuccess || result == ncclInProgress) return absl::OkStatus();
  absl::StatusCode code = absl::StatusCode::kInternal;
  if (result == ncclRemoteError || result == ncclSystemError) code = absl::StatusCode::kUnavailable;
  if (result == ncclInvalidUsage) code = absl::StatusCode::kFailedPrecondition;
  std::string message =
      absl::StrCat(absl::string_view(call.data(), call.size()), ": ", ncclGetErrorString(result));
  const char* detail = ncclGetLastError(comm);
  if (detail != nullptr && *detail != '\0') absl::StrAppend(&message, ": ", detail);
  return absl::Status(code, message);
}

// Calls of NCCL between Start and End are one operation.
class GroupScope {
 public:
  GroupScope() = default;
  ~GroupScope() {
    if (open_) ncclGroupEnd();
  }
  GroupScope(const GroupScope&) = delete;
  GroupScope& operator=(const GroupScope&) = delete;

  absl::Status Start() {
    LF_RETURN_IF_ERROR(NcclStatus(ncclGroupStart(), "ncclGroupStart"));
    open_ = true;
    return absl::OkStatus();
  }
  absl::Status End() {
    open_ = false;
    return NcclStatus(ncclGroupEnd(), "ncclGroupEnd");
  }

 private:
  bool open_ = false;
};

// One group of NCCL on this rank. Used under the lock of its family.
class Handle {
 public:
  explicit Handle(Backend& backend) : timer(backend) {}

  ncclComm_t comm = nullptr;  // nullptr: the watch has it, or there is one rank only
  ExchangeTimer timer;
};

// What the groups of one rank share that were split from one another.
class Family {
 public:
  static absl::StatusOr<std::shared_ptr<Family>> Create(Communicator& host, Backend& backend,
                                                        const NcclOptions& options) {
    if (options.max_ctas < 1 || options.timeout.count() < 1) {
      return absl::InvalidArgumentError(absl::StrCat("NCCL with ", options.max_ctas, " thread blocks and ",
                                                     options.timeout.count(), " ms; each is at least 1"));
    }
    LF_ASSIGN_OR_RETURN(const int device, CudaDeviceOf(backend.stream()));
    return std::shared_ptr<Family>(new Family(host, backend, options, device));
  }
  ~Family() {
    {
      const std::lock_guard<std::mutex> lock(shared_->mutex);
      shared_->closing = true;
    }
    shared_->changed.notify_all();
    watch_.join();
    std::unique_lock<std::mutex> lock(shared_->mutex);
    shared_->changed.wait_for(lock, kAbortGrace, [this] { return shared_->aborts == 0; });
  }
  Family(const Family&) = delete;
  Family& operator=(const Family&) = delete;

  Backend& backend() { return backend_; }
  const NcclOptions& options() const { return options_; }
  std::mutex& mutex() { return shared_->mutex; }
  absl::Status UseDevice() const { return longfill::UseDevice(device_); }

  void Add(Handle* handle) {
    const std::lock_guard<std::mutex> lock(shared_->mutex);
    handles_.push_back(handle);
  }
  // Ends what is left of the group.
  void Remove(Handle* handle) {
    const std::lock_guard<std::mutex> lock(shared_->mutex);
    Abort(*handle);
    std::erase(handles_, handle);
  }

 private:
  // Outlives the family where an abort does not end in time.
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    bool closing = false;
    int aborts = 0;  // on their way
  };

  Family(Communicator& host, Backend& backend, const NcclOptions& options, int device)
      : host_(host), backend_(backend), options_(options), device_(device), watch_([this] { Watch(); }) {}

  void Watch() {
    // A device that cannot be used is reported by whoever uses it.
    UseDevice().IgnoreError();
    while (true) {
      {
        std::unique_lock<std::mutex> lock(shared_->mutex);
        shared_->changed.wait_for(lock, kWatchInterval, [this] { return shared_->closing; });
        if (shared_->closing) return;
      }
      absl::Status status = host_.Health();
      if (status.ok()) {
        status = Look();
        if (!status.ok()) host_.Abort(status);
      }
      if (status.ok()) continue;
      AbortAll();
      return;
    }
  }

  absl::Status Look() {
    const std::lock_guard<std::mutex> lock(shared_->mutex);
    for (Handle* handle : handles_) {
      if (handle->comm == nullptr) continue;
      ncclResult_t state = ncclSuccess;
      LF_RETURN_IF_ERROR(NcclStatus(ncclCommGetAsyncError(handle->comm, &state), "ncclCommGetAsyncError"));
      LF_RETURN_IF_ERROR(NcclStatus(state, "NCCL", handle->comm));
      if (handle->timer.RunningFor() >= options_.timeout) {
        return absl::DeadlineExceededError(
            absl::StrCat("rank ", host_.rank(), " waited ", options_.timeout.count(),
                         " ms on its GPU for the peers of an exchange over NCCL"));
      }
    }
    return absl::OkStatus();
  }

  void AbortAll() {
    const std::lock_guard<std::mutex> lock(shared_->mutex);
    for (Handle* handle : handles_) Abort(*handle);
  }

  // Under the lock.
  void Abort(Handle& handle) {
    ncclComm_t const comm = std::exchange(handle.comm, nullptr);
    if (comm == nullptr) return;
    ++shared_->aborts;
    std::thread([comm, device = device_, shared = shared_] {
      if (longfill::UseDevice(device).ok()) ncclCommAbort(comm);
      const std::lock_guard<std::mutex> lock(shared->mutex);
      --shared->aborts;
      shared->changed.notify_all();
    }).detach();
  }

  Communicator& host_;
  Backend& backend_;
  const NcclOptions options_;
  const int device_;
  const std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
  std::vector<Handle*> handles_;
  std::thread watch_;  // last: it uses all of the above
};

ncclDataType_t DataType(ReduceType type) {
  switch (type) {
    case ReduceType::kFloat32:
      return ncclFloat32;
    case ReduceType::kFloat64:
      return ncclFloat64;
    case ReduceType::kInt64:
      return ncclInt64;
    case ReduceType::kUInt64:
      return ncclUint64;
  }
  return ncclUint8;
}

ncclRedOp_t Operation(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return ncclSum;
    case ReduceOp::kMax:
      return ncclMax;
    case ReduceOp::kMin:
      return ncclMin;
  }
  return ncclSum;
}

bool IsFloat(ReduceType type) { return type == ReduceType::kFloat32 || type == ReduceType::kFloat64; }

char* At(void* base, int64_t offset) { return static_cast<char*>(base) + offset; }
const char* At(const void* base, int64_t offset) { return static_cast<const char*>(base) + offset; }

class NcclCommunicator final : public Communicator {
 public:
  // Collective over `host`.
  static absl::StatusOr<std::unique_ptr<Communicator>> Create(Communicator& host,
                                                              std::unique_ptr<Communicator> owned,
                                                              std::shared_ptr<Family> family) {
    std::unique_ptr<NcclCommunicator> communicator(
        new NcclCommunicator(host, std::move(owned), std::move(family)));
    if (host.size() > 1) LF_RETURN_IF_ERROR(communicator->Connect());
    return communicator;
  }
  // An intact group ends in order, which waits for what it still has to do; any other one at once.
  ~NcclCommunicator() override {
    if (Finalized()) {
      const std::lock_guard<std::mutex> lock(family_->mutex());
      if (ncclComm_t const comm = std::exchange(handle_.comm, nullptr); comm != nullptr)
        ncclCommDestroy(comm);
    }
    family_->Remove(&handle_);
  }

  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }
  std::string_view name() const override { return "nccl"; }

  absl::Status AllGather(const void* send, void* recv, std::span<const int64_t> counts_bytes,
                         Stream& stream) override {
    if (!OnDevice(stream)) return host_.AllGather(send, recv, counts_bytes, stream);
    LF_RETURN_IF_ERROR(Usable(internal::CheckAllGather(counts_bytes, size())));
    const int64_t mine = counts_bytes[rank()];
    const bool even =
        std::all_of(counts_bytes.begin(), counts_bytes.end(), [&](int64_t c) { return c == mine; });
    if (even && mine == 0) return absl::OkStatus();
    return Exchange(mine * (size() - 1), stream, [&](cudaStream_t cuda_stream) -> absl::Status {
      if (even && size() > 1) {
        return NcclStatus(
            ncclAllGather(send, recv, static_cast<size_t>(mine), ncclUint8, handle_.comm, cuda_stream),
            "ncclAllGather", handle_.comm);
      }
      const std::vector<int64_t> to_each(static_cast<size_t>(size()), mine);
      const std::vector<int64_t> nowhere(static_cast<size_t>(size()), 0);
      return SendAndReceive(send, to_each, nowhere, recv, counts_bytes, stream, cuda_stream);
    });
  }

  absl::Status AllReduce(void* data, int64_t count, ReduceType type, ReduceOp op, Stream& stream) override {
    if (!OnDevice(stream)) return host_.AllReduce(data, count, type, op, stream);
    LF_RETURN_IF_ERROR(Usable(internal::CheckReduce(count, type, op)));
    if (IsFloat(type) && op == ReduceOp::kSum) {
      return absl::UnimplementedError("AllReduce over NCCL: float sums in the order of the ranks");
    }
    if (count == 0 || size() == 1) return absl::OkStatus();
    const int64_t sent = 2 * (size() - 1) * count * internal::ReduceTypeBytes(type) / size();
    return Exchange(sent, stream, [&](cudaStream_t cuda_stream) {
      return NcclStatus(ncclAllReduce(data, data, static_cast<size_t>(count), DataType(type), Operation(op),
                                      handle_.comm, cuda_stream),
                        "ncclAllReduce", handle_.comm);
    });
  }

  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream& stream) override {
    if (!OnDevice(stream)) return host_.Broadcast(data, bytes, root, stream);
    LF_RETURN_IF_ERROR(Usable(internal::CheckBroadcast(bytes, root, size())));
    if (bytes == 0 || size() == 1) return absl::OkStatus();
    const int64_t sent = rank() == root ? bytes * (size() - 1) : 0;
    return Exchange(sent, stream, [&](cudaStream_t cuda_stream) {
      return NcclStatus(
          ncclBroadcast(data, data, static_cast<size_t>(bytes), ncclUint8, root, handle_.comm, cuda_stream),
          "ncclBroadcast", handle_.comm);
    });
  }

  absl::Status AllToAll(const void* send, std::span<const int64_t> send_bytes, void* recv,
                        std::span<const int64_t> recv_bytes, Stream& stream) override {
    if (!OnDevice(stream)) return host_.AllToAll(send, send_bytes, recv, recv_bytes, stream);
    LF_RETURN_IF_ERROR(Usable(internal::CheckAllToAll(send_bytes, recv_bytes, rank(), size())));
    std::vector<int64_t> from(send_bytes.size());
    for (size_t r = 1; r < from.size(); ++r) from[r] = from[r - 1] + send_bytes[r - 1];
    const int64_t sent = std::accumulate(send_bytes.begin(), send_bytes.end(), -send_bytes[rank()]);
    return Exchange(sent, stream, [&](cudaStream_t cuda_stream) {
      return SendAndReceive(send, send_bytes, from, recv, recv_bytes, stream, cuda_stream);
    });
  }

  absl::Status Barrier(Stream& stream) override {
    if (!OnDevice(stream)) return host_.Barrier(stream);
    LF_RETURN_IF_ERROR(Usable(absl::OkStatus()));
    if (absl::Status status = stream.Sync(); !status.ok()) return Break(status);
    return host_.Barrier(host_stream_);
  }

  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    LF_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, host_.Split(color, key));
    Communicator& host = *part;
    return Create(host, std::move(part), family_);
  }

  void Abort(const absl::Status& reason) override { host_.Abort(reason); }
  absl::Status Health() override { return host_.Health(); }
  int64_t bytes_sent() const override {
    return host_.bytes_sent() + bytes_sent_.load(std::memory_order_relaxed);
  }
  double seconds() const override {
    const double on_host = host_.seconds();
    const std::lock_guard<std::mutex> lock(family_->mutex());
    return on_host + handle_.timer.seconds();
  }

 private:
  NcclCommunicator(Communicator& host, std::unique_ptr<Communicator> owned, std::shared_ptr<Family> family)
      : owned_(std::move(owned)), host_(host), family_(std::move(family)), handle_(family_->backend()) {
    family_->Add(&handle_);
  }

  static bool OnDevice(const Stream& stream) { return stream.device() != DeviceKind::kCpu; }

  // Peers wait for this rank's call, so a bad argument here ends the group.
  absl::Status Usable(const absl::Status& arguments) {
    LF_RETURN_IF_ERROR(report_.Check(host_.Health(), name(), rank()));
    return arguments.ok() ? arguments : Break(arguments);
  }

  // The first error of the family, which may be another than `error`.
  absl::Status Break(const absl::Status& error) {
    host_.Abort(error);
    return report_.Check(host_.Health(), name(), rank());
  }

  absl::Status Connect() {
    ncclUniqueId id{};
    absl::Status got;
    if (rank() == 0) got = NcclStatus(ncclGetUniqueId(&id), "ncclGetUniqueId");
    LF_RETURN_IF_ERROR(AgreeOnStatus(host_, got, host_stream_));
    LF_RETURN_IF_ERROR(host_.Broadcast(&id, sizeof(id), 0, host_stream_));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    config.minCTAs = 1;
    config.maxCTAs = family_->options().max_ctas;
    config.cgaClusterSize = 0;  // clusters find no room among the few multiprocessors that attention leaves
    config.collnetEnable = 0;
    config.commName = "longfill";
    const auto start = [&]() -> absl::Status {
      const std::lock_guard<std::mutex> lock(family_->mutex());
      LF_RETURN_IF_ERROR(family_->UseDevice());
      return NcclStatus(ncclCommInitRankConfig(&handle_.comm, size(), id, rank(), &config),
                        "ncclCommInitRankConfig");
    };
    absl::Status status = start();
    if (status.ok()) status = Await("ncclCommInitRankConfig");
    if (status.ok()) return status;
    status = Annotate(status, absl::StrCat("rank ", rank(), " cannot join its ", size(), " ranks over NCCL"));
    return Break(status);
  }

  // Enqueues what `calls` gives to NCCL for a CUDA stream.
  template <typename Calls>
  absl::Status Exchange(int64_t bytes_sent, Stream& stream, const Calls& calls) {
    const auto start = [&]() -> absl::Status {
      LF_ASSIGN_OR_RETURN(const cudaStream_t cuda_stream, CudaStreamOf(stream));
      const std::lock_guard<std::mutex> lock(family_->mutex());
      if (size() > 1 && handle_.comm == nullptr) return absl::OkStatus();  // Await says why
      LF_RETURN_IF_ERROR(family_->UseDevice());
      LF_RETURN_IF_ERROR(handle_.timer.Begin(stream));
      return calls(cuda_stream);
    };
    absl::Status status = start();
    // Work that is given to the stream before this is through would overtake it.
    if (status.ok() && size() > 1) status = Await("an exchange");
    if (status.ok()) {
      const std::lock_guard<std::mutex> lock(family_->mutex());
      status = handle_.timer.End(stream, 0);
    }
    if (!status.ok()) return Break(status);
    bytes_sent_ += bytes_sent;
    return absl::OkStatus();
  }

  // Until NCCL has done what it was given: made the group, or enqueued an operation (the first one to a peer
  // connects to it). Not under the lock.
  absl::Status Await(std::string_view what) {
    const Clock::time_point begin = Clock::now();
    while (true) {
      {
        const std::lock_guard<std::mutex> lock(family_->mutex());
        if (handle_.comm == nullptr) break;
        ncclResult_t state = ncclSuccess;
        LF_RETURN_IF_ERROR(NcclStatus(ncclCommGetAsyncError(handle_.comm, &state), "ncclCommGetAsyncError"));
        if (state != ncclInProgress) return NcclStatus(state, what, handle_.comm);
      }
      LF_RETURN_IF_ERROR(host_.Health());
      const Clock::duration waited = Clock::now() - begin;
      if (waited >= family_->options().timeout) {
        return absl::DeadlineExceededError(
            absl::StrCat("rank ", rank(), " waited ", family_->options().timeout.count(), " ms to begin ",
                         absl::string_view(what.data(), what.size()), " over NCCL with its peers"));
      }
      if (waited < kSpin) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(kNap);
      }
    }
    // The watch took the handle because of this.
    absl::Status error = host_.Health();
    return error.ok() ? absl::InternalError("NCCL was ended without a reason") : error;
  }

  // One group of pieces to and from each peer; send_bytes[r] from byte from[r] of `send` go to rank r, what
  // comes lies one behind the other. What a rank sends to itself is copied, unless it is there already.
  absl::Status SendAndReceive(const void* send, std::span<const int64_t> send_bytes,
                              std::span<const int64_t> from, void* recv, std::span<const int64_t> recv_bytes,
                              Stream& stream, cudaStream_t cuda_stream) {
    GroupScope group;
    LF_RETURN_IF_ERROR(group.Start());
    int64_t to = 0;
    for (int r = 0; r < size(); to += recv_bytes[r], ++r) {
      if (r == rank()) {
        LF_RETURN_IF_ERROR(CopyOwn(At(recv, to), At(send, from[r]), recv_bytes[r], stream));
        continue;
      }
      if (send_bytes[r] > 0) {
        LF_RETURN_IF_ERROR(NcclStatus(ncclSend(At(send, from[r]), static_cast<size_t>(send_bytes[r]),
                                               ncclUint8, r, handle_.comm, cuda_stream),
                                      "ncclSend", handle_.comm));
      }
      if (recv_bytes[r] > 0) {
        LF_RETURN_IF_ERROR(NcclStatus(ncclRecv(At(recv, to), static_cast<size_t>(recv_bytes[r]), ncclUint8, r,
                                               handle_.comm, cuda_stream),
                                      "ncclRecv", handle_.comm));
      }
    }
    return group.End();
  }

  absl::Status CopyOwn(void* to, const void* from, int64_t bytes, Stream& stream) {
    if (bytes == 0 || to == from) return absl::OkStatus();
    return family_->backend().kernels().Copy2D(
        {.to = to, .to_pitch = bytes, .from = from, .from_pitch = bytes, .row_bytes = bytes, .rows = 1},
        stream);
  }

  bool Finalized() {
    if (!host_.Health().ok()) return false;
    {
      const std::lock_guard<std::mutex> lock(family_->mutex());
      if (handle_.comm == nullptr) return false;
      if (!family_->UseDevice().ok() ||
          !NcclStatus(ncclCommFinalize(handle_.comm), "ncclCommFinalize").ok()) {
        return false;
      }
    }
    return Await("ncclCommFinalize").ok();
  }

  const std::unique_ptr<Communicator> owned_;  // of a split group
  Communicator& host_;
  CpuStream host_stream_;
  const std::shared_ptr<Family> family_;
  Handle handle_;
  internal::ErrorReport report_;
  std::atomic<int64_t> bytes_sent_{0};
};

}  // namespace

absl::StatusOr<int> NcclVersionCode(Backend& backend) {
  if (!CudaDeviceOf(backend.stream()).ok()) {
    return absl::UnimplementedError(absl::StrCat("NCCL has nothing for ", backend.facts().name));
  }
  int version = 0;
  LF_RETURN_IF_ERROR(NcclStatus(ncclGetVersion(&version), "ncclGetVersion"));
  return version;
}

int NcclHeaderVersionCode() { return NCCL_VERSION_CODE; }

std::string NcclVersionText(int version_code) {
  return absl::StrCat(version_code / 10000, ".", version_code / 100 % 100, ".", version_code % 100);
}

absl::StatusOr<std::unique_ptr<Communicator>> CreateNcclCommunicator(Communicator& host, Backend& backend,
                                                                     const NcclOptions& options) {
  absl::StatusOr<std::shared_ptr<Family>> family = Family::Create(host, backend, options);
  CpuStream host_stream;
  LF_RETURN_IF_ERROR(AgreeOnStatus(host, family.status(), host_stream));
  return NcclCommunicator::Create(host, nullptr, *std::move(family));
}

}  // namespace longfill
