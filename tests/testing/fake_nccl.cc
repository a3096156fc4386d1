#include "tests/testing/fake_nccl.h"

#include <nccl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/cuda_stream.h"
#include "parallel/communicator_internal.h"
#include "tests/testing/guarded_backend.h"

namespace {

using Bytes = std::vector<char>;

// Ranks that have joined under one id, and what is on its way between them.
struct Group {
  std::mutex mutex;
  int size = 0;
  int joined = 0;
  std::map<std::pair<int, int>, std::deque<Bytes>> mail;  // (from, to)
};

// Waits for one message from each of `from`, then `finish` gets them in that order.
struct Receipt {
  std::vector<int> from;
  std::vector<Bytes> got;
  std::function<void(std::vector<Bytes>& got)> finish;
};

}  // namespace

struct ncclComm {
  std::shared_ptr<Group> group;
  int rank = 0;
  std::atomic<bool> joined{false};
  std::deque<Receipt> receipts;  // in the order given
};

namespace longfill {
namespace {

struct State {
  std::mutex mutex;
  std::map<std::string, std::shared_ptr<Group>> groups;  // by id
  std::map<Stream*, Backend*> gpus;                      // by stream
  int next_id = 0;
  std::atomic<int> failing_init{-1}, failing_later{-1};
  std::atomic<bool> hold_ends{false};
  std::atomic<int> made{0}, destroyed{0}, aborted{0};
};
State& TheState() {
  static State& state = *new State;
  return state;
}

Backend& GpuOf(cudaStream_t stream) {
  State& state = TheState();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return *state.gpus.at(reinterpret_cast<Stream*>(stream));
}

Bytes Read(cudaStream_t stream, const void* from, size_t bytes) {
  Bytes copy(bytes);
  Stream& ours = *reinterpret_cast<Stream*>(stream);
  LF_CHECK(GpuOf(stream).kernels().CopyOut(copy.data(), from, static_cast<int64_t>(bytes), ours).ok());
  LF_CHECK(ours.Sync().ok());
  return copy;
}

void Write(cudaStream_t stream, void* to, const Bytes& bytes) {
  Stream& ours = *reinterpret_cast<Stream*>(stream);
  LF_CHECK(GpuOf(stream).kernels().CopyIn(to, bytes.data(), static_cast<int64_t>(bytes.size()), ours).ok());
}

// Records of a GPU alternate between begins and ends where one communicator is timed there.
class FakeEvent final : public Event {
 public:
  FakeEvent(std::unique_ptr<Event> guarded, std::shared_ptr<std::atomic<int64_t>> records)
      : guarded_(std::move(guarded)), records_(std::move(records)) {}
  absl::Status Record(Stream& stream) override {
    const bool is_end = (*records_)++ % 2 == 1;
    held_ = is_end && TheState().hold_ends;
    return guarded_->Record(stream);
  }
  absl::StatusOr<bool> Passed() const override { return !(held_ && TheState().hold_ends); }
  absl::Status Wait() const override { return guarded_->Wait(); }
  absl::StatusOr<double> SecondsSince(const Event& earlier) const override {
    return guarded_->SecondsSince(*static_cast<const FakeEvent&>(earlier).guarded_);
  }

 private:
  const std::unique_ptr<Event> guarded_;
  const std::shared_ptr<std::atomic<int64_t>> records_;
  std::atomic<bool> held_{false};
};

class FakeGpu final : public Backend {
 public:
  explicit FakeGpu(std::unique_ptr<Backend> guarded) : guarded_(std::move(guarded)) {
    Know(guarded_->stream());
  }
  ~FakeGpu() override {
    const std::lock_guard<std::mutex> lock(TheState().mutex);
    std::erase_if(TheState().gpus, [this](const auto& known) { return known.second == this; });
  }
  const DeviceFacts& facts() const override { return guarded_->facts(); }
  KernelSet& kernels() override { return guarded_->kernels(); }
  MemoryResource& memory() override { return guarded_->memory(); }
  MemoryResource& host_memory() override { return guarded_->host_memory(); }
  Stream& stream() override { return guarded_->stream(); }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    LF_ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, guarded_->NewStream());
    Know(*stream);
    return stream;
  }
  absl::StatusOr<std::unique_ptr<Event>> NewEvent() override {
    LF_ASSIGN_OR_RETURN(std::unique_ptr<Event> event, guarded_->NewEvent());
    return std::make_unique<FakeEvent>(std::move(event), records_);
  }
  absl::StatusOr<int64_t> FreeMemoryBytes() override { return guarded_->FreeMemoryBytes(); }
  absl::Status Health() override { return guarded_->Health(); }
  PeerAccess* peers() override { return guarded_->peers(); }

 private:
  void Know(Stream& stream) {
    const std::lock_guard<std::mutex> lock(TheState().mutex);
    TheState().gpus[&stream] = this;
  }

  const std::unique_ptr<Backend> guarded_;
  const std::shared_ptr<std::atomic<int64_t>> records_ = std::make_shared<std::atomic<int64_t>>(0);
};

// Calls between ncclGroupStart and ncclGroupEnd of a thread; they run at its end.
struct ThreadGroup {
  int depth = 0;
  std::vector<std::pair<ncclComm_t, std::function<void()>>> calls;
};
thread_local ThreadGroup thread_group;

// `call` posts what the rank sends and appends receipts.
ncclResult_t Give(ncclComm_t comm, std::function<void()> call) {
  if (thread_group.depth > 0) {
    thread_group.calls.emplace_back(comm, std::move(call));
    return ncclSuccess;
  }
  call();
  return ncclInProgress;
}

void Send(ncclComm_t comm, int to, Bytes bytes) {
  const std::lock_guard<std::mutex> lock(comm->group->mutex);
  comm->group->mail[{comm->rank, to}].push_back(std::move(bytes));
}

void SendToAll(ncclComm_t comm, const Bytes& bytes) {
  for (int r = 0; r < comm->group->size; ++r) {
    if (r != comm->rank) Send(comm, r, bytes);
  }
}

std::vector<int> Peers(ncclComm_t comm) {
  std::vector<int> peers;
  for (int r = 0; r < comm->group->size; ++r) {
    if (r != comm->rank) peers.push_back(r);
  }
  return peers;
}

// Takes in what has come; whether all receipts are through.
bool Progress(ncclComm_t comm) {
  while (!comm->receipts.empty()) {
    Receipt& receipt = comm->receipts.front();
    while (receipt.got.size() < receipt.from.size()) {
      const std::lock_guard<std::mutex> lock(comm->group->mutex);
      auto& mail = comm->group->mail[{receipt.from[receipt.got.size()], comm->rank}];
      if (mail.empty()) return false;
      receipt.got.push_back(std::move(mail.front()));
      mail.pop_front();
    }
    receipt.finish(receipt.got);
    comm->receipts.pop_front();
  }
  return true;
}

size_t TypeBytes(ncclDataType_t type) { return type == ncclUint8 ? 1 : type == ncclFloat32 ? 4 : 8; }

ReduceType TypeOf(ncclDataType_t type) {
  if (type == ncclFloat32) return ReduceType::kFloat32;
  if (type == ncclFloat64) return ReduceType::kFloat64;
  return type == ncclInt64 ? ReduceType::kInt64 : ReduceType::kUInt64;
}

}  // namespace

absl::Status UseDevice(int) { return absl::OkStatus(); }
absl::StatusOr<cudaStream_t> CudaStreamOf(Stream& stream) { return reinterpret_cast<cudaStream_t>(&stream); }
absl::StatusOr<int> CudaDeviceOf(Stream&) { return 0; }

std::unique_ptr<Backend> CreateFakeGpu() { return std::make_unique<FakeGpu>(CreateGuardedBackend()); }

void FakeNccl::Reset() {
  State& state = TheState();
  state.failing_init = state.failing_later = -1;
  state.hold_ends = false;
  state.made = state.destroyed = state.aborted = 0;
}
void FakeNccl::FailInit(int rank) { TheState().failing_init = rank; }
void FakeNccl::FailLater(int rank) { TheState().failing_later = rank; }
void FakeNccl::HoldEnds(bool hold) { TheState().hold_ends = hold; }
int FakeNccl::made() { return TheState().made; }
int FakeNccl::destroyed() { return TheState().destroyed; }
int FakeNccl::aborted() { return TheState().aborted; }

}  // namespace longfill

using longfill::Give;
using longfill::TheState;

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclRemoteError ? "remote process exited or there was a network error" : "fake error";
}
const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  const std::lock_guard<std::mutex> lock(TheState().mutex);
  std::memset(id, 0, sizeof(*id));
  std::memcpy(id->internal, &++TheState().next_id, sizeof(int));
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  LF_CHECK(config->blocking == 0 && config->maxCTAs >= 1);
  if (rank == TheState().failing_init) return ncclSystemError;
  auto* made = new ncclComm;
  {
    const std::lock_guard<std::mutex> lock(TheState().mutex);
    auto& group = TheState().groups[std::string(id.internal, sizeof(id.internal))];
    if (group == nullptr) group = std::make_shared<Group>();
    made->group = group;
  }
  made->rank = rank;
  ++TheState().made;
  const std::lock_guard<std::mutex> lock(made->group->mutex);
  made->group->size = size;
  ++made->group->joined;
  *comm = made;
  return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  *state = ncclInProgress;
  if (!comm->joined) {
    const std::lock_guard<std::mutex> lock(comm->group->mutex);
    comm->joined = comm->group->joined == comm->group->size;
  }
  if (comm->joined && longfill::Progress(comm)) *state = ncclSuccess;
  if (comm->rank == TheState().failing_later) *state = ncclRemoteError;
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclInProgress; }
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  LF_CHECK(comm->receipts.empty());
  ++TheState().destroyed;
  delete comm;
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  ++TheState().aborted;
  delete comm;
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
  ++longfill::thread_group.depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (--longfill::thread_group.depth > 0) return ncclSuccess;
  const auto calls = std::exchange(longfill::thread_group.calls, {});
  for (const auto& [comm, call] : calls) call();
  return calls.empty() ? ncclSuccess : ncclInProgress;
}

ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return Give(comm, [=] {
    longfill::Send(comm, peer, longfill::Read(stream, data, count * longfill::TypeBytes(type)));
  });
}

ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  const size_t bytes = count * longfill::TypeBytes(type);
  return Give(comm, [=] {
    comm->receipts.push_back({{peer}, {}, [=](std::vector<Bytes>& got) {
                                LF_CHECK(got[0].size() == bytes);
                                longfill::Write(stream, data, got[0]);
                              }});
  });
}

ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  const size_t bytes = count * longfill::TypeBytes(type);
  return Give(comm, [=] {
    const Bytes mine = longfill::Read(stream, send, bytes);
    longfill::SendToAll(comm, mine);
    longfill::Write(stream, static_cast<char*>(recv) + comm->rank * bytes, mine);
    const std::vector<int> peers = longfill::Peers(comm);
    comm->receipts.push_back({peers, {}, [=](std::vector<Bytes>& got) {
                                for (size_t i = 0; i < peers.size(); ++i) {
                                  LF_CHECK(got[i].size() == bytes);
                                  longfill::Write(stream, static_cast<char*>(recv) + peers[i] * bytes,
                                                  got[i]);
                                }
                              }});
  });
}

ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * longfill::TypeBytes(type);
  return Give(comm, [=] {
    if (comm->rank == root) return longfill::SendToAll(comm, longfill::Read(stream, send, bytes));
    comm->receipts.push_back({{root}, {}, [=](std::vector<Bytes>& got) {
                                LF_CHECK(got[0].size() == bytes);
                                longfill::Write(stream, recv, got[0]);
                              }});
  });
}

// From the last rank to the first.
ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  using longfill::ReduceOp;
  const size_t bytes = count * longfill::TypeBytes(type);
  const ReduceOp operation = op == ncclSum ? ReduceOp::kSum : op == ncclMax ? ReduceOp::kMax : ReduceOp::kMin;
  return Give(comm, [=] {
    const Bytes mine = longfill::Read(stream, send, bytes);
    longfill::SendToAll(comm, mine);
    comm->receipts.push_back({longfill::Peers(comm), {}, [=](std::vector<Bytes>& got) {
                                got.insert(got.begin() + comm->rank, mine);
                                Bytes sum = got.back();
                                for (size_t r = got.size() - 1; r-- > 0;) {
                                  longfill::internal::Reduce(sum.data(), got[r].data(),
                                                             static_cast<int64_t>(count),
                                                             longfill::TypeOf(type), operation);
                                }
                                longfill::Write(stream, recv, sum);
                              }});
  });
}

}  // extern "C"
