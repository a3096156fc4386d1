#include "deploy/doctor/ports.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <future>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "runtime/client/endpoint.h"

namespace longfill {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kBacklog = 1024;

struct FreeAddresses {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};
using Addresses = std::unique_ptr<addrinfo, FreeAddresses>;

absl::Status SystemError(int error) { return absl::UnavailableError(std::strerror(error)); }

// The first address of `at`; blocks as long as the resolver does.
absl::StatusOr<Addresses> Resolve(const HostPort& at, int flags) {
  std::string host = at.host;
  if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* list = nullptr;
  const int error =
      getaddrinfo(host.empty() ? nullptr : host.c_str(), std::to_string(at.port).c_str(), &hints, &list);
  if (error != 0) {
    return absl::UnavailableError(
        absl::StrCat("the name ", host, " is not known here: ", gai_strerror(error)));
  }
  return Addresses(list);
}

// A resolver that does not answer keeps its thread, not the caller.
absl::StatusOr<Addresses> ResolveUntil(const HostPort& at, Clock::time_point deadline) {
  using Result = absl::StatusOr<Addresses>;
  auto promise = std::make_shared<std::promise<Result>>();
  std::future<Result> future = promise->get_future();
  std::thread([promise, at] { promise->set_value(Resolve(at, 0)); }).detach();
  if (future.wait_until(deadline) != std::future_status::ready) {
    return absl::UnavailableError(absl::StrCat("the name ", at.host, " was not resolved in time"));
  }
  return future.get();
}

int MillisecondsUntil(Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::max<int64_t>(0, left));
}

// Begins to connect; the outcome is known when the socket can be written.
absl::StatusOr<int> BeginCall(const std::string& address, Clock::time_point deadline) {
  LF_ASSIGN_OR_RETURN(const HostPort at, ParseHostPort(address));
  LF_ASSIGN_OR_RETURN(const Addresses addresses, ResolveUntil(at, deadline));
  const int socket_fd = socket(addresses->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (socket_fd < 0) return SystemError(errno);
  if (connect(socket_fd, addresses->ai_addr, addresses->ai_addrlen) != 0 && errno != EINPROGRESS) {
    const int error = errno;
    close(socket_fd);
    return SystemError(error);
  }
  return socket_fd;
}

absl::Status OutcomeOf(int socket_fd) {
  int error = 0;
  socklen_t size = sizeof(error);
  if (getsockopt(socket_fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) error = errno;
  return error == 0 ? absl::OkStatus() : SystemError(error);
}

// True once the other side has said everything.
bool Read(int socket_fd, std::string& heard) {
  std::array<char, 256> buffer{};
  while (true) {
    const ssize_t count = recv(socket_fd, buffer.data(), buffer.size(), 0);
    if (count > 0) {
      heard.append(buffer.data(), static_cast<size_t>(count));
    } else if (count == 0 || (errno != EAGAIN && errno != EINTR)) {
      return true;
    } else if (errno == EAGAIN) {
      return false;
    }
  }
}

}  // namespace

absl::StatusOr<Listener> Listener::Open(const std::string& address) {
  LF_ASSIGN_OR_RETURN(const HostPort at, ParseHostPort(address));
  LF_ASSIGN_OR_RETURN(const Addresses addresses, Resolve(at, AI_PASSIVE));
  const int socket_fd = socket(addresses->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (socket_fd < 0) return SystemError(errno);
  Listener listener(socket_fd, 0);
  // As the service does: connections that have just ended do not keep a port.
  const int yes = 1;
  const int no = 0;
  setsockopt(socket_fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  if (addresses->ai_family == AF_INET6) setsockopt(socket_fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof(no));
  if (bind(socket_fd, addresses->ai_addr, addresses->ai_addrlen) != 0) return SystemError(errno);
  if (listen(socket_fd, kBacklog) != 0) return SystemError(errno);
  sockaddr_storage bound{};
  socklen_t size = sizeof(bound);
  if (getsockname(socket_fd, reinterpret_cast<sockaddr*>(&bound), &size) != 0) return SystemError(errno);
  listener.port_ = ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                                                     : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
  return listener;
}

Listener::Listener(Listener&& other) noexcept
    : socket_(std::exchange(other.socket_, -1)), port_(other.port_) {}

Listener& Listener::operator=(Listener&& other) noexcept {
  std::swap(socket_, other.socket_);
  std::swap(port_, other.port_);
  return *this;
}

Listener::~Listener() {
  if (socket_ >= 0) close(socket_);
}

void Listener::Answer(std::string_view word, milliseconds linger) {
  const Clock::time_point deadline = Clock::now() + linger;
  while (true) {
    const int caller = accept4(socket_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (caller >= 0) {
      // A word is far below the buffer of a new connection. Who has left already is told nothing.
      static_cast<void>(send(caller, word.data(), word.size(), MSG_NOSIGNAL));
      close(caller);
      continue;
    }
    if (errno == EINTR || errno == ECONNABORTED) continue;
    if (errno != EAGAIN) return;
    pollfd socket{.fd = socket_, .events = POLLIN};
    if (poll(&socket, 1, MillisecondsUntil(deadline)) == 0) return;
  }
}

Callers::Callers(const std::vector<std::string>& addresses, milliseconds timeout) {
  const Clock::time_point deadline = Clock::now() + timeout;
  for (const std::string& address : addresses) {
    calls_.emplace_back();
    absl::StatusOr<int> socket_fd = BeginCall(address, deadline);
    if (socket_fd.ok()) {
      calls_.back().socket = *socket_fd;
      calls_.back().status =
          absl::UnavailableError("no answer: packets are dropped on the way (a firewall?)");
    } else {
      calls_.back().status = socket_fd.status();
    }
  }
  std::vector<Callers::Call*> waiting;
  for (Callers::Call& call : calls_) {
    if (call.socket >= 0) waiting.push_back(&call);
  }
  while (!waiting.empty()) {
    std::vector<pollfd> sockets;
    for (const Callers::Call* call : waiting) sockets.push_back({.fd = call->socket, .events = POLLOUT});
    const int ready = poll(sockets.data(), sockets.size(), MillisecondsUntil(deadline));
    if (ready == 0 || (ready < 0 && errno != EINTR)) return;
    std::vector<Callers::Call*> still;
    for (size_t i = 0; i < waiting.size(); ++i) {
      if (sockets[i].revents == 0) {
        still.push_back(waiting[i]);
      } else {
        waiting[i]->status = OutcomeOf(waiting[i]->socket);
      }
    }
    waiting = std::move(still);
  }
}

Callers::~Callers() {
  for (const Call& call : calls_) {
    if (call.socket >= 0) close(call.socket);
  }
}

std::vector<absl::StatusOr<std::string>> Callers::Hear(milliseconds timeout) {
  const Clock::time_point deadline = Clock::now() + timeout;
  std::vector<absl::StatusOr<std::string>> heard;
  for (Call& call : calls_) {
    bool ended = !call.status.ok();
    while (!ended) {
      ended = Read(call.socket, call.heard);
      if (ended) break;
      pollfd socket{.fd = call.socket, .events = POLLIN};
      if (poll(&socket, 1, MillisecondsUntil(deadline)) == 0) {
        call.status =
            absl::UnavailableError("connected, but nothing was said: a proxy or a firewall answers");
        ended = true;
      }
    }
    heard.push_back(call.status.ok() ? absl::StatusOr<std::string>(call.heard) : call.status);
  }
  return heard;
}

Finding JudgePort(std::string_view check, std::string_view option, std::string_view address,
                  const absl::Status& opened) {
  const std::string at = absl::StrCat(std::string(option), " ", std::string(address));
  if (opened.ok()) return Ok(check, absl::StrCat(at, " can be listened at"));
  const std::string value = absl::StrCat(at, ": ", opened.message());
  const bool taken = opened.message() == std::strerror(EADDRINUSE);
  const bool forbidden = opened.message() == std::strerror(EACCES);
  return Failed(check, value,
                taken ? "another process listens there (ss -ltnp names it): end it or choose another port"
                : forbidden
                    ? "ports below 1024 are for root: choose one above"
                    : "it is not an address of this host (ip addr lists those): 0.0.0.0 stands for all");
}

Finding JudgeReachability(const std::vector<Reached>& ranks) {
  constexpr char kCheck[] = "port.reachable";
  std::string unreached;
  bool elsewhere = false;
  for (const Reached& rank : ranks) {
    if (rank.heard.ok() && *rank.heard == rank.word) continue;
    elsewhere = elsewhere || rank.heard.ok();
    absl::StrAppend(
        &unreached, unreached.empty() ? "" : "; ", "rank ", rank.rank, " at ", rank.address, ": ",
        rank.heard.ok() ? "something else answers there" : std::string(rank.heard.status().message()));
  }
  if (unreached.empty())
    return Ok(kCheck, absl::StrCat("pages of ", ranks.size(), ranks.size() == 1 ? " rank" : " ranks",
                                   " can be reached"));
  return Failed(kCheck, unreached,
                elsewhere
                    ? "two machines have that name, or it leads to another one: look at /etc/hosts and DNS"
                    : "listen at 0.0.0.0 or an address that other hosts reach, let every host resolve the "
                      "names of the others, and open the ports (--kv-listen fixes them)");
}

}  // namespace longfill
