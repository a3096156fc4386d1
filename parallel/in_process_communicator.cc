// Ranks as threads of one process. A call is: meet (all ranks have posted the same call; deadline and abort
// apply), copy straight between the callers' buffers, leave (all have copied). Copies start only when
// everybody is there and end in bounded time, so leaving has no deadline and no buffer is touched after its
// owner's call has returned.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "parallel/communicator.h"
#include "parallel/communicator_internal.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;

enum class Kind : uint8_t { kAllGather, kAllReduce, kBroadcast, kAllToAll, kBarrier, kSplit };

// What one rank calls with; lives on its stack while it is in the call.
struct Call {
  Kind kind = Kind::kBarrier;
  const void* send = nullptr;
  void* recv = nullptr;
  std::span<const int64_t> send_bytes;  // AllGather: counts_bytes
  std::span<const int64_t> recv_bytes;
  int64_t count = 0;  // AllReduce: elements; Broadcast: bytes
  ReduceType type = ReduceType::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  int root = 0;
  int color = 0;
  int key = 0;
};

std::string Describe(const Call& call) {
  switch (call.kind) {
    case Kind::kAllGather:
      return absl::StrCat("AllGather of {", absl::StrJoin(call.send_bytes, ", "), "} bytes");
    case Kind::kAllReduce:
      return absl::StrCat("AllReduce of ", call.count, " elements, type ", static_cast<int>(call.type),
                          ", operation ", static_cast<int>(call.op));
    case Kind::kBroadcast:
      return absl::StrCat("Broadcast of ", call.count, " bytes from rank ", call.root);
    case Kind::kAllToAll:
      return absl::StrCat("AllToAll sending {", absl::StrJoin(call.send_bytes, ", "), "} and receiving {",
                          absl::StrJoin(call.recv_bytes, ", "), "} bytes");
    case Kind::kBarrier:
      return "Barrier";
    case Kind::kSplit:
      return "Split";
  }
  return "unknown call";
}

bool Fits(const Call& a, int rank_a, const Call& b, int rank_b) {
  if (a.kind != b.kind) return false;
  switch (a.kind) {
    case Kind::kAllGather:
      return std::equal(a.send_bytes.begin(), a.send_bytes.end(), b.send_bytes.begin(), b.send_bytes.end());
    case Kind::kAllReduce:
      return a.count == b.count && a.type == b.type && a.op == b.op;
    case Kind::kBroadcast:
      return a.count == b.count && a.root == b.root;
    case Kind::kAllToAll:
      return a.send_bytes[rank_b] == b.recv_bytes[rank_a] && b.send_bytes[rank_a] == a.recv_bytes[rank_b];
    case Kind::kBarrier:
    case Kind::kSplit:
      return true;
  }
  return false;
}

// A group and all groups split from it share one fate: lock, wake-ups and first error. Lock order: only this
// one.
struct Family {
  std::mutex mutex;
  std::condition_variable changed;
  internal::FirstError error;

  void Break(const absl::Status& reason) {
    std::lock_guard<std::mutex> lock(mutex);
    error.Break(reason);
    changed.notify_all();
  }
};

class Group {
 public:
  Group(std::shared_ptr<Family> family, int size, std::chrono::milliseconds timeout)
      : family_(std::move(family)), size_(size), timeout_(timeout), calls_(size), scratch_(size) {}

  Family& family() { return *family_; }
  int size() const { return size_; }
  const Call& call(int rank) const { return *calls_[rank]; }
  std::vector<uint8_t>& scratch(int rank) { return scratch_[rank]; }

  // Posts `mine` and waits until every rank has posted one that fits. OK: copying may start, and Leave must
  // follow.
  absl::Status Meet(int rank, const Call& mine) {
    std::unique_lock<std::mutex> lock(family_->mutex);
    if (family_->error.broken()) return family_->error.status();
    calls_[rank] = &mine;
    if (++met_.arrived == size_) {
      if (absl::Status fit = CheckFit(); !fit.ok()) {
        --met_.arrived;
        return BreakLocked(fit);
      }
      met_.Complete();
      family_->changed.notify_all();
      return absl::OkStatus();
    }
    const int64_t generation = met_.generation;
    const auto over = [&] { return met_.generation != generation || family_->error.broken(); };
    const bool in_time = family_->changed.wait_until(lock, Clock::now() + timeout_, over);
    if (met_.generation != generation) return absl::OkStatus();  // all were there before anything broke
    absl::Status late = in_time ? absl::OkStatus() : Late(rank, mine);
    --met_.arrived;
    calls_[rank] = nullptr;
    return in_time ? family_->error.status() : BreakLocked(late);
  }

  // Waits until every rank has come here since they met.
  void Leave() {
    std::unique_lock<std::mutex> lock(family_->mutex);
    if (++left_.arrived == size_) {
      left_.Complete();
      std::fill(calls_.begin(), calls_.end(), nullptr);
      children_.clear();
      family_->changed.notify_all();
      return;
    }
    const int64_t generation = left_.generation;
    family_->changed.wait(lock, [&] { return left_.generation != generation; });
  }

  // Between Meet and Leave of a Split: the group of `color`, made by whoever asks first.
  std::shared_ptr<Group> Child(int color, int child_size) {
    std::lock_guard<std::mutex> lock(family_->mutex);
    std::shared_ptr<Group>& child = children_[color];
    if (child == nullptr) child = std::make_shared<Group>(family_, child_size, timeout_);
    return child;
  }

 private:
  struct Gate {
    int arrived = 0;
    int64_t generation = 0;
    void Complete() {
      arrived = 0;
      ++generation;
    }
  };

  absl::Status BreakLocked(const absl::Status& reason) {
    family_->error.Break(reason);
    family_->changed.notify_all();
    return family_->error.status();
  }

  absl::Status CheckFit() const {
    for (int a = 0; a < size_; ++a) {
      for (int b = a + 1; b < size_; ++b) {
        if (Fits(*calls_[a], a, *calls_[b], b)) continue;
        return absl::InternalError(absl::StrCat("mismatched calls: rank ", a, " called ",
                                                Describe(*calls_[a]), ", rank ", b, " called ",
                                                Describe(*calls_[b])));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Late(int rank, const Call& mine) const {
    std::vector<int> missing;
    for (int r = 0; r < size_; ++r) {
      if (calls_[r] == nullptr) missing.push_back(r);
    }
    return absl::DeadlineExceededError(absl::StrCat("rank ", rank, " waited ", timeout_.count(), " ms in ",
                                                    Describe(mine), " for rank ",
                                                    absl::StrJoin(missing, ", ")));
  }

  const std::shared_ptr<Family> family_;
  const int size_;
  const std::chrono::milliseconds timeout_;
  std::vector<const Call*> calls_;  // of the ranks that wait, or copy
  std::vector<std::vector<uint8_t>> scratch_;
  Gate met_;
  Gate left_;
  std::map<int, std::shared_ptr<Group>> children_;
};

class InProcessCommunicator final : public Communicator {
 public:
  InProcessCommunicator(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  std::string_view name() const override { return "in-process"; }

  absl::Status AllGather(const void* send, void* recv, std::span<const int64_t> counts_bytes,
                         Stream&) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(internal::CheckAllGather(counts_bytes, size())));
    const Call mine{.kind = Kind::kAllGather, .send = send, .recv = recv, .send_bytes = counts_bytes};
    LF_RETURN_IF_ERROR(Meet(mine));
    uint8_t* to = static_cast<uint8_t*>(recv);
    for (int r = 0; r < size(); ++r) {
      Copy(to, group_->call(r).send, counts_bytes[r]);
      to += counts_bytes[r];
    }
    bytes_sent_ += counts_bytes[rank_] * (size() - 1);
    group_->Leave();
    return absl::OkStatus();
  }

  absl::Status AllReduce(void* data, int64_t count, ReduceType type, ReduceOp op, Stream&) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(internal::CheckReduce(count, type, op)));
    const Call mine{.kind = Kind::kAllReduce, .recv = data, .count = count, .type = type, .op = op};
    LF_RETURN_IF_ERROR(Meet(mine));
    const int64_t bytes = count * internal::ReduceTypeBytes(type);
    std::vector<uint8_t>& result = group_->scratch(rank_);
    result.resize(static_cast<size_t>(bytes));
    Copy(result.data(), group_->call(0).recv, bytes);
    for (int r = 1; r < size(); ++r) internal::Reduce(result.data(), group_->call(r).recv, count, type, op);
    bytes_sent_ += bytes * (size() - 1);
    group_->Leave();  // every rank has read every input: they may be overwritten
    Copy(data, result.data(), bytes);
    return absl::OkStatus();
  }

  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream&) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(internal::CheckBroadcast(bytes, root, size())));
    const Call mine{.kind = Kind::kBroadcast, .recv = data, .count = bytes, .root = root};
    LF_RETURN_IF_ERROR(Meet(mine));
    Copy(data, group_->call(root).recv, bytes);
    if (rank_ == root) bytes_sent_ += bytes * (size() - 1);
    group_->Leave();
    return absl::OkStatus();
  }

  absl::Status AllToAll(const void* send, std::span<const int64_t> send_bytes, void* recv,
                        std::span<const int64_t> recv_bytes, Stream&) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(internal::CheckAllToAll(send_bytes, recv_bytes, rank_, size())));
    const Call mine{.kind = Kind::kAllToAll,
                    .send = send,
                    .recv = recv,
                    .send_bytes = send_bytes,
                    .recv_bytes = recv_bytes};
    LF_RETURN_IF_ERROR(Meet(mine));
    uint8_t* to = static_cast<uint8_t*>(recv);
    for (int r = 0; r < size(); ++r) {
      const Call& peer = group_->call(r);
      int64_t offset = 0;
      for (int before = 0; before < rank_; ++before) offset += peer.send_bytes[before];
      Copy(to, static_cast<const uint8_t*>(peer.send) + offset, recv_bytes[r]);
      to += recv_bytes[r];
      if (r != rank_) bytes_sent_ += send_bytes[r];
    }
    group_->Leave();
    return absl::OkStatus();
  }

  absl::Status Barrier(Stream&) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(absl::OkStatus()));
    const Call mine{.kind = Kind::kBarrier};
    LF_RETURN_IF_ERROR(Meet(mine));
    group_->Leave();
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(absl::OkStatus()));
    const Call mine{.kind = Kind::kSplit, .color = color, .key = key};
    LF_RETURN_IF_ERROR(Meet(mine));
    int child_size = 0;
    int child_rank = 0;
    for (int r = 0; r < size(); ++r) {
      const Call& peer = group_->call(r);
      if (peer.color != color) continue;
      ++child_size;
      if (std::pair(peer.key, r) < std::pair(key, rank_)) ++child_rank;
    }
    auto child = std::make_unique<InProcessCommunicator>(group_->Child(color, child_size), child_rank);
    group_->Leave();
    return child;
  }

  void Abort(const absl::Status& reason) override { group_->family().Break(reason); }
  absl::Status Health() override { return group_->family().error.status(); }
  int64_t bytes_sent() const override { return bytes_sent_.load(std::memory_order_relaxed); }
  double seconds() const override {
    return static_cast<double>(nanoseconds_.load(std::memory_order_relaxed)) * 1e-9;
  }

 private:
  // Adds the life of a call to seconds().
  class Timer {
   public:
    explicit Timer(InProcessCommunicator& owner) : owner_(owner), start_(Clock::now()) {}
    ~Timer() { owner_.nanoseconds_ += std::chrono::nanoseconds(Clock::now() - start_).count(); }

   private:
    InProcessCommunicator& owner_;
    const Clock::time_point start_;
  };

  static void Copy(void* to, const void* from, int64_t bytes) {
    if (bytes > 0 && to != from) std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  // Peers wait for this rank's call, so a bad argument here ends the group.
  absl::Status Usable(const absl::Status& arguments) {
    LF_RETURN_IF_ERROR(report_.Check(Health(), name(), rank_));
    if (!arguments.ok()) group_->family().Break(Annotate(arguments, absl::StrCat("rank ", rank_)));
    return arguments;
  }

  absl::Status Meet(const Call& mine) {
    if (group_->Meet(rank_, mine).ok()) return absl::OkStatus();
    return report_.Check(Health(), name(), rank_);
  }

  const std::shared_ptr<Group> group_;
  const int rank_;
  internal::ErrorReport report_;
  std::atomic<int64_t> bytes_sent_{0};
  std::atomic<int64_t> nanoseconds_{0};
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> CreateInProcessCommunicators(int size,
                                                                        CommunicatorOptions options) {
  const auto group = std::make_shared<Group>(std::make_shared<Family>(), size, options.timeout);
  std::vector<std::unique_ptr<Communicator>> ranks;
  ranks.reserve(size);
  for (int rank = 0; rank < size; ++rank)
    ranks.push_back(std::make_unique<InProcessCommunicator>(group, rank));
  return ranks;
}

}  // namespace longfill
