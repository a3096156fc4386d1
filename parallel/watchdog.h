#ifndef LONGFILL_PARALLEL_WATCHDOG_H_
#define LONGFILL_PARALLEL_WATCHDOG_H_

// Learns of dead and stopped peers without waiting for a collective, and carries a number from rank 0 to all
// while they compute. Rank 0 listens on TCP, every other rank keeps one connection to it; both sides send a
// heartbeat. A closed connection tells within milliseconds, silence after `timeout`. Rank 0 passes a loss on
// to the others.

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "kernels/base/status.h"
#include "kernels/base/stream.h"
#include "parallel/communicator.h"

namespace longfill {

struct WatchdogOptions {
  std::chrono::milliseconds interval{1000};  // between heartbeats
  std::chrono::milliseconds timeout{8000};   // of silence before a peer counts as lost; several intervals
  std::chrono::milliseconds connect_timeout{30000};  // of Start
  // Name or address under which the other ranks reach rank 0, read on rank 0 only. With a loopback address
  // the port is bound to it alone; otherwise to every interface.
  std::string advertise_host = "127.0.0.1";
};

// Called from the watchdog's thread; must not call Close or destroy the watchdog, and should return soon.
struct WatchdogCallbacks {
  // At most once in the life of a watchdog: Unavailable naming the rank. Not for an orderly Close.
  std::function<void(int rank, const absl::Status& status)> on_peer_lost;
  // On ranks other than 0, once for each SetFlag, in order.
  std::function<void(uint64_t value)> on_flag;
};

class Watchdog {
 public:
  // Every rank of `world` calls this; `world` is used in here only. All return OK, or all an error. A group
  // of one has nothing to watch and starts no thread. Connections without the group's random token are
  // dropped.
  static absl::StatusOr<std::unique_ptr<Watchdog>> Start(Communicator& world, const WatchdogOptions& options,
                                                         WatchdogCallbacks callbacks, Stream& stream);
  ~Watchdog();  // Close
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  // Rank 0 only: `value` reaches on_flag of every other rank soon, also in the middle of a long computation.
  // Thread-safe, never blocks. Used for "cancel request N".
  void SetFlag(uint64_t value);

  // Says goodbye, so that the peers report no loss, and ends the thread. Idempotent. Not from a callback.
  void Close();

 private:
  struct Impl;
  explicit Watchdog(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longfill

#endif  // LONGFILL_PARALLEL_WATCHDOG_H_
