#include "runtime/serving/signal_watch.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longfill {
namespace {

// Write end of the pipe between the handler and the thread; -1: nobody watches.
std::atomic<int> g_pipe = -1;

extern "C" void LongfillOnSignal(int signal) {
  const int saved = errno;
  const unsigned char number = static_cast<unsigned char>(signal);
  // A full pipe holds signals enough.
  if (const int fd = g_pipe.load(); fd >= 0) (void)!write(fd, &number, 1);
  errno = saved;
}

}  // namespace

struct SignalWatch::Impl {
  int read_fd = -1;
  int write_fd = -1;
  std::vector<std::pair<int, struct sigaction>> before;
  sigset_t watched{};
  sigset_t mask_before{};
  std::function<void(int)> on_signal;
  std::thread thread;

  void Loop() {
    pthread_sigmask(SIG_UNBLOCK, &watched, nullptr);
    unsigned char number = 0;
    while (true) {
      const ssize_t got = read(read_fd, &number, 1);
      if (got < 0 && errno == EINTR) continue;
      if (got != 1 || number == 0) return;  // 0: the watch ends
      on_signal(number);
    }
  }
};

SignalWatch::SignalWatch(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

absl::StatusOr<std::unique_ptr<SignalWatch>> SignalWatch::Start(const std::vector<int>& signals,
                                                                std::function<void(int)> on_signal) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) return absl::InternalError(absl::StrCat("pipe2: ", std::strerror(errno)));
  int nobody = -1;
  if (!g_pipe.compare_exchange_strong(nobody, fds[1])) {
    close(fds[0]);
    close(fds[1]);
    return absl::FailedPreconditionError("signals are watched already");
  }
  fcntl(fds[1], F_SETFL, O_NONBLOCK);
  auto impl = std::make_unique<Impl>();
  impl->read_fd = fds[0];
  impl->write_fd = fds[1];
  impl->on_signal = std::move(on_signal);
  sigemptyset(&impl->watched);
  for (const int signal : signals) sigaddset(&impl->watched, signal);
  pthread_sigmask(SIG_BLOCK, &impl->watched, &impl->mask_before);
  impl->thread = std::thread([raw = impl.get()] { raw->Loop(); });
  struct sigaction action {};
  action.sa_handler = LongfillOnSignal;
  action.sa_flags = SA_RESTART;
  for (const int signal : signals) {
    struct sigaction old {};
    if (sigaction(signal, &action, &old) == 0) impl->before.emplace_back(signal, old);
  }
  return std::unique_ptr<SignalWatch>(new SignalWatch(std::move(impl)));
}

SignalWatch::~SignalWatch() {
  for (const auto& [signal, old] : impl_->before) sigaction(signal, &old, nullptr);
  g_pipe = -1;
  const unsigned char end = 0;
  while (write(impl_->write_fd, &end, 1) < 0 && (errno == EINTR || errno == EAGAIN)) {
  }
  impl_->thread.join();
  pthread_sigmask(SIG_SETMASK, &impl_->mask_before, nullptr);
  close(impl_->read_fd);
  close(impl_->write_fd);
}

}  // namespace longfill
