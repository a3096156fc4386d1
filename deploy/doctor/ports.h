#ifndef LONGFILL_DEPLOY_DOCTOR_PORTS_H_
#define LONGFILL_DEPLOY_DOCTOR_PORTS_H_

// Whether addresses can be listened at, and reached from elsewhere.

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

#include "deploy/doctor/finding.h"
#include "kernels/base/status.h"

namespace longfill {

// A socket that listens, and tells whoever connects a word. Move-only owner.
class Listener {
 public:
  // `address`: HOST:PORT, port 0 takes any free one. InvalidArgument for what is no address; Unavailable with
  // the system's message as its own where it cannot be listened at: in use, not of this host, not allowed.
  static absl::StatusOr<Listener> Open(const std::string& address);
  Listener(Listener&& other) noexcept;
  Listener& operator=(Listener&& other) noexcept;
  ~Listener();

  int port() const { return port_; }
  // Sends `word` to all who have connected, and who still do within `linger`, and closes their connections.
  void Answer(std::string_view word, std::chrono::milliseconds linger);

 private:
  Listener(int socket, int port) : socket_(socket), port_(port) {}
  int socket_ = -1;
  int port_ = 0;
};

// Connections to several addresses at once.
class Callers {
 public:
  // Resolves names and connects, all within `timeout` together. One that fails has its reason in Hear.
  Callers(const std::vector<std::string>& addresses, std::chrono::milliseconds timeout);
  ~Callers();
  Callers(const Callers&) = delete;
  Callers& operator=(const Callers&) = delete;

  // What each address answered, up to the end of its connection; Unavailable: why it was not reached, or that
  // it said nothing within `timeout` in all.
  std::vector<absl::StatusOr<std::string>> Hear(std::chrono::milliseconds timeout);

 private:
  struct Call {
    int socket = -1;
    absl::Status status;
    std::string heard;
  };
  std::vector<Call> calls_;
};

// port.listen or port.kv, as `check` says: what Listener::Open said of `address`, which `option` names.
Finding JudgePort(std::string_view check, std::string_view option, std::string_view address,
                  const absl::Status& opened);

// What one rank knows of the way to another's pages.
struct Reached {
  int rank = 0;
  std::string address;  // as a client would connect
  absl::StatusOr<std::string> heard;
  std::string word;  // that this rank's listener says
};
// port.reachable, from one host to all ranks.
Finding JudgeReachability(const std::vector<Reached>& ranks);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_DOCTOR_PORTS_H_
