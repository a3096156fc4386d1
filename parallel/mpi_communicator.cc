// The only file that includes mpi.h. Every collective is built from MPI_Isend and MPI_Irecv between pairs and
// MPI_Test polled up to the deadline: MPI's own collectives (and MPI_Comm_split) can neither time out nor be
// ended.
//
// - Messages go through staging blocks that belong to the process, so MPI never holds a pointer into a
// caller's memory.
//   Blocks of a call that failed are never freed or used again, since a late peer may still write them.
// - Each message stream of a call starts with a header, so that mismatched calls are an error instead of a
// hang.
// - All groups share MPI_COMM_WORLD; a group is a list of world ranks and a tag, so that making one is an
// ordinary
//   exchange with a deadline. Tag 0 carries aborts.
// - MPI_THREAD_SERIALIZED and one lock: Abort may come from any thread while another polls. All calls under
// the lock are
//   non-blocking, so MPI_THREAD_MULTIPLE would buy nothing.

#include "parallel/mpi_communicator.h"

#include <mpi.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "parallel/communicator_internal.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kAbortTag = 0;
constexpr int kWorldTag = 1;
constexpr size_t kMessagesInFlight = 2;  // per peer and direction: one is copied while the other travels
constexpr int64_t kMaxMpiCount = int64_t{1} << 30;
constexpr std::chrono::milliseconds kAbortGrace{100};  // for aborts to leave before _exit

enum class Kind : uint8_t {
  kAllGather,
  kReduceScatter,
  kReduceGather,
  kBroadcast,
  kAllToAll,
  kBarrier,
  kSplit
};

std::string_view KindName(uint8_t kind) {
  switch (static_cast<Kind>(kind)) {
    case Kind::kAllGather:
      return "AllGather";
    case Kind::kReduceScatter:
    case Kind::kReduceGather:
      return "AllReduce";
    case Kind::kBroadcast:
      return "Broadcast";
    case Kind::kAllToAll:
      return "AllToAll";
    case Kind::kBarrier:
      return "Barrier";
    case Kind::kSplit:
      return "Split";
  }
  return "unknown call";
}

// In front of the first message of a piece.
struct Header {
  uint64_t call_number = 0;  // of this group
  int64_t bytes = 0;         // of the piece
  uint8_t kind = 0;
  uint8_t type = 0;  // AllReduce
  uint8_t op = 0;
  uint8_t unused = 0;
  int32_t root = 0;
};
static_assert(sizeof(Header) == 24);

struct AbortMessage {
  int32_t code = 0;
  int32_t origin = 0;
  char text[504] = {};
};

std::string MpiText(int error) {
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(error, text, &length);
  return std::string(text, static_cast<size_t>(length));
}

using Block = std::vector<uint8_t>;  // of max_message_bytes

// What the communicators of one process share.
class MpiProcess {
 public:
  MpiProcess(const MpiOptions& options, int rank, int size) : options_(options), rank_(rank), size_(size) {}

  const MpiOptions& options() const { return options_; }
  int rank() const { return rank_; }
  int size() const { return size_; }
  internal::FirstError& error() { return error_; }
  std::mutex& mutex() { return mutex_; }

  // Tags of groups: equal tags never meet at a pair of ranks, since every rank of a new group has taken the
  // tag.
  int next_tag() const { return next_tag_; }
  void TakeTag(int tag) { next_tag_ = tag + 1; }
  int max_tag() const { return max_tag_; }

  void Listen() {
    int* bound = nullptr;
    int found = 0;
    MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &bound, &found);
    max_tag_ = found != 0 ? *bound : 32767;
    MPI_Irecv(&incoming_, sizeof(incoming_), MPI_BYTE, MPI_ANY_SOURCE, kAbortTag, MPI_COMM_WORLD,
              &incoming_request_);
  }

  // Under the lock: takes in a peer's abort, if one has come.
  void PollAbort() {
    int arrived = 0;
    if (incoming_request_ == MPI_REQUEST_NULL) return;
    if (MPI_Test(&incoming_request_, &arrived, MPI_STATUS_IGNORE) != MPI_SUCCESS || arrived == 0) return;
    incoming_.text[sizeof(incoming_.text) - 1] = '\0';
    error_.Break(absl::Status(static_cast<absl::StatusCode>(incoming_.code),
                              absl::StrCat("rank ", incoming_.origin, ": ", incoming_.text)));
  }

  // Ends the group here and tells every other rank. Not under the lock.
  void Break(const absl::Status& reason) {
    if (!error_.Break(reason)) return;
    const absl::Status status = error_.status();
    outgoing_.code = static_cast<int32_t>(status.code());
    outgoing_.origin = rank_;
    const size_t length = std::min(status.message().size(), sizeof(outgoing_.text) - 1);
    std::memcpy(outgoing_.text, status.message().data(), length);
    std::lock_guard<std::mutex> lock(mutex_);
    abort_requests_.assign(static_cast<size_t>(size_), MPI_REQUEST_NULL);
    for (int r = 0; r < size_; ++r) {
      if (r == rank_) continue;
      MPI_Isend(&outgoing_, sizeof(outgoing_), MPI_BYTE, r, kAbortTag, MPI_COMM_WORLD, &abort_requests_[r]);
    }
  }

  // A short time for aborts to get on their way, then the end of the process.
  [[noreturn]] void HardExit() {
    const Clock::time_point deadline = Clock::now() + kAbortGrace;
    for (int sent = 0; sent == 0 && Clock::now() < deadline;) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (abort_requests_.empty()) break;
        if (MPI_Testall(size_, abort_requests_.data(), &sent, MPI_STATUSES_IGNORE) != MPI_SUCCESS) break;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    std::fflush(nullptr);
    _exit(options_.broken_exit_status);
  }

  void Finalize() {
    if (incoming_request_ != MPI_REQUEST_NULL) {
      MPI_Cancel(&incoming_request_);
      // NOLINTNEXTLINE(clang-analyzer-optin.mpi.MPI-Checker): Listen made the request
      MPI_Wait(&incoming_request_, MPI_STATUS_IGNORE);
    }
    MPI_Finalize();
  }

  // Under the lock.
  std::unique_ptr<Block> TakeBlock() {
    if (free_blocks_.empty()) return std::make_unique<Block>(static_cast<size_t>(options_.max_message_bytes));
    std::unique_ptr<Block> block = std::move(free_blocks_.back());
    free_blocks_.pop_back();
    return block;
  }
  void ReturnBlock(std::unique_ptr<Block> block) { free_blocks_.push_back(std::move(block)); }

 private:
  const MpiOptions options_;
  const int rank_;
  const int size_;
  std::mutex mutex_;  // around every MPI call
  internal::FirstError error_;
  int next_tag_ = kWorldTag + 1;
  int max_tag_ = 0;
  AbortMessage incoming_;
  AbortMessage outgoing_;  // written once, then MPI's until the process ends or MPI_Finalize returns
  MPI_Request incoming_request_ = MPI_REQUEST_NULL;
  std::vector<MPI_Request> abort_requests_;
  std::vector<std::unique_ptr<Block>> free_blocks_;
};

// What one call moves between this rank and one peer.
struct Piece {
  const uint8_t* send = nullptr;
  int64_t send_bytes = -1;  // -1: no message, not even an empty one
  uint8_t* recv = nullptr;
  int64_t recv_bytes = -1;
};

// One direction of a piece: a FIFO of messages, the first with a header.
class Lane {
 public:
  Lane(MpiProcess& process, int world_peer, int tag, int64_t bytes)
      : process_(process), peer_(world_peer), tag_(tag), bytes_(bytes), finished_(bytes < 0) {}
  Lane(Lane&&) = default;
  // A call that failed leaves its blocks to MPI for ever.
  ~Lane() {
    for (Message& message : in_flight_) static_cast<void>(message.block.release());
  }

  bool finished() const { return finished_; }

 protected:
  struct Message {
    std::unique_ptr<Block> block;
    MPI_Request request = MPI_REQUEST_NULL;
    int64_t begin = 0;  // of the piece's bytes
    int64_t bytes = 0;
    int64_t header_bytes = 0;
  };

  bool CanStart() const {
    return (next_ < bytes_ || first_) && in_flight_.size() < kMessagesInFlight && !finished_;
  }

  // Takes the next stretch of the piece.
  Message& Append() {
    Message message;
    message.block = process_.TakeBlock();
    message.header_bytes = first_ ? static_cast<int64_t>(sizeof(Header)) : 0;
    message.begin = next_;
    message.bytes =
        std::min(bytes_ - next_, static_cast<int64_t>(message.block->size()) - message.header_bytes);
    next_ += message.bytes;
    first_ = false;
    in_flight_.push_back(std::move(message));
    return in_flight_.back();
  }

  // Whether the oldest message is through.
  absl::StatusOr<bool> TestOldest(MPI_Status* status) {
    int done = 0;
    const int result = MPI_Test(&in_flight_.front().request, &done, status);
    if (result != MPI_SUCCESS) {
      return absl::UnavailableError(absl::StrCat("MPI with rank ", peer_, ": ", MpiText(result)));
    }
    return done != 0;
  }

  void DropOldest() {
    process_.ReturnBlock(std::move(in_flight_.front().block));
    in_flight_.pop_front();
    finished_ = in_flight_.empty() && next_ >= bytes_ && !first_;
  }

  MpiProcess& process_;
  const int peer_;
  const int tag_;
  const int64_t bytes_;
  int64_t next_ = 0;
  bool first_ = true;
  bool finished_ = false;
  std::deque<Message> in_flight_;
};

class SendLane : public Lane {
 public:
  SendLane(MpiProcess& process, int world_peer, int tag, const uint8_t* data, const Header& header)
      : Lane(process, world_peer, tag, header.bytes), data_(data), header_(header) {}

  absl::StatusOr<bool> Progress() {
    bool moved = false;
    while (!in_flight_.empty()) {
      LF_ASSIGN_OR_RETURN(const bool done, TestOldest(MPI_STATUS_IGNORE));
      if (!done) break;
      DropOldest();
      moved = true;
    }
    while (CanStart()) {
      Message& message = Append();
      uint8_t* to = message.block->data();
      if (message.header_bytes > 0) std::memcpy(to, &header_, sizeof(header_));
      if (message.bytes > 0) std::memcpy(to + message.header_bytes, data_ + message.begin, message.bytes);
      // NOLINTNEXTLINE(clang-analyzer-optin.mpi.MPI-Checker): TestOldest completes the request
      const int result = MPI_Isend(to, static_cast<int>(message.header_bytes + message.bytes), MPI_BYTE,
                                   peer_, tag_, MPI_COMM_WORLD, &message.request);
      if (result != MPI_SUCCESS) {
        return absl::UnavailableError(absl::StrCat("MPI send to rank ", peer_, ": ", MpiText(result)));
      }
      moved = true;
    }
    return moved;
  }

 private:
  const uint8_t* data_;
  Header header_;
};

class RecvLane : public Lane {
 public:
  RecvLane(MpiProcess& process, int world_peer, int tag, uint8_t* data, const Header& expected)
      : Lane(process, world_peer, tag, expected.bytes), data_(data), expected_(expected) {}

  absl::StatusOr<bool> Progress() {
    bool moved = false;
    while (CanStart()) {
      Message& message = Append();
      // Room for a whole message also where fewer bytes are due, so that a mismatch shows in the header.
      // NOLINTNEXTLINE(clang-analyzer-optin.mpi.MPI-Checker): TestOldest completes the request
      const int result = MPI_Irecv(message.block->data(), static_cast<int>(message.block->size()), MPI_BYTE,
                                   peer_, tag_, MPI_COMM_WORLD, &message.request);
      if (result != MPI_SUCCESS) {
        return absl::UnavailableError(absl::StrCat("MPI receive from rank ", peer_, ": ", MpiText(result)));
      }
    }
    while (!in_flight_.empty()) {
      MPI_Status status;
      LF_ASSIGN_OR_RETURN(const bool done, TestOldest(&status));
      if (!done) break;
      LF_RETURN_IF_ERROR(Unpack(status));
      DropOldest();
      moved = true;
    }
    return moved;
  }

 private:
  absl::Status Unpack(const MPI_Status& status) {
    const Message& message = in_flight_.front();
    int count = 0;
    MPI_Get_count(&status, MPI_BYTE, &count);
    if (message.header_bytes > 0) {
      Header header;
      if (count < static_cast<int>(sizeof(header)))
        return Mismatch(absl::StrCat("a message of ", count, " bytes"));
      std::memcpy(&header, message.block->data(), sizeof(header));
      if (std::memcmp(&header, &expected_, sizeof(header)) != 0) return Mismatch(Describe(header));
    }
    if (count != message.header_bytes + message.bytes)
      return Mismatch(absl::StrCat("a message of ", count, " bytes"));
    if (message.bytes > 0) {
      std::memcpy(data_ + message.begin, message.block->data() + message.header_bytes, message.bytes);
    }
    return absl::OkStatus();
  }

  static std::string Describe(const Header& header) {
    const std::string_view name = KindName(header.kind);
    return absl::StrCat("call ", header.call_number, ", ", absl::string_view(name.data(), name.size()),
                        " of ", header.bytes, " bytes (type ", header.type, ", operation ", header.op,
                        ", root ", header.root, ")");
  }

  absl::Status Mismatch(const std::string& got) const {
    return absl::InternalError(absl::StrCat("mismatched calls: rank ", process_.rank(), " is in ",
                                            Describe(expected_), ", rank ", peer_, " sent ", got));
  }

  uint8_t* data_;
  Header expected_;
};

// Spins a little, then gives the core away: ranks may share cores.
class BackOff {
 public:
  void Reset() { idle_ = 0; }
  void Wait() {
    ++idle_;
    if (idle_ < 16) return;
    if (idle_ < 64) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(std::min(idle_, 1000)));
    }
  }

 private:
  int idle_ = 0;
};

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(std::shared_ptr<MpiProcess> process, std::vector<int> members, int rank, int tag)
      : process_(std::move(process)), members_(std::move(members)), rank_(rank), tag_(tag) {}

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(members_.size()); }
  std::string_view name() const override { return "mpi"; }

  absl::Status AllGather(const void* send, void* recv, std::span<const int64_t> counts_bytes,
                         Stream&) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(internal::CheckAllGather(counts_bytes, size())));
    return Gather(Kind::kAllGather, send, recv, counts_bytes, {}, {});
  }

  // Each rank reduces one stretch, in rank order, and gives it to all.
  absl::Status AllReduce(void* data, int64_t count, ReduceType type, ReduceOp op, Stream&) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(internal::CheckReduce(count, type, op)));
    const int64_t width = internal::ReduceTypeBytes(type);
    const auto begin = [&](int r) { return count * r / size() * width; };
    const int64_t mine = begin(rank_ + 1) - begin(rank_);
    scratch_.resize(static_cast<size_t>(mine * size()));
    std::vector<Piece> pieces(size());
    std::vector<int64_t> stretches(size());
    uint8_t* bytes = static_cast<uint8_t*>(data);
    for (int r = 0; r < size(); ++r) {
      stretches[r] = begin(r + 1) - begin(r);
      pieces[r] = {bytes + begin(r), stretches[r], scratch_.data() + r * mine, mine};
    }
    LF_RETURN_IF_ERROR(Exchange(Kind::kReduceScatter, pieces, type, op));
    for (int r = 1; r < size(); ++r) {
      internal::Reduce(scratch_.data(), scratch_.data() + r * mine, mine / width, type, op);
    }
    return Gather(Kind::kReduceGather, scratch_.data(), data, stretches, type, op);
  }

  absl::Status Broadcast(void* data, int64_t bytes, int root, Stream&) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(internal::CheckBroadcast(bytes, root, size())));
    std::vector<Piece> pieces(size());
    uint8_t* const begin = static_cast<uint8_t*>(data);
    if (rank_ == root) {
      for (int r = 0; r < size(); ++r) {
        if (r != root) pieces[r] = {.send = begin, .send_bytes = bytes};
      }
    } else {
      pieces[root] = {.recv = begin, .recv_bytes = bytes};
    }
    return Exchange(Kind::kBroadcast, pieces, {}, {}, root);
  }

  absl::Status AllToAll(const void* send, std::span<const int64_t> send_bytes, void* recv,
                        std::span<const int64_t> recv_bytes, Stream&) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(internal::CheckAllToAll(send_bytes, recv_bytes, rank_, size())));
    std::vector<Piece> pieces(size());
    const uint8_t* from = static_cast<const uint8_t*>(send);
    uint8_t* to = static_cast<uint8_t*>(recv);
    for (int r = 0; r < size(); ++r) {
      pieces[r] = {from, send_bytes[r], to, recv_bytes[r]};
      from += send_bytes[r];
      to += recv_bytes[r];
    }
    return Exchange(Kind::kAllToAll, pieces);
  }

  absl::Status Barrier(Stream&) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(absl::OkStatus()));
    return Exchange(Kind::kBarrier, std::vector<Piece>(size(), Piece{nullptr, 0, nullptr, 0}));
  }

  absl::StatusOr<std::unique_ptr<Communicator>> Split(int color, int key) override {
    const Timer timer(*this);
    LF_RETURN_IF_ERROR(Usable(absl::OkStatus()));
    struct Wish {
      int32_t color, key, rank, tag;
    };
    const Wish mine{color, key, rank_, process_->next_tag()};
    std::vector<Wish> wishes(size());
    LF_RETURN_IF_ERROR(
        Gather(Kind::kSplit, &mine, wishes.data(), std::vector<int64_t>(size(), sizeof(Wish)), {}, {}));
    int tag = 0;
    for (const Wish& wish : wishes) tag = std::max(tag, wish.tag);
    if (tag > process_->max_tag()) {
      return absl::ResourceExhaustedError(absl::StrCat("Split: MPI has no tag above ", process_->max_tag()));
    }
    process_->TakeTag(tag);
    std::erase_if(wishes, [&](const Wish& wish) { return wish.color != color; });
    std::sort(wishes.begin(), wishes.end(), [](const Wish& a, const Wish& b) {
      return std::pair(a.key, a.rank) < std::pair(b.key, b.rank);
    });
    std::vector<int> members;
    int child_rank = 0;
    for (const Wish& wish : wishes) {
      if (wish.rank == rank_) child_rank = static_cast<int>(members.size());
      members.push_back(members_[wish.rank]);
    }
    return std::make_unique<MpiCommunicator>(process_, std::move(members), child_rank, tag);
  }

  void Abort(const absl::Status& reason) override { process_->Break(reason); }
  absl::Status Health() override {
    if (!process_->error().broken()) {
      std::lock_guard<std::mutex> lock(process_->mutex());
      process_->PollAbort();
    }
    return process_->error().status();
  }
  int64_t bytes_sent() const override { return bytes_sent_.load(std::memory_order_relaxed); }
  double seconds() const override {
    return static_cast<double>(nanoseconds_.load(std::memory_order_relaxed)) * 1e-9;
  }

 private:
  // Adds the life of a call to seconds().
  class Timer {
   public:
    explicit Timer(MpiCommunicator& owner) : owner_(owner), start_(Clock::now()) {}
    ~Timer() { owner_.nanoseconds_ += std::chrono::nanoseconds(Clock::now() - start_).count(); }

   private:
    MpiCommunicator& owner_;
    const Clock::time_point start_;
  };

  // Peers wait for this rank's call, so a bad argument here ends the group.
  absl::Status Usable(const absl::Status& arguments) {
    LF_RETURN_IF_ERROR(report_.Check(Health(), name(), rank_));
    if (!arguments.ok()) process_->Break(arguments);
    return arguments;
  }

  absl::Status Gather(Kind kind, const void* send, void* recv, std::span<const int64_t> counts_bytes,
                      ReduceType type, ReduceOp op) {
    std::vector<Piece> pieces(size());
    uint8_t* to = static_cast<uint8_t*>(recv);
    for (int r = 0; r < size(); ++r) {
      pieces[r] = {static_cast<const uint8_t*>(send), counts_bytes[rank_], to, counts_bytes[r]};
      to += counts_bytes[r];
    }
    return Exchange(kind, pieces, type, op);
  }

  // Moves all pieces, or ends the group.
  absl::Status Exchange(Kind kind, std::span<const Piece> pieces, ReduceType type = {}, ReduceOp op = {},
                        int root = 0) {
    absl::Status status = Move(kind, pieces, type, op, root);
    if (status.ok()) return status;
    process_->Break(status);
    return report_.Check(Health(), name(), rank_);
  }

  absl::Status Move(Kind kind, std::span<const Piece> pieces, ReduceType type, ReduceOp op, int root) {
    const Clock::time_point deadline = Clock::now() + process_->options().communicator.timeout;
    ++call_number_;
    Header header{.call_number = call_number_,
                  .kind = static_cast<uint8_t>(kind),
                  .type = static_cast<uint8_t>(type),
                  .op = static_cast<uint8_t>(op),
                  .root = root};
    std::vector<SendLane> sends;
    std::vector<RecvLane> recvs;
    sends.reserve(pieces.size());
    recvs.reserve(pieces.size());
    for (int r = 0; r < size(); ++r) {
      const Piece& piece = pieces[r];
      if (r == rank_) {
        if (piece.send_bytes > 0 && piece.send != piece.recv)
          std::memcpy(piece.recv, piece.send, piece.send_bytes);
        continue;
      }
      header.bytes = piece.send_bytes;
      sends.emplace_back(*process_, members_[r], tag_, piece.send, header);
      header.bytes = piece.recv_bytes;
      recvs.emplace_back(*process_, members_[r], tag_, piece.recv, header);
      bytes_sent_ += std::max(piece.send_bytes, int64_t{0});
    }
    BackOff back_off;
    while (true) {
      LF_ASSIGN_OR_RETURN(const Step step, OnePass(sends, recvs));
      if (step == Step::kFinished) return absl::OkStatus();
      if (step == Step::kMoved) {
        back_off.Reset();
      } else if (Clock::now() > deadline) {
        return Late(kind, sends, recvs);
      } else {
        back_off.Wait();
      }
    }
  }

  enum class Step { kIdle, kMoved, kFinished };

  absl::StatusOr<Step> OnePass(std::vector<SendLane>& sends, std::vector<RecvLane>& recvs) {
    std::lock_guard<std::mutex> lock(process_->mutex());
    process_->PollAbort();
    if (process_->error().broken()) return process_->error().status();
    bool moved = false;
    bool finished = true;
    for (RecvLane& lane : recvs) {
      if (lane.finished()) continue;
      LF_ASSIGN_OR_RETURN(const bool lane_moved, lane.Progress());
      moved |= lane_moved;
      finished &= lane.finished();
    }
    for (SendLane& lane : sends) {
      if (lane.finished()) continue;
      LF_ASSIGN_OR_RETURN(const bool lane_moved, lane.Progress());
      moved |= lane_moved;
      finished &= lane.finished();
    }
    return finished ? Step::kFinished : moved ? Step::kMoved : Step::kIdle;
  }

  absl::Status Late(Kind kind, const std::vector<SendLane>& sends, const std::vector<RecvLane>& recvs) const {
    std::string peers;
    int lane = 0;
    for (int r = 0; r < size(); ++r) {
      if (r == rank_) continue;
      if (!sends[lane].finished() || !recvs[lane].finished())
        absl::StrAppend(&peers, peers.empty() ? "" : ", ", r);
      ++lane;
    }
    const std::string_view call = KindName(static_cast<uint8_t>(kind));
    return absl::DeadlineExceededError(
        absl::StrCat("rank ", rank_, " waited ", process_->options().communicator.timeout.count(), " ms in ",
                     absl::string_view(call.data(), call.size()), " for rank ", peers));
  }

  const std::shared_ptr<MpiProcess> process_;
  const std::vector<int> members_;  // world ranks
  const int rank_;
  const int tag_;
  uint64_t call_number_ = 0;
  std::vector<uint8_t> scratch_;
  internal::ErrorReport report_;
  std::atomic<int64_t> bytes_sent_{0};
  std::atomic<int64_t> nanoseconds_{0};
};

// "Open MPI 4.1.4"
std::string CompiledWith() {
#if defined(OPEN_MPI)
  return absl::StrCat("Open MPI ", OMPI_MAJOR_VERSION, ".", OMPI_MINOR_VERSION, ".", OMPI_RELEASE_VERSION);
#elif defined(MPICH_VERSION)
  return absl::StrCat("MPICH ", MPICH_VERSION);
#else
  return absl::StrCat("MPI ", MPI_VERSION, ".", MPI_SUBVERSION);
#endif
}

std::string ThreadLevelName(int level) {
  switch (level) {
    case MPI_THREAD_SINGLE:
      return "MPI_THREAD_SINGLE";
    case MPI_THREAD_FUNNELED:
      return "MPI_THREAD_FUNNELED";
    case MPI_THREAD_SERIALIZED:
      return "MPI_THREAD_SERIALIZED";
    default:
      return "MPI_THREAD_MULTIPLE";
  }
}

}  // namespace

MpiFacts ReadMpiFacts() {
  MpiFacts facts;
  facts.compiled_with = CompiledWith();
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);  // the one call that needs no MPI_Init
  const std::string_view all(text, static_cast<size_t>(length));
  facts.library = all.substr(0, all.find_first_of(",\n"));
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  int level = MPI_THREAD_SINGLE;
  if (initialized != 0 && finalized == 0 && MPI_Query_thread(&level) == MPI_SUCCESS) {
    facts.thread_level = ThreadLevelName(level);
  }
  return facts;
}

struct MpiSession::Impl {
  std::shared_ptr<MpiProcess> process;  // nullptr without a launcher
  std::unique_ptr<Communicator> world;
};

MpiSession::MpiSession(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

absl::StatusOr<std::unique_ptr<MpiSession>> MpiSession::Start(const MpiOptions& options) {
  auto impl = std::make_unique<Impl>();
  if (!options.launched) {
    impl->world = CreateSingleCommunicator();
    return std::unique_ptr<MpiSession>(new MpiSession(std::move(impl)));
  }
  if (options.max_message_bytes <= static_cast<int64_t>(sizeof(Header)) ||
      options.max_message_bytes > kMaxMpiCount) {
    return absl::InvalidArgumentError(absl::StrCat("max_message_bytes is ", options.max_message_bytes,
                                                   ", not in (", sizeof(Header), ", ", kMaxMpiCount, "]"));
  }
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (initialized != 0) return absl::FailedPreconditionError("MPI was already started in this process");
  int provided = 0;
  if (const int result = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided);
      result != MPI_SUCCESS) {
    return absl::UnavailableError(absl::StrCat("MPI_Init_thread: ", MpiText(result)));
  }
  if (provided < MPI_THREAD_SERIALIZED) {
    MPI_Finalize();
    return absl::FailedPreconditionError(absl::StrCat(
        "MPI gives the thread level ", ThreadLevelName(provided), ", needed is MPI_THREAD_SERIALIZED"));
  }
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  int rank = 0;
  int size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  impl->process = std::make_shared<MpiProcess>(options, rank, size);
  impl->process->Listen();
  std::vector<int> members(size);
  std::iota(members.begin(), members.end(), 0);
  impl->world = std::make_unique<MpiCommunicator>(impl->process, std::move(members), rank, kWorldTag);
  return std::unique_ptr<MpiSession>(new MpiSession(std::move(impl)));
}

MpiSession::~MpiSession() {
  if (impl_->process == nullptr) return;
  CpuStream stream;
  const bool intact = !broken() && impl_->world->Barrier(stream).ok();
  if (!intact) impl_->process->HardExit();
  impl_->process->Finalize();
}

Communicator& MpiSession::world() { return *impl_->world; }

bool MpiSession::broken() const { return impl_->process != nullptr && impl_->process->error().broken(); }

}  // namespace longfill
