#include "parallel/watchdog.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr size_t kTokenBytes = 16;

enum class FrameType : uint8_t { kHeartbeat = 1, kLost, kFlag, kGoodbye };

// Everything after the hello is made of these. Both ends run the same build.
struct Frame {
  FrameType type = FrameType::kHeartbeat;
  uint8_t unused[3] = {};
  int32_t rank = 0;    // kLost
  uint64_t value = 0;  // kFlag
};
static_assert(sizeof(Frame) == 16);

struct Hello {
  char token[kTokenBytes] = {};
  int32_t rank = 0;
};
static_assert(sizeof(Hello) == 20);

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }
  void Reset() { Fd closed(std::exchange(fd_, -1)); }

 private:
  int fd_ = -1;
};

absl::Status SystemError(std::string_view what) {
  const int error = errno;
  return absl::UnavailableError(
      absl::StrCat("watchdog: ", absl::string_view(what.data(), what.size()), ": ", std::strerror(error)));
}

int MillisecondsUntil(Clock::time_point when) {
  const auto left = std::chrono::ceil<milliseconds>(when - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 3600 * 1000));
}

bool PollOne(int fd, short events, Clock::time_point deadline) {
  pollfd entry{fd, events, 0};
  int result = 0;
  do {
    result = poll(&entry, 1, MillisecondsUntil(deadline));
  } while (result < 0 && errno == EINTR);
  return result > 0;
}

struct FreeAddresses {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};
using Addresses = std::unique_ptr<addrinfo, FreeAddresses>;

absl::StatusOr<Addresses> Resolve(const std::string& host, const std::string& port) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* list = nullptr;
  if (const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &list); error != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("watchdog: address \"", host, "\": ", gai_strerror(error)));
  }
  return Addresses(list);
}

bool IsLoopback(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    return (ntohl(reinterpret_cast<const sockaddr_in*>(address)->sin_addr.s_addr) >> 24) == 127;
  }
  return IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
}

// A listening socket on a port of the system's choice; the loopback address is kept, any other opens all
// interfaces.
absl::StatusOr<Fd> Listen(const std::string& host, int* port) {
  LF_ASSIGN_OR_RETURN(const Addresses addresses, Resolve(host, "0"));
  sockaddr_storage address{};
  std::memcpy(&address, addresses->ai_addr, addresses->ai_addrlen);
  if (!IsLoopback(addresses->ai_addr)) {
    if (address.ss_family == AF_INET) {
      reinterpret_cast<sockaddr_in*>(&address)->sin_addr.s_addr = htonl(INADDR_ANY);
    } else {
      reinterpret_cast<sockaddr_in6*>(&address)->sin6_addr = in6addr_any;
    }
  }
  Fd fd(socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (fd.get() < 0) return SystemError("socket");
  if (bind(fd.get(), reinterpret_cast<sockaddr*>(&address), addresses->ai_addrlen) != 0)
    return SystemError("bind");
  if (listen(fd.get(), SOMAXCONN) != 0) return SystemError("listen");
  socklen_t length = sizeof(address);
  if (getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length) != 0)
    return SystemError("getsockname");
  *port = ntohs(address.ss_family == AF_INET ? reinterpret_cast<sockaddr_in*>(&address)->sin_port
                                             : reinterpret_cast<sockaddr_in6*>(&address)->sin6_port);
  return fd;
}

void SendAtOnce(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

absl::StatusOr<Fd> Connect(const std::string& host, const std::string& port, const Hello& hello,
                           Clock::time_point deadline) {
  LF_ASSIGN_OR_RETURN(const Addresses addresses, Resolve(host, port));
  absl::Status last = absl::UnavailableError(absl::StrCat("watchdog: no address for ", host));
  for (const addrinfo* a = addresses.get(); a != nullptr; a = a->ai_next) {
    Fd fd(socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (fd.get() < 0) return SystemError("socket");
    if (connect(fd.get(), a->ai_addr, a->ai_addrlen) != 0 && errno != EINPROGRESS) {
      last = SystemError(absl::StrCat("connect to ", host, ":", port));
      continue;
    }
    int error = ETIMEDOUT;
    socklen_t length = sizeof(error);
    if (PollOne(fd.get(), POLLOUT, deadline)) getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length);
    errno = error;
    if (error != 0) {
      last = SystemError(absl::StrCat("connect to ", host, ":", port));
      continue;
    }
    SendAtOnce(fd.get());
    if (send(fd.get(), &hello, sizeof(hello), MSG_NOSIGNAL) != sizeof(hello)) return SystemError("hello");
    return fd;
  }
  return last;
}

// Reads exactly `bytes`, or false at the deadline or the end of the connection.
bool ReadExactly(int fd, void* data, size_t bytes, Clock::time_point deadline) {
  size_t have = 0;
  while (have < bytes) {
    const ssize_t got = recv(fd, static_cast<char*>(data) + have, bytes - have, 0);
    if (got > 0) {
      have += static_cast<size_t>(got);
    } else if (got == 0 || (errno != EAGAIN && errno != EINTR) || !PollOne(fd, POLLIN, deadline)) {
      return false;
    }
  }
  return true;
}

// Accepts until every rank of [1, size) has said hello with the token.
absl::StatusOr<std::map<int, Fd>> AcceptAll(int listener, const std::string& token, int size,
                                            Clock::time_point deadline) {
  std::map<int, Fd> peers;
  while (static_cast<int>(peers.size()) < size - 1) {
    if (!PollOne(listener, POLLIN, deadline)) {
      return absl::DeadlineExceededError(
          absl::StrCat("watchdog: ", peers.size(), " of ", size - 1, " ranks have connected to rank 0"));
    }
    Fd fd(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd.get() < 0) continue;
    Hello hello;
    // A peer's hello follows at once; a stranger holds the others up for a second at most.
    const Clock::time_point hello_deadline = std::min(deadline, Clock::now() + std::chrono::seconds(1));
    if (!ReadExactly(fd.get(), &hello, sizeof(hello), hello_deadline)) continue;
    const bool known = std::memcmp(hello.token, token.data(), kTokenBytes) == 0;
    if (!known || hello.rank < 1 || hello.rank >= size || peers.count(hello.rank) != 0) continue;
    SendAtOnce(fd.get());
    peers.emplace(hello.rank, std::move(fd));
  }
  return peers;
}

}  // namespace

struct Watchdog::Impl {
  struct Peer {
    Fd fd;
    Clock::time_point heard;
    std::string unread;  // part of a frame
  };

  WatchdogOptions options;
  WatchdogCallbacks callbacks;
  int rank = 0;
  std::map<int, Peer> peers;  // rank 0: all others; others: rank 0. The thread's once it runs.
  Fd wake;                    // eventfd: flags or close
  std::mutex mutex;           // closing, flags
  bool closing = false;
  std::vector<uint64_t> flags;
  bool lost = false;  // the thread's
  std::thread thread;

  void Loop();
  void SendFrame(Peer& peer, const Frame& frame);
  void ReadFrom(int peer_rank);
  bool HandleFrame(int peer_rank, const Frame& frame);
  void Lose(int lost_rank, const std::string& why);
  void Wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written =
        write(wake.get(), &one, sizeof(one));  // fails only when already awake
  }
};

// A full buffer means that the peer has not read for many heartbeats; its silence is judged by the timeout.
void Watchdog::Impl::SendFrame(Peer& peer, const Frame& frame) {
  [[maybe_unused]] const ssize_t sent =
      send(peer.fd.get(), &frame, sizeof(frame), MSG_NOSIGNAL | MSG_DONTWAIT);
}

void Watchdog::Impl::Lose(int lost_rank, const std::string& why) {
  peers.erase(lost_rank);
  for (auto& [r, peer] : peers) SendFrame(peer, {.type = FrameType::kLost, .rank = lost_rank});
  if (std::exchange(lost, true)) return;
  if (callbacks.on_peer_lost) {
    callbacks.on_peer_lost(lost_rank,
                           absl::UnavailableError(absl::StrCat("rank ", lost_rank, " is lost: ", why)));
  }
}

// False when the connection is no longer watched.
bool Watchdog::Impl::HandleFrame(int peer_rank, const Frame& frame) {
  switch (frame.type) {
    case FrameType::kHeartbeat:
      return true;
    case FrameType::kLost:
      Lose(frame.rank, "rank 0 says so");
      return peers.count(peer_rank) != 0;
    case FrameType::kFlag:
      if (callbacks.on_flag) callbacks.on_flag(frame.value);
      return true;
    case FrameType::kGoodbye:
      peers.erase(peer_rank);
      return false;
  }
  Lose(peer_rank, "it sent an unknown frame");
  return false;
}

void Watchdog::Impl::ReadFrom(int peer_rank) {
  while (true) {
    Peer& peer = peers.at(peer_rank);
    char bytes[64 * sizeof(Frame)];
    const ssize_t got = recv(peer.fd.get(), bytes, sizeof(bytes), MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (got < 0) return Lose(peer_rank, std::strerror(errno));
    if (got == 0) return Lose(peer_rank, "it closed its connection");
    peer.heard = Clock::now();
    peer.unread.append(bytes, static_cast<size_t>(got));
    while (peer.unread.size() >= sizeof(Frame)) {
      Frame frame;
      std::memcpy(&frame, peer.unread.data(), sizeof(frame));
      peer.unread.erase(0, sizeof(frame));
      if (!HandleFrame(peer_rank, frame)) return;
    }
  }
}

void Watchdog::Impl::Loop() {
  Clock::time_point next_heartbeat = Clock::now();
  while (true) {
    std::vector<uint64_t> pending;
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (closing) break;
      pending.swap(flags);
    }
    for (const uint64_t value : pending) {
      for (auto& [r, peer] : peers) SendFrame(peer, {.type = FrameType::kFlag, .value = value});
    }
    if (Clock::now() >= next_heartbeat) {
      for (auto& [r, peer] : peers) SendFrame(peer, {});
      next_heartbeat = Clock::now() + options.interval;
    }
    std::vector<pollfd> entries{{wake.get(), POLLIN, 0}};
    std::vector<int> ranks{-1};
    for (auto& [r, peer] : peers) {
      entries.push_back({peer.fd.get(), POLLIN, 0});
      ranks.push_back(r);
    }
    poll(entries.data(), entries.size(), MillisecondsUntil(next_heartbeat));
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t drained = read(wake.get(), &count, sizeof(count));
    // Reading comes first: after a stop of this process the peers' heartbeats are waiting here.
    for (size_t i = 1; i < entries.size(); ++i) {
      if (entries[i].revents != 0 && peers.count(ranks[i]) != 0) ReadFrom(ranks[i]);
    }
    for (size_t i = 1; i < entries.size(); ++i) {
      const auto peer = peers.find(ranks[i]);
      if (peer == peers.end() || Clock::now() - peer->second.heard <= options.timeout) continue;
      Lose(ranks[i], absl::StrCat("silent for more than ", options.timeout.count(), " ms"));
    }
  }
  for (auto& [r, peer] : peers) {
    SendFrame(peer, {.type = FrameType::kGoodbye});
    shutdown(peer.fd.get(), SHUT_WR);
    // Closing with unread bytes would reset the connection, and the peer might miss the goodbye.
    char unread[1024];
    while (recv(peer.fd.get(), unread, sizeof(unread), MSG_DONTWAIT) > 0) {
    }
  }
}

Watchdog::Watchdog(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Watchdog::~Watchdog() { Close(); }

absl::StatusOr<std::unique_ptr<Watchdog>> Watchdog::Start(Communicator& world, const WatchdogOptions& options,
                                                          WatchdogCallbacks callbacks, Stream& stream) {
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->callbacks = std::move(callbacks);
  impl->rank = world.rank();
  if (world.size() == 1) return std::unique_ptr<Watchdog>(new Watchdog(std::move(impl)));
  const Clock::time_point deadline = Clock::now() + options.connect_timeout;

  Fd listener;
  std::string token(kTokenBytes, '\0');
  std::string rendezvous;  // "PORT TOKEN HOST"
  absl::Status mine;
  if (options.interval < milliseconds(1) || options.timeout <= options.interval) {
    mine = absl::InvalidArgumentError(absl::StrCat("watchdog: interval ", options.interval.count(),
                                                   " ms, timeout ", options.timeout.count(),
                                                   " ms; needed is 1 <= interval < timeout"));
  } else if (impl->wake = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)); impl->wake.get() < 0) {
    mine = SystemError("eventfd");
  } else if (world.rank() == 0) {
    int port = 0;
    absl::StatusOr<Fd> listening = Listen(options.advertise_host, &port);
    if (!listening.ok()) {
      mine = listening.status();
    } else if (getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size())) {
      mine = SystemError("getrandom");
    } else {
      listener = *std::move(listening);
      rendezvous = absl::StrCat(port, " ", absl::BytesToHexString(token), " ", options.advertise_host);
    }
  }
  LF_RETURN_IF_ERROR(AgreeOnStatus(world, mine, stream));
  LF_ASSIGN_OR_RETURN(rendezvous, BroadcastString(world, std::move(rendezvous), 0, stream));

  if (world.rank() == 0) {
    absl::StatusOr<std::map<int, Fd>> accepted = AcceptAll(listener.get(), token, world.size(), deadline);
    mine = accepted.status();
    if (accepted.ok()) {
      for (auto& [r, fd] : *accepted) impl->peers[r] = {std::move(fd), Clock::now(), {}};
    }
  } else {
    const std::vector<std::string> parts = absl::StrSplit(rendezvous, absl::MaxSplits(' ', 2));
    Hello hello;
    hello.rank = world.rank();
    std::memcpy(hello.token, absl::HexStringToBytes(parts.at(1)).data(), kTokenBytes);
    absl::StatusOr<Fd> connected = Connect(parts.at(2), parts.at(0), hello, deadline);
    mine = connected.status();
    if (connected.ok()) impl->peers[0] = {*std::move(connected), Clock::now(), {}};
  }
  LF_RETURN_IF_ERROR(AgreeOnStatus(world, mine, stream));
  for (auto& [r, peer] : impl->peers) peer.heard = Clock::now();
  impl->thread = std::thread([state = impl.get()] { state->Loop(); });
  return std::unique_ptr<Watchdog>(new Watchdog(std::move(impl)));
}

void Watchdog::SetFlag(uint64_t value) {
  LF_CHECK(impl_->rank == 0);
  if (!impl_->thread.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->flags.push_back(value);
  }
  impl_->Wake();
}

void Watchdog::Close() {
  if (!impl_->thread.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->closing = true;
  }
  impl_->Wake();
  impl_->thread.join();
  impl_->peers.clear();
}

}  // namespace longfill
